"""The engine beside public peers: `make bench`, or `python benchmarks/engine.py [--quick] [--device cuda]`.

One step is policy forward, reference forward, loss, backward. Every contender runs in its own process on the same
weights and the same batch, read from a file; losses that should be one number are compared; times are medians after a
warm-up step; the peak is that of the first full step, above the state before it. Ratios near 1 come from interleaved
steps in one process. Peers are looked for in folders of their own below <environment>/peers, which `make bench` fills,
or below the folder that TOKPREF_PEERS names; one that is missing is left out with a word. `--out FILE` says where the
numbers go.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import report
import torch
import worker
import workloads
from contenders import CONTENDERS

from tokpref.experiments.compare import hardware, versions, write_json

HERE = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("TOKPREF_PEERS") or Path(sys.prefix) / "peers")
PUBLIC = tuple(name for name in CONTENDERS if not name.startswith("own"))
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
PARTS = ["steps", "losses", "prompts", "memory"]
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
FIRST_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
ON_CUDA = (
    "own-dpo",
    "own-tdpo2",
    "own-tbpo_a",
    "own-unshared-dpo",
    "own-compiled-dpo",
    "own-compiled-tdpo2",
    "trl-1.16",
    "liger",
    "tdpo-tiles",
    "tdpo-released",
)
OWN = ("own-dpo", "own-tdpo2", "own-entropy-dpo", "own-roomy-dpo", "own-roomy-tdpo2", "own-recompute-tdpo2",
       "own-unshared-dpo", "own-plain-dpo")
LOSSES = ("own-dpo", "own-tdpo2", "own-tbpo_a", "own-roomy-dpo", "own-roomy-tdpo2")
KEEPING = (
    "own-dpo",
    "own-tdpo2",
    *(n for n in PUBLIC if n != "trl-1.16"),
)  # with an allocator that keeps its pages too
FULL = ("own-dpo", "trl-1.16-compact")      # the two that a bar compares under it; the others get three steps


def available(names) -> list[str]:
    "Those contenders that exist in this version and whose package is installed."
    return [
        n for n in names if n in CONTENDERS and (CONTENDERS[n].peer is None or (PEERS / CONTENDERS[n].peer).is_dir())
    ]


def in_a_process(spec: dict, allocator: str) -> dict:
    "What a worker measures for a spec, in a fresh process that sees the peer's folder. `RuntimeError` if it fails."
    peers = {CONTENDERS[n].peer for n in spec["contenders"]} - {None}
    paths = [str(PEERS / peer) for peer in sorted(peers)] + [p for p in (os.environ.get("PYTHONPATH"),) if p]
    own = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(spec["threads"]),
        "CUDA_VISIBLE_DEVICES": FIRST_GPU,
    }
    env = os.environ | QUIET | measure.ALLOCATORS[allocator] | own
    done = subprocess.run(
        [sys.executable, str(HERE / "worker.py"), json.dumps(spec)], capture_output=True, text=True, env=env
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None: raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1][:300])
    return json.loads(line.removeprefix("RESULT "))


class Bench:
    "One run of the benchmark: its settings, its working folder, and the results so far."

    def __init__(self, args: argparse.Namespace, folder: Path, rate: float):
        self.args, self.folder, self.runs, self.failed, self.started = args, folder, [], [], time.time()
        self.dtype, self.rate = DTYPES[args.device], rate

    def child(self, section: str, names: list[str], repeats: int, allocator: str = "default", **what) -> None:
        "Run contenders in one fresh process and keep what it measured; say so if it failed."
        spec = {
            "contenders": names,
            "repeats": repeats,
            "device": self.args.device,
            "dtype": self.dtype,
            "seed": self.args.seed,
            "threads": self.args.threads,
            **what,
        }
        label = f"{section:8} {what['shape']:12} {allocator:8} {' '.join(names)}"
        here = self.args.device != "cpu" or (self.args.quick and self.runs)
        try: results = worker.run(spec) if here else in_a_process(spec, allocator)
        except RuntimeError as error:
            self.failed.append(f"{label}: {error}")
            return print(f"{label}: failed: {error}", flush=True)
        kept = {k: v for k, v in what.items() if k != "file"}
        for name, result in results.items():
            shared = len(results) > 1 and self.args.device == "cpu"
            if shared: result["peak"] = None  # of several in one process only the first starts from a clean state
            self.runs.append(
                {
                    "section": section,
                    "contender": name,
                    "label": CONTENDERS[name].label,
                    "allocator": allocator,
                    **kept,
                    **result,
                }
            )
        print(
            f"{time.time() - self.started:5.0f} s  {label}: {', '.join(map(report.in_brief, results.values()))}",
            flush=True,
        )
        self.save()

    def result(self, rate: float) -> dict:
        "All that is known so far, with the dense rate of the machine."
        args = self.args
        config = {k: v for k, v in vars(args).items() if k != "out"} | {
            "dtype": self.dtype,
            "allocators": measure.ALLOCATORS,
        }
        return {
            "benchmark": "engine",
            "config": config,
            "versions": versions() | report.peer_versions(PEERS),
            "hardware": hardware() | {"vectors": torch.backends.cpu.get_cpu_capability()},
            "dense_rate": rate,
            "seconds": round(time.time() - self.started),
            **report.summary(self.runs, rate, args.device),
            "shapes": {n: s._asdict() for n, s in workloads.SHAPES.items()},
            "lengths": workloads.HH_LENGTHS,
            "tokens": {n: workloads.token_counts(v) for n, v in workloads.HH_LENGTHS.items()},
            "failed": self.failed,
            "runs": self.runs,
        }

    def save(self) -> None:
        "Write what there is, so that a run that is cut off leaves what it measured."
        if self.args.out: write_json(self.args.out, self.result(self.rate))

    def steps(self, shapes: list[str], names: tuple[str, ...]) -> None:
        "Each contender on each shape, in its own process; on a CPU once more with the other allocator."
        if self.args.device != "cpu": return self.steps_on_an_accelerator(shapes, available(names))
        for shape in shapes:
            for name in available(names):
                self.child("step", [name], min(CONTENDERS[name].most, self.args.repeats), **self.source(shape))
            for name in available(n for n in KEEPING if n in names and self.args.device == "cpu"):
                repeats = self.args.repeats if name in FULL else min(3, self.args.repeats)
                self.child("step", [name], repeats, "keeping", **self.source(shape))

    def steps_on_an_accelerator(self, shapes: list[str], names: list[str]) -> None:
        """All contenders of a shape in this process, taking turns: the allocator of a GPU counts for each alone.

        Compiled ones stand apart, since a model stays compiled.
        """
        sys.path += [str(PEERS / peer) for peer in sorted({CONTENDERS[name].peer for name in names} - {None})]
        compiled = [name for name in names if "compiled" in name]
        for shape in shapes:
            self.child(
                "step", [name for name in names if name not in compiled], self.args.repeats, **self.source(shape)
            )
        for shape in shapes if compiled else (): self.child("step", compiled, self.args.repeats, **self.source(shape))

    def source(self, shape: str) -> dict:
        "Where a worker finds weights and batch: a file; on an accelerator, where they are many, the seed."
        if self.args.device != "cpu": return {"shape": shape}
        path = self.folder / f"{shape}.pt"
        if not path.exists():
            spec = workloads.SHAPES[shape]
            batch = workloads.make_batch(workloads.HH_LENGTHS[spec.pairs], spec.vocab, self.args.seed)
            workloads.save(self.folder, shape, workloads.make_models(spec, self.args.seed), batch)
        return {"shape": shape, "file": str(path)}

    def interleaved(self, shapes: list[str]) -> None:
        "The losses of tokpref against each other, step by step in one process."
        for shape in shapes:
            self.child("losses", available(LOSSES), max(9, 2 * self.args.repeats), **self.source(shape))

    def prompts(self, shape: str, lengths=(32, 512, 1024)) -> None:
        "A shared prompt encoded once against twice; responses of 80 tokens, all alike, so that neither has padding."
        names = available(("own-dpo", "own-unshared-dpo"))
        if len(names) < 2: return
        for n in lengths:
            self.child("prompt", names, self.args.repeats, shape=shape, lengths=[[n, 80, 80]] * 4, prompt=n)

    def memory(self, vocabularies=(8192, 262_144), lengths=(64, 1024), slope_shape: str = "32k") -> None:
        "Peaks over vocabulary and response length; a vocabulary of 128 shows what the model itself takes."
        own = available(("own-tdpo2",)) or ["own-plain-tdpo2"]
        for n in lengths:
            for vocab in (128, *vocabularies):
                self.child("head", own, 0, shape="narrow", vocab=vocab, lengths=[[16, n, n]], response=n)
        for names, pairs in ((own, (128, 640)), (["tdpo-released"], (32, 96))):
            for n in pairs: self.child("slope", names, 0, shape=slope_shape, lengths=[[64, n, n]] * 4, response=n)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="tokpref's engine beside public peers: time and memory of one training step."
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, tokpref and the released TDPO computation only; a test"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: bfloat16, shapes of 1B and 135M weights"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps of a contender, after the warm-up (default 5)"
    )
    parser.add_argument(
        "--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS") or min(os.cpu_count() or 1, 16))
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and ids (default 1)")
    parser.add_argument("--out", type=Path, help="the results (default results/engine-DEVICE.json; none with --quick)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which parts to run (default: all)")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(workloads.SHAPES), help="models (default: those of the device)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CONTENDERS), help="contenders of the part `steps` (default: all)"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace, folder: Path, rate: float) -> Bench:
    "All parts that were asked for."
    bench, cuda = Bench(args, folder, rate), args.device == "cuda"
    shapes = args.shapes or (["tiny"] if args.quick else list(report.CUDA_SHAPES) if cuda else ["32k", "128k"])
    names = args.only or ((*OWN, "tdpo-released") if args.quick else ON_CUDA if cuda else (*PUBLIC, *OWN))
    for name in sorted(set(names) - set(available(names))):
        print(f"left out: {name} (not installed, or not in this tokpref)")
    if "steps" in args.parts: bench.steps(shapes, names)
    if "losses" in args.parts and not cuda:
        bench.interleaved(shapes)  # on an accelerator all contenders take turns anyway
    if "prompts" in args.parts: bench.prompts(shapes[0], (8, 24) if args.quick else (32, 512, 1024))
    if "memory" in args.parts: bench.memory(*(((512, 1024), (8,), "tiny") if args.quick else ()))
    return bench


def dense_rate(args: argparse.Namespace) -> float:
    "Measured operations a second of a large product in the dtype of this run."
    return measure.gemm_rate(args.device, getattr(torch, DTYPES[args.device]), 128 if args.quick else None)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.quick: args.repeats, args.threads = min(args.repeats, 2), 1
    torch.set_num_threads(args.threads)
    if not args.out and not args.quick: args.out = HERE.parent / "results" / f"engine-{args.device}.json"
    rate = dense_rate(args)
    with tempfile.TemporaryDirectory() as folder: bench = run(args, Path(folder), rate)
    bench.rate = max(rate, dense_rate(args))  # before and after: the better one, should the machine have been busy
    result = bench.result(bench.rate)
    print(report.text(result))
    bench.save()
    return 0 if not bench.failed and all(check["agrees"] for check in result["agreement"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
