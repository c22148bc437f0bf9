"""Run contenders here and print what was measured, in JSON: `python worker.py '{"contenders": [...], ...}'`."""

import json
import logging
import os
import sys
import warnings

if __name__ == "__main__":          # before torch reads them
    SPEC = json.loads(sys.argv[1])
    os.environ.setdefault("OMP_NUM_THREADS", str(SPEC["threads"]))
    warnings.filterwarnings("ignore")

import measure  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import workloads  # noqa: E402
from contenders import CONTENDERS  # noqa: E402

def warm_up(names: list[str], device: str, dtype: torch.dtype) -> None:
    "One step of each contender on a tiny model: libraries loaded, code paths seen, nothing of it left in memory."
    shape = workloads.SHAPES["tiny"]
    for name in names:
        policy, reference = workloads.make_models(shape, 0, device, dtype)
        batch = workloads.make_batch(workloads.HH_LENGTHS[shape.pairs], shape.vocab, 0, device)
        measure.run_step(CONTENDERS[name].build(policy, reference, batch), policy, device)


def read(spec: dict, dtype: torch.dtype) -> tuple:
    "(policy, reference, batch): from the file, or drawn from the seed where the weights are too many to be stored."
    if "file" in spec: return workloads.load(spec["file"], spec["device"], dtype)
    shape = workloads.SHAPES[spec["shape"]]
    shape = shape._replace(vocab=spec.get("vocab", shape.vocab))
    lengths = spec.get("lengths") or workloads.HH_LENGTHS[shape.pairs]
    batch = workloads.make_batch(lengths, shape.vocab, spec["seed"], spec["device"])
    return *workloads.make_models(shape, spec["seed"], spec["device"], dtype), batch


def first_step(loss_fn, policy, device: str) -> dict:
    "The warm-up step, which also gives the peak, the loss and a sketch of the gradient."
    policy.zero_grad(set_to_none=True)
    with measure.Peak(device) as peak: seconds, loss = measure.run_step(loss_fn, policy, device)
    weights = sum(p.grad.nbytes for p in policy.parameters())
    return {"first_s": seconds, "peak": peak.bytes, "gradient_bytes": weights, "loss": loss,
            "gradient": measure.gradient_sketch(policy), "times": []}


def run(spec: dict) -> dict:
    "Measure the contenders of a spec, round by round when there are several."
    device, dtype = spec["device"], getattr(torch, spec["dtype"])
    warm_up(spec["contenders"], device, dtype)
    policy, reference, batch = read(spec, dtype)
    steps = {name: CONTENDERS[name].build(policy, reference, batch) for name in spec["contenders"]}
    results = {name: first_step(step, policy, device) for name, step in steps.items()}
    for i in range(spec["repeats"]):
        order = list(steps)[i % len(steps):] + list(steps)[:i % len(steps)]     # nobody always follows the same one
        for name in order: results[name]["times"].append(measure.run_step(steps[name], policy, device)[0])
    return results


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(SPEC["threads"])
    print("RESULT " + json.dumps(run(SPEC)))
