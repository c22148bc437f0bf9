"""How many operations of a training step would be launches on a GPU, counted on a CPU: `python benchmarks/launches.py`.

A step of a small model on a GPU costs what its launches cost, not what they compute. So this counts them, without a
GPU: a model of 16 narrow layers in the layout of `llama-1b` takes the way of a GPU, and every operation that PyTorch
dispatches counts as one launch, but for those that only look at a tensor in another way or reserve memory. A call of
FlashAttention and a call of one of our kernels count as one; what the plan of a batch does on the CPU does not count.
Printed, as one line of JSON at the end:

- body: policy forward and backward and reference forward of one packed row, and nothing else;
- dpo_8, dpo_32: a step of DPO on 8 and on 32 pairs; tdpo2_8: a step of TDPO2 on 8;
- trl_8: TRL's DPO step on the same 8 pairs, where TRL is installed (see benchmarks/README.md);
- waits_8: how often a step of DPO asks the device for a number, besides the one copy that its plan needs;
- compiled_body, compiled_8 (only with --compiled, which takes a C++ compiler and a minute): `body` and `dpo_8` with
  compiled layers. Inductor's code for a layer is read, and its calls are counted: products, fused loops, attention.

`--out FILE` writes them to a file too.
"""
import argparse
import contextlib
import copy
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import workloads  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

from tokpref import LOSSES  # noqa: E402
from tokpref.engine import attention, gradients, in_place, kernels, one_pass, packing, trial  # noqa: E402
from tokpref.models import compile_layers  # noqa: E402

PEERS = Path(os.environ.get("TOKPREF_PEERS") or Path(sys.prefix) / "peers")
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "resize_",
}
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
}


def _is_view(operation) -> bool:
    "Whether an operation only looks at its input in another way."
    returns = operation._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class Launches(TorchDispatchMode):
    "Counts operations that would be launches, and those that would wait for the device."

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name not in FREE and not _is_view(operation): self.count += 1
        self.waits += name in WAITS
        return operation(*args, **(kwargs or {}))


def one_launch(function: Callable, counter: list[Launches]) -> Callable:
    "The function as one launch, whatever it does inside."
    @functools.wraps(function)
    def call(*args, **kwargs):
        if counter: counter[-1].count += 1
        with _disable_current_modes(): return function(*args, **kwargs)
    return call


def on_the_host(function: Callable) -> Callable:
    "The function uncounted: on a GPU it works on the CPU, after one copy."
    @functools.wraps(function)
    def call(*args, **kwargs):
        with _disable_current_modes(): return function(*args, **kwargs)
    return call


@contextlib.contextmanager
def way_of_a_gpu(counter: list[Launches]) -> Iterator[None]:
    "Inside, the engine does on a CPU what it does on a GPU, with plain functions for FlashAttention and the kernels."
    changes = [(trial, "BRANCHES_ON_CPU", True),
               (in_place, "on_cpu", lambda device: False), (gradients, "on_cpu", lambda device: False),
               (kernels, "usable", lambda device, dtype: True),
               *((one_pass, name, on_the_host(getattr(one_pass, name))) for name in ("plan", "plan_tiles")),
               *((attention, name, one_launch(getattr(attention, name), counter))
                 for name in ("_forward_call", "_backward_call")),
               (kernels, "fused_statistics", one_launch(kernels.plain_statistics, counter)),
               (kernels, "fused_gradient", one_launch(kernels.plain_gradient, counter))]
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes: setattr(module, name, value)
    try: yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True): setattr(module, name, value)


def counted(step: Callable[[], Tensor], policy: nn.Module, counter: list[Launches]) -> Launches:
    "What the second of two steps launches; the first has tried what needs trying."
    mode = Launches()
    for _ in range(2):
        policy.zero_grad(set_to_none=True)
        mode = Launches()
        counter.append(mode)
        with mode: step().backward()
        counter.pop()
    return mode


def body(policy: nn.Module, reference: nn.Module, batch: dict) -> Callable[[], Tensor]:
    "Both models on one packed row, and the policy's way back, from states to weights."
    packed = packing.pack_pairs(batch, layout="branches")

    def step() -> Tensor:
        with attention.packed_attention(packed, policy, reference):
            with torch.no_grad(): reference.model(**attention.packed_inputs(packed, reference), use_cache=False)
            return policy.model(**attention.packed_inputs(packed, policy), use_cache=False).last_hidden_state.sum()
    return step


def models_and_batch(name: str) -> tuple[nn.Module, nn.Module, dict]:
    "An eighth of the tokens of real pairs: what is launched does not depend on their number."
    shape = workloads.SHAPES[name]
    lengths = [tuple(max(1, tokens // 8) for tokens in pair) for pair in workloads.HH_LENGTHS[shape.pairs]]
    batch = workloads.make_batch(lengths, shape.vocab, 1)
    return *workloads.make_models(shape, 1), batch


def own(loss: str, name: str, counter: list[Launches]) -> Launches:
    "A step of tokpref."
    policy, reference, batch = models_and_batch(name)
    return counted(lambda: one_pass.pair_loss(policy, reference, batch, LOSSES[loss]).loss, policy, counter)


def trl(counter: list[Launches]) -> int | None:
    "A step of TRL's DPO trainer; None where TRL is not installed."
    if not (PEERS / "trl-1.16").is_dir(): return None
    sys.path.insert(0, str(PEERS / "trl-1.16"))
    import contenders
    policy, reference, batch = models_and_batch("launches")
    step = contenders.trl_dpo(policy, reference, batch, compact=True)
    return counted(step, policy, counter).count


def compiled_layer(policy: nn.Module, reference: nn.Module, batch: dict) -> int:
    "Launches of one layer: of both models' forward pass and the policy's backward pass, as Inductor wrote them."
    from torch._inductor.utils import run_and_get_code  # takes seconds to import
    for model in (policy, reference): compile_layers(model, fullgraph=True)
    _, programs = run_and_get_code(lambda: body(policy, reference, batch)().backward())
    if len(programs) != 3: raise RuntimeError(f"{len(programs)} programs for all layers, where three were expected")
    calls = r"^ +(?:\w+ = )?(?:extern_kernels\.\w+|cpp_fused\w*|torch\.ops\.tokpref\.\w+\.default)\("
    return sum(len(re.findall(calls, program, re.MULTILINE)) for program in programs)


def compiled_counts(counts: dict, counter: list[Launches]) -> dict[str, int]:
    "The same steps with compiled layers; what stands around the layers stays."
    policy, reference, batch = models_and_batch("launches")
    shorter: list[Any] = copy.deepcopy([policy, reference])
    layers = len(shorter[0].model.layers)
    for model in shorter: del model.model.layers[layers // 2:]
    half = counted(body(*shorter, batch), shorter[0], counter).count
    plain = (counts["body"] - half) // (layers - layers // 2)
    saved = layers * (plain - compiled_layer(policy.bfloat16(), reference.bfloat16(), batch))
    return {"compiled_body": counts["body"] - saved, "compiled_8": counts["dpo_8"] - saved}


def main(compiled: bool = False) -> dict[str, int | None]:
    counter: list[Launches] = []
    with way_of_a_gpu(counter):
        policy, reference, batch = models_and_batch("launches")
        counts: dict[str, int | None] = {"body": counted(body(policy, reference, batch), policy, counter).count}
        dpo = own("dpo", "launches", counter)
        counts |= {"dpo_8": dpo.count, "dpo_32": own("dpo", "launches-32", counter).count,
                   "tdpo2_8": own("tdpo2", "launches", counter).count}
    with way_of_a_gpu([]): counts |= compiled_counts(counts, counter) if compiled else {}
    return counts | {"trl_8": trl(counter), "waits_8": dpo.waits}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Launches of a training step on a GPU, counted on a CPU.")
    parser.add_argument("--compiled", action="store_true", help="count steps with compiled layers too")
    parser.add_argument("--out", type=Path, help="write the counts to this file too")
    args = parser.parse_args()
    result = json.dumps(main(args.compiled))
    if args.out: args.out.write_text(result + "\n", encoding="utf-8")
    print(result)
