"""From raw times to a table: medians, ratios against the bars, and whether equal losses are equal."""
import importlib.metadata
import statistics
from pathlib import Path
from typing import NamedTuple

import workloads
from contenders import CONTENDERS

median = statistics.median


class Bar(NamedTuple):
    "A ratio (or a number of MB) and what it should not exceed, one bar for each shape."

    what: str
    top: str                            # contender
    bottom: str | None                  # contender; None: the value itself
    bars: tuple[float | None, ...]      # for the first and the second shape
    field: str = "time"                 # time or peak
    allocator: str = "default"
    section: str = "step"


CPU = (
    Bar("DPO step / TRL 1.16 compact", "own-dpo", "trl-1.16-compact", (0.30, 0.22)),
    Bar("the same, page-keeping allocator", "own-dpo", "trl-1.16-compact", (0.45, 0.50), allocator="keeping"),
    Bar("DPO step / TRL 1.10", "own-dpo", "trl-1.10", (0.09, 0.04)),
    Bar("DPO step / Liger", "own-dpo", "liger", (None, None)),
    Bar("DPO step / DPO from TRL's kernels", "own-dpo", "dpo-tiles", (None, None)),
    Bar("TDPO2 step / own DPO, interleaved", "own-tdpo2", "own-dpo", (1.05, 1.15), section="losses"),
    Bar("TBPO-A step / own DPO, interleaved", "own-tbpo_a", "own-dpo", (1.05, 1.15), section="losses"),
    Bar("TDPO2 step / released computation", "own-tdpo2", "tdpo-released", (0.09, 0.055)),
    Bar("TDPO2 step / TDPO2 from TRL's kernels", "own-tdpo2", "tdpo-tiles", (0.20, 0.14)),
    Bar("TDPO2 peak / released computation", "own-tdpo2", "tdpo-released", (0.06, 0.015), "peak"),
    Bar("TDPO2 peak, recomputed / released", "own-recompute-tdpo2", "tdpo-released", (0.06, 0.015), "peak"),
    Bar(
        "TDPO2 step / TDPO2 from TRL's kernels, pages kept",
        "own-tdpo2",
        "tdpo-tiles",
        (None, None),
        allocator="keeping",
    ),
    Bar(
        "TDPO2 step / released computation, pages kept", "own-tdpo2", "tdpo-released", (None, None), allocator="keeping"
    ),
    Bar("DPO peak / TRL 1.16 compact", "own-dpo", "trl-1.16-compact", (0.20, 0.20), "peak"),
    Bar("DPO step, 256 MiB for scores / TRL 1.16 compact", "own-roomy-dpo", "trl-1.16-compact", (0.30, 0.22)),
    Bar(
        "TDPO2 step / own DPO, 256 MiB for scores, interleaved",
        "own-roomy-tdpo2",
        "own-roomy-dpo",
        (1.05, 1.15),
        section="losses",
    ),
)
CUDA_SHAPES = ("llama-1b", "llama-1b-long", "smollm-135m")
CUDA = (
    Bar("DPO step / TRL 1.16", "own-dpo", "trl-1.16", (0.40, 0.50, 0.40)),
    Bar("DPO step, layers compiled / TRL 1.16", "own-compiled-dpo", "trl-1.16", (0.40, 0.50, 0.40)),
    Bar("TDPO2 step, layers compiled / TRL 1.16 DPO", "own-compiled-tdpo2", "trl-1.16", (0.50, 0.50, 0.50)),
    Bar("DPO step / Liger", "own-dpo", "liger", (None, None, None)),
    Bar("TDPO2 step / own DPO", "own-tdpo2", "own-dpo", (1.05, 1.05, 1.05)),
    Bar("TBPO-A step / own DPO", "own-tbpo_a", "own-dpo", (1.05, 1.05, 1.05)),
    Bar("TDPO2 step / released computation", "own-tdpo2", "tdpo-released", (None, None, None)),
    Bar("TDPO2 step / TDPO2 from TRL's kernels", "own-tdpo2", "tdpo-tiles", (None, None, None)),
    Bar("DPO peak / TRL 1.16", "own-dpo", "trl-1.16", (0.40, 0.50, None), "peak"),
)
PROMPT_BARS = {32: 0.95, 512: 0.60, 1024: 0.58}


def find(runs: list[dict], **what) -> dict | None:
    "The first run whose fields are these."
    return next((run for run in runs if all(run.get(k) == v for k, v in what.items())), None)


def spread(tops: list[float], bottoms: list[float], paired: bool) -> tuple[float, float, float]:
    "(ratio, low, high): of medians, with the quartiles at their worst; of rounds where the two took turns."
    if paired:
        ratios = sorted(t / b for t, b in zip(tops, bottoms, strict=True))
        return median(ratios), *_quartiles(ratios)
    (t1, t3), (b1, b3) = _quartiles(tops), _quartiles(bottoms)
    return median(tops) / median(bottoms), t1 / b3, t3 / b1


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2: return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def one_ratio(runs: list[dict], bar: Bar, shape: str, limit: float | None) -> dict | None:
    "A line of the table for one shape, or None if something was not run."
    where = dict(section=bar.section, shape=shape, allocator=bar.allocator)
    top, bottom = (find(runs, contender=name, **where) for name in (bar.top, bar.bottom))
    if not (top and bottom and (bar.field == "peak" or top["times"] and bottom["times"])): return None
    if bar.field == "peak": ratio = low = high = top["peak"] / bottom["peak"]
    else: ratio, low, high = spread(top["times"], bottom["times"], paired=bar.section == "losses")
    return {"what": bar.what, "shape": shape, "ratio": ratio, "low": low, "high": high, "bar": limit,
            "met": None if limit is None else ratio <= limit}


def ratios(runs: list[dict], device: str) -> list[dict]:
    "All ratios between contenders."
    bars, shapes = (CUDA, CUDA_SHAPES) if device == "cuda" else (CPU, ("32k", "128k"))
    rows = [
        one_ratio(runs, bar, shape, limit)
        for bar in bars
        for shape, limit in [*zip(shapes, bar.bars, strict=False), ("tiny", None)]
    ]
    return [row for row in rows if row]


def prompt_ratios(runs: list[dict]) -> list[dict]:
    "Shared over unshared prompts, by prompt length."
    rows = []
    for n in dict.fromkeys(r["prompt"] for r in runs if r["section"] == "prompt"):
        top, bottom = (find(runs, section="prompt", prompt=n, contender=c) for c in ("own-dpo", "own-unshared-dpo"))
        ratio, low, high = spread(top["times"], bottom["times"], paired=True)
        limit = PROMPT_BARS.get(n)
        rows.append({"what": f"shared prompt / unshared, prompt {n}", "shape": top["shape"], "ratio": ratio, "low": low,
                     "high": high, "bar": limit, "met": None if limit is None else ratio <= limit})
    return rows


def head_workspace(runs: list[dict], device: str) -> dict | None:
    "MB that the head adds to a step: its peak without gradients of [V, H], above that of a vocabulary of 128."
    head = [r for r in runs if r["section"] == "head"]
    bare = lambda r: (r["peak"] - r["gradient_bytes"]) / 1e6
    base = {r["response"]: bare(r) for r in head if r["vocab"] == 128}
    cells = [{"vocab": r["vocab"], "response": r["response"], "mb": bare(r) - base[r["response"]]} for r in head
             if r["vocab"] != 128 and r["response"] in base]
    if not cells: return None
    worst, limit = max(c["mb"] for c in cells), 1074 if device == "cuda" else 64
    return {"cells": cells, "worst_mb": worst, "bar": limit, "met": worst <= limit}


def token_slopes(runs: list[dict]) -> list[dict]:
    "MB of peak for each further response token."
    rows, slope = [], [r for r in runs if r["section"] == "slope"]
    for name in dict.fromkeys(r["contender"] for r in slope):
        measured = sorted((r for r in slope if r["contender"] == name), key=lambda r: r["response"])
        if len(measured) < 2: continue      # the benchmark is still under way
        few, many = measured
        tokens = sum(c + j for _, c, j in many["lengths"]) - sum(c + j for _, c, j in few["lengths"])
        limit = 0.14 if name.startswith("own") and few["shape"] == "32k" else None
        value = (many["peak"] - few["peak"]) / 1e6 / tokens
        rows.append({"contender": name, "shape": few["shape"], "mb_per_token": value, "bar": limit,
                     "met": None if limit is None else value <= limit})
    return rows


def agreement(runs: list[dict], tolerance: float) -> dict[str, dict]:
    "For each family and shape: the largest difference of two losses, and of two gradients relative to their norm."
    found = {}
    for run in (r for r in runs if r["section"] == "step" and r["allocator"] == "default"):
        found.setdefault(f"{CONTENDERS[run['contender']].family}, {run['shape']}", []).append(run)
    checks = {}
    for key, group in found.items():
        losses, gradients = [r["loss"] for r in group], [r["gradient"] for r in group]
        first = gradients[0]
        apart = max(max(abs(a - b) for a, b in zip(g, first, strict=True)) / first[0] for g in gradients)
        checks[key] = {
            "contenders": len(group),
            "loss": max(losses) - min(losses),
            "gradient": apart,
            "tolerance": tolerance,
            "agrees": max(losses) - min(losses) <= tolerance,
        }
    return checks


def operations(shape: workloads.Shape, lengths) -> dict[str, float]:
    "Multiply-adds, times two, that a step needs: each token once, the head at response tokens, four products of it."
    kv = (shape.kv_heads or shape.heads) / shape.heads
    weights = (
        shape.layers
        * shape.hidden
        * (shape.hidden * (2 + 2 * kv) + (3 if shape.family == "llama" else 2) * shape.inner)
    )
    tokens, responses = sum(map(sum, lengths)), sum(c + r for _, c, r in lengths)
    seen = sum(p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in pair) for p, *pair in lengths)
    return {"body": 8 * weights * tokens, "attention": 16 * shape.layers * shape.hidden * seen,
            "head": 8 * shape.vocab * shape.hidden * responses}


def floors(runs: list[dict], rate: float) -> dict[str, dict]:
    "The operations of a step at the measured dense rate, and what share of that rate the engine reaches."
    out, ours = {}, ("own-dpo", "own-tdpo2", "own-compiled-dpo", "own-compiled-tdpo2")
    for run in (r for r in runs if r["section"] == "step" and r["allocator"] == "default" and r["contender"] in ours):
        shape = workloads.SHAPES[run["shape"]]
        parts = operations(shape, workloads.HH_LENGTHS[shape.pairs])
        floor = sum(parts.values()) / rate
        out.setdefault(run["shape"], {**parts, "floor_s": floor})[f"share, {run['contender']}"] = floor / median(
            run["times"]
        )
    return out


def summary(runs: list[dict], rate: float, device: str) -> dict:
    "All that is said about the runs."
    return {
        "agreement": agreement(runs, 1e-4 if device == "cpu" else 5e-2),
        "ratios": ratios(runs, device) + prompt_ratios(runs),
        "head_workspace": head_workspace(runs, device),
        "token_slopes": token_slopes(runs),
        "floors": floors(runs, rate),
    }


def peer_versions(peers: Path) -> dict[str, str]:
    "Versions of the peers that are installed, by the name of their folder."
    found = {}
    for folder in sorted(peers.iterdir()) if peers.is_dir() else ():
        for dist in importlib.metadata.distributions(path=[str(folder)]): found[f"peer {folder.name}"] = dist.version
    return found


def in_brief(result: dict) -> str:
    "Time and peak of one contender, for the line that says it is done."
    peak = f" {result['peak'] / 1e6:.0f} MB" if result["peak"] else ""
    return f"{1000 * median(result['times'] or [result['first_s']]):.0f} ms{peak}"


def _verdict(met: bool | None) -> str: return {None: "", True: "met", False: "NOT met"}[met]


def _steps(runs: list[dict]) -> list[str]:
    "Median milliseconds and peak of every contender."
    lines, runs = [], [r for r in runs if r["section"] == "step"]
    for shape in dict.fromkeys(r["shape"] for r in runs):
        lines += ["", f"{shape:46} {'ms':>9} {'quartiles':>17} {'peak MB':>9} {'ms, pages kept':>15}"]
        for run in (r for r in runs if r["shape"] == shape and r["allocator"] == "default"):
            kept = find(runs, shape=shape, contender=run["contender"], allocator="keeping")
            middle, low, high = (1000 * t for t in (median(run["times"]), *_quartiles(run["times"])))
            label, pages = CONTENDERS[run["contender"]].label, f"{1000 * median(kept['times']):15.1f}" if kept else ""
            lines.append(f"{label:46} {middle:9.1f} {low:8.1f}-{high:<8.1f} {run['peak'] / 1e6:9.1f} {pages}")
    return lines


def text(result: dict) -> str:
    "The table to print."
    lines = [""]
    for key, c in result["agreement"].items():
        verdict = "agree" if c["agrees"] else "DISAGREE"
        lines.append(
            f"{key}: {c['contenders']} losses within {c['loss']:.1e}, gradients within {c['gradient']:.1e}: {verdict}"
        )
    lines += _steps(result["runs"]) + ["", f"{'':52} {'shape':12} {'ratio':>7} {'quartiles':>15} {'bar':>7}"]
    for r in result["ratios"]:
        measured = f"{r['ratio']:7.3f} {r['low']:7.3f}-{r['high']:<7.3f}"
        lines.append(f"{r['what']:52} {r['shape']:12} {measured} {r['bar'] or '-':>7} {_verdict(r['met'])}")
    if (head := result["head_workspace"]):
        cells = ", ".join(f"{c['vocab'] // 1024}k x {c['response']}: {c['mb']:.0f}" for c in head["cells"])
        lines.append(f"head workspace, MB (vocabulary x response): {cells}; bar {head['bar']} {_verdict(head['met'])}")
    for r in result["token_slopes"]:
        label, verdict = CONTENDERS[r["contender"]].label, f"(bar {r['bar']}) {_verdict(r['met'])}" if r["bar"] else ""
        lines.append(f"peak per further response token, {label}, {r['shape']}: {r['mb_per_token']:.3f} MB {verdict}")
    for shape, f in result["floors"].items():
        shares = ", ".join(f"{k.removeprefix('share, ')} {v:.0%}" for k, v in f.items() if k.startswith("share"))
        rate, wanted = (
            f"{result['dense_rate'] / 1e9:.0f} GFLOP/s",
            " (bar 50%)" if result["config"]["device"] == "cuda" else "",
        )
        lines.append(
            f"{shape}: operations alone take {1000 * f['floor_s']:.0f} ms at {rate}; reached: {shares}{wanted}"
        )
    return "\n".join(lines)
