"""Gradients of a few pairs on two processes, with and without FSDP2; test_distributed.py runs it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from tokpref.engine import pair_loss
from tokpref.engine.forward import full_logits_reason
from tokpref.losses import LOSSES

def make_model(tied: bool, shift: float = 0.0) -> LlamaForCausalLM:
    "The same on every process; `shift` moves its weights at random."
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters(): parameter.add_(shift * torch.randn_like(parameter))
    return model


def sharded(model: LlamaForCausalLM, **options) -> LlamaForCausalLM:
    for layer in model.model.layers: fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    "Three pairs with prompts of four tokens; other pairs for another seed."
    ids = torch.randint(1, 31, (6, 10), generator=torch.Generator().manual_seed(seed))
    ids[3:, :4] = ids[:3, :4]
    mask = torch.ones_like(ids)
    return dict(input_ids=ids, attention_mask=mask, completion_mask=mask * (torch.arange(10) >= 4))


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    "The mean over the processes, whole on each of them."
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        assert gradient is not None
        if hasattr(gradient, "full_tensor"): gradients[name] = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
            gradients[name] = gradient / dist.get_world_size()
    return gradients


def step(model: LlamaForCausalLM, reference: LlamaForCausalLM, batch: dict, passes: int = 1) -> dict[str, torch.Tensor]:
    "Gradients of one step; of several passes only the last one is shared, as when gradients accumulate."
    synchronise: Callable = getattr(model, "set_requires_gradient_sync", lambda _: None)
    for i in range(passes):
        synchronise(i == passes - 1)
        (pair_loss(model, reference, batch, LOSSES["tdpo2"]).loss / passes).backward()
    return whole_gradients(model)


def worst(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    "The largest difference as a share of the largest entry."
    return max(((found[name] - x).abs().max() / x.abs().max()).item() for name, x in right.items())


def main(out: str) -> None:
    dist.init_process_group("gloo")
    batch = make_batch(dist.get_rank())
    low = dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    runs: dict[str, tuple[dict, int]] = {"float32": ({}, 1), "accumulated": ({}, 2), "bfloat16": (low, 1)}
    report: dict[str, float | str | None] = {}
    for tied in (True, False):
        right = step(make_model(tied), make_model(tied, shift=0.02), batch)
        for name, (options, passes) in runs.items():
            model = sharded(make_model(tied), **options)
            reference = sharded(make_model(tied, shift=0.02), **options)
            report[f"{name}, tied={tied}"] = worst(step(model, reference, batch, passes), right)
            report["full logits"] = full_logits_reason(model) or full_logits_reason(reference)
    if dist.get_rank() == 0: Path(out).write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()
