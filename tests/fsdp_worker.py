"""Trains a tiny model a few steps by FSDP2 as accelerate does it, on CPUs too; test_distributed.py runs it."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from train_worker import pairs, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tokpref import PreferenceConfig, PreferenceTrainer
from tokpref.engine.forward import full_logits_reason

SHARDS = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
              FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", FSDP_RESHARD_AFTER_FORWARD="true",
              FSDP_CPU_RAM_EFFICIENT_LOADING="false")       # checkpoints keep shards, as accelerate launch has it


def shard_on_cpus() -> None:
    "Have accelerate shard where there is no GPU; by itself it leaves the weights whole there, and says nothing."
    plain: Any = state.AcceleratorState.__init__

    def init(self, *args, **settings):
        fresh, plugin = not state.AcceleratorState._shared_state, settings.get("fsdp_plugin")
        plain(self, *args, **settings)
        if not fresh or plugin is None: return
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP     # later states read it there

    setattr(state.AcceleratorState, "__init__", init)       # noqa: B010


def make_model(tied: bool, adapter: bool) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0))
    if not adapter: return model
    trained_before = dict(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **trained_before))


def saved(folder: str) -> dict[str, float]:
    "The norm of each weight that a saved model holds."
    (file,) = Path(folder).glob("*model.safetensors")
    return {name: weight.float().norm().item() for name, weight in sorted(load_file(file).items())}


def run(folder: str, processes: int, tied: bool = False, adapter: bool = False, start: str | None = None,
        **settings) -> dict:
    "What was logged, measured and saved, which ways were taken, and whether policy and reference were in shards."
    args = PreferenceConfig(
        output_dir=folder, learning_rate=1e-2, optim="sgd", max_steps=3, use_cpu=True, report_to="none",
        per_device_train_batch_size=4 // processes, per_device_eval_batch_size=2, logging_steps=1,
        disable_tqdm=True, lr_scheduler_type="constant", **{"save_strategy": "no", **settings})
    trainer = PreferenceTrainer(make_model(tied, adapter), args, pairs, pairs[:5], processing_class=tokenizer)
    trainer.train(start)
    trainer.save_model()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    models: list[Any] = [trainer.model_wrapped, trainer.ref_model]
    sharded = [any(isinstance(module, FSDPModule) for module in model.modules()) for model in models]
    full_logits = [full_logits_reason(model) for model in models]
    margins = trainer.evaluate()["eval_rewards/margins"]
    files = saved(folder) if args.should_save else {}
    return dict(log=log, evaluation=margins, engine=trainer.engine, sharded=sharded, full_logits=full_logits,
                saved=files)


def main(out: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        os.environ.update(SHARDS)
        shard_on_cpus()
    kinds: dict[str, dict] = {
        "dpo": dict(save_strategy="steps", save_steps=2), "resumed": dict(start=f"{out}.dpo/checkpoint-2"),
        "tied": dict(tied=True, loss="tdpo2"), "adapter": dict(adapter=True),
        "accumulated": dict(gradient_accumulation_steps=2)}
    runs = {name: run(f"{out}.{name}", processes, **kind) for name, kind in kinds.items()}
    if int(os.environ.get("RANK", 0)) == 0: Path(out).write_text(json.dumps(runs), encoding="utf-8")
