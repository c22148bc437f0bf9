"""What is worth a GPU, in order of value: `make gpu`, or `python tools/gpu.py [--minutes 13] [--only PART ...]`.

Each part runs in a process of its own, for at most its share of the time, and ends in one file in results/, or in $OUT
where that is set. What is there already is left alone, a part that fails does not stop the others, and nothing starts
after the time is up; a comparison that was cut off goes on where it stopped. The machine needs torch, transformers,
peft, accelerate, pytest, pandas and pyarrow of its own; what else is missing comes, with the data, from .gpu/, which
`make gpu-data` fills here and which is to be carried there beside the repository. It is unpacked into a folder outside
the checkout, and found there by later calls that do not carry it.
"""
import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / ".gpu"
DATA = ("stanfordnlp/imdb", "openai/gsm8k", "gsm8k-preferences", "alpaca_eval-preferences")
WHEELS = ("datasets", "dill", "multiprocess", "xxhash")     # small, and seldom on a machine for training
OUTSIDE = Path(
    os.environ.get("TOKPREF_GPU_FOLDER") or Path(tempfile.gettempdir()) / "tokpref-gpu"
)  # what was carried, unpacked
LIMIT = 64      # MiB that a machine may take
ALL = 99        # seeds: all of a profile
PEERS = {
    path.stem.removeprefix("requirements-"): path for path in sorted((ROOT / "benchmarks").glob("requirements-*.txt"))
}


class Comparison(NamedTuple):
    "A task and profile of `tokpref compare`, and what is larger here."

    task: str
    profile: str
    overrides: dict


COMPARISONS = {
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
PARTS = {"tests": "cuda-tests.json", "engine": "engine-cuda.json"} | {name: f"{name}-gpu.json" for name in COMPARISONS}
MOST = {"tests": 180, "engine": 420}        # seconds that a part may take; the others share what is left


# What each part does, in its own process

def run_tests(args, target: Path) -> None:
    "tests/test_cuda.py; its counts, and the names of what failed."
    from tokpref.experiments.compare import hardware, versions, write_json
    report = Path(tempfile.mkdtemp()) / "junit.xml"
    env = os.environ | ({"TOKPREF_TEST_DEVICE": "cpu"} if args.device == "cpu" else {})
    picked = ["-k", "float32 and (Llama or dpo) or a_step or samples"] if args.quick else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_cuda.py",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
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
    subprocess.run(
        [sys.executable, "benchmarks/engine.py", "--device", args.device, *options, "--out", target], cwd=ROOT
    )
    if not target.exists(): raise RuntimeError("the benchmark ended without a result")


def run_comparison(args, target: Path) -> None:
    "All losses, for the first seeds."
    import torch

    from tokpref.experiments.compare import compare, comparison_table, find_task, write_json
    torch.set_float32_matmul_precision("high")      # TF32 where a product is not in bfloat16 anyway
    task, profile, overrides = COMPARISONS[args.part]
    if args.quick: profile, overrides = "smoke", {"losses": ["dpo", "tdpo2"], "seeds": [0, 1]}
    _, config = find_task(task).configure(profile, overrides)
    seeds = config.seeds[:args.seeds]
    folder = ROOT / "runs" / f"gpu-{'quick-' * args.quick}{task}"
    record = compare(task, profile, seeds=seeds, out=folder, overrides=overrides, progress=sys.stderr.isatty())
    complete = len(seeds) == len(config.seeds)
    write_json(target, record | {"profile": "gpu", "of": profile, "float32_matmul": "tf32", "complete": complete})
    print(comparison_table(record))


# The machine and what is carried to it

def environment() -> dict:
    "The variables of every part: this folder first, then what was carried."
    carried = OUTSIDE / "data"
    data = os.environ.get("TOKPREF_DATA") or (str(carried) if carried.is_dir() else "")
    paths = [str(ROOT), str(OUTSIDE / "site"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
           "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg",
           "TOKPREF_PEERS": str(OUTSIDE / "peers")}
    return os.environ | own | ({"TOKPREF_DATA": data} if data else {})


def unpack(wheels: list[Path], folder: Path) -> None:
    "Install wheels, and nothing that they ask for, into a folder."
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--target",
        str(folder),
    ]
    subprocess.run([*pip, *map(str, wheels)], check=True)


def download(what: list, folder: Path, python: str) -> None:
    "Wheels of packages, and of nothing that they ask for, for another Python on Linux."
    names = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    systems = [part for name in names for part in ("--platform", f"{name}_x86_64")]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run(
        [*pip, "--python-version", python, "--implementation", "cp", *systems, "-d", folder, *what], check=True
    )


def install(device: str) -> None:
    "Unpack what was carried, outside the checkout. Exits with a word if something that is needed is missing."
    wheels = [
        wheel
        for wheel in sorted((CARRIED / "wheels").glob("*.whl"))
        if not importlib.util.find_spec(wheel.name.split("-")[0])
    ]
    if wheels and not (OUTSIDE / "site").is_dir(): unpack(wheels, OUTSIDE / "site")
    for folder in sorted((CARRIED / "peers").glob("*")):
        if not (OUTSIDE / "peers" / folder.name).is_dir():
            unpack(sorted(folder.glob("*.whl")), OUTSIDE / "peers" / folder.name)
    if (CARRIED / "data").is_dir(): shutil.copytree(CARRIED / "data", OUTSIDE / "data", dirs_exist_ok=True)
    imported = [sys.executable, "-c", "import tokpref.experiments.compare"]
    done = subprocess.run(imported, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tokpref can't be imported here: {done.stderr.strip().splitlines()[-1]}\n"
                 "fill .gpu/ with `make gpu-data` and carry it along")
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        sys.exit("no GPU is to be seen here; --device cpu --quick tries the parts without one")


def mebibytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


def carry(python: str) -> None:
    "Fill .gpu/ with data and wheels, and say how large it is."
    source = os.environ.get("TOKPREF_DATA")
    if not source: sys.exit("set TOKPREF_DATA to the folder with the data")
    shutil.rmtree(CARRIED, ignore_errors=True)
    for name in DATA: shutil.copytree(Path(source) / name, CARRIED / "data" / name, copy_function=shutil.copyfile)
    download(list(WHEELS), CARRIED / "wheels", python)
    for name, path in PEERS.items(): download(["-r", path], CARRIED / "peers" / name, python)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sizes = {"data": mebibytes((CARRIED / "data").rglob("*")), "wheels": mebibytes(CARRIED.rglob("*.whl")),
             "repository": mebibytes(ROOT / name for name in listed.split("\0") if name)}
    parts = ", ".join(f"{name} {size:.1f} MiB" for name, size in sizes.items())
    print(f".gpu/ is ready for Python {python}: {parts}; {sum(sizes.values()):.1f} of {LIMIT} MiB in all")


# All parts

def finished(target: Path, seeds: int) -> bool:
    "Whether a result is there, without failures and with so many seeds, or with all."
    if not target.exists(): return False
    record = json.loads(target.read_text(encoding="utf-8"))
    return not record.get("broken") and (record.get("complete", True) or len(record["seeds"]) >= seeds)


def in_a_process(name: str, seeds: int, args, target: Path, seconds: float) -> str:
    "Run one part for at most so long; how it ended."
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--device",
        args.device,
        "--seeds",
        str(seeds),
        "--target",
        target,
    ]
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
    "Every part wanted and not there, comparisons first with one seed and then with all; a line for each at the end."
    out = ROOT / "runs" / "gpu-quick" if args.quick else Path(os.environ.get("OUT") or ROOT / "results")
    if args.quick: shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes
    wanted = args.only or list(PARTS)
    lines = []
    for name, seeds in [(name, 1) for name in wanted] + [(name, ALL) for name in wanted if name in COMPARISONS]:
        target, start = out / PARTS[name], time.monotonic()
        left = ends - start
        if any(finished(folder / PARTS[name], seeds) for folder in ([out] if args.quick else [out, ROOT / "results"])):
            how = "there already"
        elif left < 20: how = "not started; the time is up"
        else:
            print(f"\n== {name}, {left / 60:.1f} minutes left", flush=True)
            most = float(MOST.get(name) or left)
            how = in_a_process(name, seeds, args, target, min(left, most))
        what = name + (", all seeds" if seeds == ALL else ", one seed" if name in COMPARISONS else "")
        file = PARTS[name] if target.exists() else ""
        lines.append(f"{what:<26} {how:<28} {time.monotonic() - start:>6.0f} s   {file}")
    print(f"\n{'part':<26} {'':<28} {'':>8}   file in {out.name}/", *lines, sep="\n")
    return int(any("failed" in line for line in lines))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that is worth a GPU, in order of value.")
    parser.add_argument("--minutes", type=float, default=13, help="time for all parts together (default 13)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the parts, with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, files in runs/gpu-quick: does it run?")
    parser.add_argument("--carry", action="store_true", help="fill .gpu/ with data and wheels instead")
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
    install(args.device)
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
