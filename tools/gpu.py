"""What is worth a GPU, in order of value: `make gpu`, or `python tools/gpu.py [--minutes 13] [--only PART ...]`.

Each part runs in a process of its own, for at most its share of the time, and ends in one file in results/, or in $OUT
where that is set; with --quick, which tries every line in small, in runs/gpu-quick. What is there already is left
alone, a part that fails does not stop the others, and nothing starts after the time is up; a comparison that was cut
off goes on where it stopped. The machine needs torch, transformers, peft, accelerate, pytest, pandas and pyarrow of its
own; what else is missing comes, with the data, from .gpu/, which `make gpu-data` fills here and which is to be carried
there beside the repository. A call that may take no more than 64 MiB carries a part of it: .gpu/1 and `python
tools/gpu.py --unpack`, then .gpu/2 and so on, with the last one the run itself. All is unpacked into a folder outside
the checkout, and found there by later calls that do not carry it.

The comparisons named `smol` train a pretrained model of 135 million weights. It is found in models/ (`make model`), in
the folder that TOKPREF_MODELS names, or among what was carried.
"""
import argparse
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / ".gpu"
DATA = ("Anthropic/hh-rlhf", "openai/gsm8k", "gsm8k-preferences", "alpaca_eval-preferences", "stanfordnlp/imdb")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEELS = ("datasets", "dill", "multiprocess", "xxhash")     # small, and seldom on a machine for training
OUTSIDE = Path(os.environ.get("TOKPREF_GPU_FOLDER") or Path(tempfile.gettempdir()) / "tokpref-gpu")   # unpacked
LIMIT = 64      # MiB that a machine may take
SPARE = 0.5     # MiB left free
ALL = 99        # seeds: all of a profile
PEERS = {path.stem.removeprefix("requirements-"): path
         for path in sorted((ROOT / "benchmarks").glob("requirements-*.txt"))}


class Comparison(NamedTuple):
    "A task and profile of `tokpref compare`, and what is larger here."

    task: str
    profile: str
    overrides: dict = {}
    own_draw: bool = False      # each seed holds out other pairs, and tunes a start of its own

    @property
    def pretrained(self) -> bool: return self.profile.startswith("smol")


COMPARISONS = {
    "dialogue-smol": Comparison("dialogue", "smol", own_draw=True),
    "sentiment-smol": Comparison("sentiment", "smol"),
    "instructions-smol": Comparison("instructions", "smol"),
    "math-smol": Comparison("math", "smol"),
    "instructions-smol-lora": Comparison("instructions", "smol-lora"),
    "math-smol-stories": Comparison("math", "smol-stories"),
    "sentiment": Comparison(
        "sentiment",
        "nano",
        {  # 91 million weights
            "vocab_size": 8192,
            "context": 96,
            "hidden_size": 768,
            "layers": 12,
            "heads": 12,
            "lm_tokens": 40_000_000,
            "lm_batch": 256,
            "lm_learning_rate": 6e-4,
            "train_prompts": 2000,
            "eval_prompts": 512,
            "eval_pair_prompts": 128,
            "frontier_samples": 128,
            "max_length": 96,
            "batch_size": 64,
            "steps": 240,
            "eval_steps": 60,
            "learning_rate": 1e-5,
            "seeds": [0, 1, 2],
        },
    ),
    "math": Comparison(
        "math",
        "nano",
        {  # the same start, more of everything that a loss sees and is measured on
            "train_problems": 4000,
            "eval_problems": 1000,
            "eval_pair_problems": 400,
            "batch_size": 64,
            "steps": 200,
            "eval_steps": 50,
            "seeds": [0, 1, 2],
        },
    ),
    "instructions": Comparison(
        "instructions",
        "nano",
        {  # 32 million weights, answers of up to 300 words
            "vocab_size": 8192,
            "context": 512,
            "hidden_size": 512,
            "layers": 8,
            "heads": 8,
            "lm_tokens": 30_000_000,
            "lm_batch": 64,
            "lm_learning_rate": 1e-3,
            "max_words": 300,
            "max_length": 768,
            "max_prompt_length": 256,
            "prompts": 100,
            "max_new_tokens": 256,
            "eval_batch": 64,
            "sft_batch": 32,
            "batch_size": 32,
            "steps": 200,
            "eval_steps": 100,
            "learning_rate": 2e-5,
            "losses": ["dpo", "tdpo1", "tdpo2", "adpo", "bpo", "tbpo_q", "tbpo_a"],
            "seeds": [0, 1, 2],
        },
    ),
}
FILES = {name: f"{name}.json" if part.pretrained else f"{name}-gpu.json" for name, part in COMPARISONS.items()}
PARTS = {"tests": "cuda-tests.json", "engine": "engine-cuda.json"} | FILES
ROUNDS = (1, 2, ALL)    # seeds of every comparison before the next seed of any
SMALL = {               # with --quick: does a pretrained model go through every line?
    "source": "made-up",
    "as_messages": False,
    "test_split": "",
    "train_pairs": 8,
    "eval_pairs": 6,
    "max_length": 64,
    "max_prompt_length": 32,
    "max_new_tokens": 4,
    "prompts": 2,
    "nucleus_samples": 2,
    "eval_batch": 16,
    "sft_batch": 4,
    "batch_size": 2,
    "steps": 2,
    "eval_steps": 2,
}
SMALL_REVIEWS = {
    "source": "templates",
    "context": 32,
    "sft_epochs": 0.05,
    "sft_batch": 4,
    "test_reviews": 4,
    "train_prompts": 4,
    "eval_prompts": 4,
    "eval_pair_prompts": 3,
    "frontier_prompts": 2,
    "frontier_samples": 8,
    "batch_size": 4,
    "steps": 2,
    "eval_steps": 1,
    "sweep": {},
}
SMALL_STORIES = {       # tuned so far that some of its own samples are right
    "train_questions": 24,
    "completions": 6,
    "test_questions": 4,
    "sft_batch": 4,
    "sft_learning_rate": 1e-4,
    "sft_warmup_steps": 1,
    "max_length": 128,
    "max_new_tokens": 40,
    "eval_batch": 72,
    "batch_size": 2,
    "steps": 2,
    "eval_steps": 2,
}
MOST = {"tests": 180, "engine": 420}        # seconds that a part may take; the others share what is left


# What each part does, in its own process

def run_tests(args, target: Path) -> None:
    "tests/test_cuda.py; its counts, and the names of what failed."
    from tokpref.experiments.compare import hardware, versions, write_json
    report = Path(tempfile.mkdtemp()) / "junit.xml"
    env = os.environ | ({"TOKPREF_TEST_DEVICE": "cpu"} if args.device == "cpu" else {})
    picked = ["-k", "float32 and (Llama or dpo) or a_step or samples"] if args.quick else []
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-q", "-p", "no:cacheprovider",
               f"--junitxml={report}"]
    done = subprocess.run([*command, *picked], cwd=ROOT, env=env)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    broken = [case.get("name") for case in suite.iter("testcase")
              if case.find("failure") is not None or case.find("error") is not None]
    seconds = float(suite.get("time", 0))
    write_json(target, {"tests": "cuda", **counts, "broken": broken, "seconds": seconds, "versions": versions(),
                        "hardware": hardware()})
    if done.returncode: raise RuntimeError(f"{len(broken)} of {counts['tests']} tests failed")


def run_engine(args, target: Path) -> None:
    "The benchmark's steps; its file is written anew after each of them, and lists the peers that can't run here."
    options = ["--quick"] if args.quick else ["--parts", "steps"]
    command = [sys.executable, "benchmarks/engine.py", "--device", args.device, *options, "--out", target]
    subprocess.run(command, cwd=ROOT)
    if not target.exists(): raise RuntimeError("the benchmark ended without a result")


def settings_of(name: str, quick: bool) -> tuple[str, dict]:
    "Profile and overrides of a comparison."
    task, profile, overrides, _ = COMPARISONS[name]
    if not quick: return profile, overrides
    few = {"losses": ["dpo", "tdpo2"], "seeds": [0, 1]}
    if not COMPARISONS[name].pretrained: return "smoke", few
    small = {"sentiment": SMALL_REVIEWS, "math-smol-stories": SMALL_STORIES}
    return profile, small.get(name if name in small else task, SMALL) | few


def run_comparison(args, target: Path) -> None:
    "All losses, for the first seeds, one after another; the file is written anew, and a line printed, after every run."
    import torch

    from tokpref.experiments.compare import compare, comparison_table, find_task, merge_records, write_json
    torch.set_float32_matmul_precision("high")      # TF32 where a product is not in bfloat16 anyway
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("tokpref").setLevel(logging.INFO)     # each stage of a preparation says that it is there
    task = COMPARISONS[args.part].task
    profile, overrides = settings_of(args.part, args.quick)
    _, config = find_task(task).configure(profile, overrides)
    folder = ROOT / "runs" / f"gpu-{'quick-' * args.quick}{args.part}"
    more = {"float32_matmul": "tf32"} | ({} if COMPARISONS[args.part].pretrained else {"profile": "gpu", "of": profile})
    done: list[dict] = []

    def keep(record: dict) -> dict:
        "The record so far, with the seeds before."
        whole = merge_records(*done, record)
        made = {(run["label"], run["seed"]) for run in whole["runs"]}
        finished = sum(all((label, seed) in made for label in labels) for seed in config.seeds)
        write_json(target, whole | more | {"complete": made == wanted, "finished_seeds": finished})
        return whole

    def say(record: dict) -> None:
        "Keep the record, and a line on its last run."
        run = keep(record)["runs"][-1]
        numbers = [f"{name} {run['metrics'][name]:.3f}" for name in (record["value"], "kl", "truncated")
                   if name in run.get("metrics", {})]
        told = run.get("error") or ", ".join(numbers)
        print(f"{args.part}: {run['label']}, seed {run['seed']}: {told}; {time.monotonic() - began:.0f} s", flush=True)

    labels = resolve_labels(task, config)
    wanted = {(label, seed) for label in labels for seed in config.seeds}
    whole: dict = {}
    began = time.monotonic()
    for seed in config.seeds[:args.seeds]:
        own = {"data_seed": seed} if COMPARISONS[args.part].own_draw else {}
        record = compare(task, profile, seeds=[seed], out=folder, overrides=overrides | own,
                         progress=sys.stderr.isatty(), each=say)
        whole = keep(record)
        done.append(record)
    print(comparison_table(whole), flush=True)


def resolve_labels(task: str, config) -> list[str]:
    "The labels of the lines of a comparison."
    from tokpref.experiments.compare import find_task, resolve_losses
    return list(resolve_losses(None, config, find_task(task).variants))


# The machine and what is carried to it

def environment() -> dict:
    "The variables of every part: this folder first, then what was carried."
    carried, model = OUTSIDE / "data", find_models()
    data = os.environ.get("TOKPREF_DATA") or (str(carried) if carried.is_dir() else "")
    paths = [str(ROOT), str(OUTSIDE / "site"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
           "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg",
           "TOKPREF_PEERS": str(OUTSIDE / "peers")}
    found = ({"TOKPREF_DATA": data} if data else {}) | ({"TOKPREF_MODELS": str(model)} if model else {})
    return os.environ | own | found


def find_models() -> Path | None:
    "The folder that holds the pretrained model; None where there is none."
    named = os.environ.get("TOKPREF_MODELS")
    places = [*([Path(named)] if named else []), ROOT / "models", OUTSIDE / "models"]
    return next((place for place in places if (place / MODEL).is_dir()), None)


def unpack(wheels: list[Path], folder: Path) -> None:
    "Install wheels, and nothing that they ask for, into a folder."
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder), *map(str, wheels)], check=True)


def download(what: list, folder: Path, python: str) -> None:
    "Wheels of packages, and of nothing that they ask for, for another Python on Linux."
    names = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    systems = [part for name in names for part in ("--platform", f"{name}_x86_64")]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    wanted = ["--python-version", python, "--implementation", "cp", *systems, "-d", folder, *what]
    subprocess.run([*pip, *wanted], check=True)


@contextlib.contextmanager
def in_one_go(place: Path) -> Iterator[Path]:
    "Inside, make the folder or file that is given; afterwards it stands at `place`. A killed call leaves none there."
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    yield part
    if place.is_dir(): shutil.rmtree(place)
    part.replace(place)


def unpack_folder(folder: Path) -> None:
    "Copy what one call carried to the folder outside the checkout, and install its wheels there."
    wheels = [wheel for wheel in sorted((folder / "wheels").glob("*.whl"))
              if not importlib.util.find_spec(wheel.name.split("-")[0])]
    wanted = {OUTSIDE / "site": wheels} if wheels else {}
    wanted |= {OUTSIDE / "peers" / peer.name: sorted(peer.glob("*.whl")) for peer in (folder / "peers").glob("*")}
    for place, inside in wanted.items():
        if place.is_dir(): continue
        with in_one_go(place) as part: unpack(inside, part)
    for name in DATA:
        if not (folder / "data" / name).is_dir(): continue
        with in_one_go(OUTSIDE / "data" / name) as part: shutil.copytree(folder / "data" / name, part)
    for path in sorted((folder / "model").glob("smol.*-of-*")):
        with in_one_go(OUTSIDE / "model" / path.name) as part: shutil.copyfile(path, part)


def unpack_all() -> str:
    "Unpack what this call carried, and make the model once all of its parts are there; a line on what is there."
    for folder in sorted(CARRIED.glob("[0-9]*")): unpack_folder(folder)
    parts = sorted((OUTSIDE / "model").glob("smol.*-of-*"))
    count = int(parts[0].name.rpartition("-")[2]) if parts else 0
    if parts and len(parts) == count and find_models() is None:
        tool = [sys.executable, str(ROOT / "tools" / "make_model.py"), "--parts", str(OUTSIDE / "model")]
        subprocess.run([*tool, "--out", str(OUTSIDE / "models")], check=True, cwd=ROOT, env=environment())
    data = [name for name in DATA if (OUTSIDE / "data" / name).is_dir()]
    model = "model there" if find_models() else f"{len(parts)} of {count or 'no'} parts of the model"
    return f"unpacked: data {', '.join(data) or 'none'}; {model}"


def check_machine(device: str) -> None:
    "Exits with a word if something that is needed is missing."
    imported = [sys.executable, "-c", "import tokpref.experiments.compare"]
    done = subprocess.run(imported, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tokpref can't be imported here: {done.stderr.strip().splitlines()[-1]}\n"
                 "fill .gpu/ with `make gpu-data` and carry it along")
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        sys.exit("no GPU is to be seen here; --device cpu --quick tries the parts without one")


def mebibytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def in_calls(sizes: dict[str, float], room: float) -> list[list[str]]:
    "Names in their order, in as few calls as that allows. Exits if one of them does not fit alone."
    calls: list[list[str]] = []
    for name, size in sizes.items():
        if size > room: sys.exit(f"{name} has {size:.1f} MiB, and a call has room for {room:.1f}")
        if not calls or sum(sizes[other] for other in calls[-1]) + size > room: calls.append([])
        calls[-1].append(name)
    return calls


def carry(python: str) -> None:
    "Fill .gpu/ with model, data and wheels, a folder for each call, and say how large they are."
    source = os.environ.get("TOKPREF_DATA")
    if not source: sys.exit("set TOKPREF_DATA to the folder with the data")
    shutil.rmtree(CARRIED, ignore_errors=True)
    whole = CARRIED / "all"
    for name in DATA: shutil.copytree(Path(source) / name, whole / "data" / name, copy_function=shutil.copyfile)
    download(list(WHEELS), whole / "wheels", python)
    for name, path in PEERS.items(): download(["-r", path], whole / "peers" / name, python)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    repository = mebibytes(ROOT / name for name in listed.split("\0") if name)
    room = LIMIT - SPARE - repository - mebibytes((whole / "wheels").iterdir())     # a part of the model fills a call
    tool = [sys.executable, str(ROOT / "tools" / "make_model.py"), "--split", str(whole / "model")]
    subprocess.run([*tool, "--part-size", str(int(room * 2**20))], check=True)
    names = ["wheels", *[f"model/{path.name}" for path in sorted((whole / "model").iterdir())],
             *[f"data/{name}" for name in DATA], "peers"]
    sizes = {name: mebibytes([whole / name, *(whole / name).rglob("*")]) for name in names}
    calls = in_calls(sizes, LIMIT - repository)
    for i, inside in enumerate(calls, start=1):
        for name in inside:
            (CARRIED / str(i) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(whole / name, CARRIED / str(i) / name)
        size = sum(sizes[name] for name in inside)
        print(f".gpu/{i}: {', '.join(inside)}: {size:.1f} MiB, with the repository {size + repository:.1f} of {LIMIT}")
    shutil.rmtree(whole)
    print(f"for Python {python}; --unpack in every call but the last, which runs")


# All parts

def finished(target: Path, seeds: int) -> bool:
    "Whether a result is there, without failures and with so many seeds, or with all."
    if not target.exists(): return False
    record = json.loads(target.read_text(encoding="utf-8"))
    return not record.get("broken") and (record.get("complete", True) or record.get("finished_seeds", 0) >= seeds)


def in_a_process(name: str, seeds: int, args, target: Path, seconds: float) -> str:
    "Run one part for at most so long; how it ended."
    command = [sys.executable, __file__, "--part", name, "--device", args.device, "--seeds", str(seeds),
               "--target", target]
    if args.quick: command.append("--quick")
    part = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    try: code = part.wait(timeout=seconds)
    except subprocess.TimeoutExpired: return "cut off; run again to go on"
    finally:
        if part.poll() is None:
            os.killpg(part.pid, signal.SIGTERM)
            part.wait()
    return "done" if code == 0 else f"failed ({code})"


def run_all(args) -> int:
    "Every part wanted and not there, comparisons with one seed, then with the next; a line for each at the end."
    out = ROOT / "runs" / "gpu-quick" if args.quick else Path(os.environ.get("OUT") or ROOT / "results")
    if args.quick: shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    wanted = args.only or list(PARTS)
    lines = []
    more = [(name, seeds) for seeds in ROUNDS[1:] for name in wanted if name in COMPARISONS]
    for name, seeds in [(name, ROUNDS[0]) for name in wanted] + more:
        target, start = out / PARTS[name], time.monotonic()
        left = ends - start
        if any(finished(folder / PARTS[name], seeds) for folder in ([out] if args.quick else [out, ROOT / "results"])):
            how = "there already"
        elif left < 20: how = "not started; the time is up"
        elif name in COMPARISONS and COMPARISONS[name].pretrained and find_models() is None:
            how = "not started; make model first"
        else:
            print(f"\n== {name}, {left / 60:.1f} minutes left", flush=True)
            most = float(MOST.get(name) or left)
            how = in_a_process(name, seeds, args, target, min(left, most))
        told = {1: ", one seed", 2: ", two seeds", ALL: ", all seeds"}
        what = name + (told[seeds] if name in COMPARISONS else "")
        file = PARTS[name] if target.exists() else ""
        lines.append(f"{what:<34} {how:<28} {time.monotonic() - start:>6.0f} s   {file}")
    print(f"\n{'part':<34} {'':<28} {'':>8}   file in {out.name}/", *lines, sep="\n")
    return int(any("failed" in line for line in lines))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that is worth a GPU, in order of value.")
    parser.add_argument("--minutes", type=float, default=13, help="time for all parts together (default 13)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the parts, with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, files in runs/gpu-quick: does it run?")
    parser.add_argument("--carry", action="store_true", help="fill .gpu/ with model, data and wheels instead")
    parser.add_argument("--unpack", action="store_true", help="only unpack what this call carried, for a later one")
    parser.add_argument("--python", default="3.12", help="Python of the machine that .gpu/ is for (default 3.12)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.carry: return carry(args.python) or 0
    if args.part:
        sys.path.insert(0, str(ROOT))
        {"tests": run_tests, "engine": run_engine}.get(args.part, run_comparison)(args, args.target)
        return 0
    print(unpack_all(), flush=True)
    if args.unpack: return 0
    check_machine(args.device)
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
