"""Trains a tiny model a few steps and saves its weights; test_distributed.py runs it, alone and as two processes."""

import os
import tempfile

import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokpref import PreferenceConfig, PreferenceTrainer, prepare

words = "<pad> <bos> <eos> yes no is it true very".split()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>")),
    pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
pairs = [dict(prompt="<bos> " + q, chosen=a, rejected=b) for q in ("is it true", "is it", "it is true", "true is it")
         for a, b in (("yes", "no"), ("very yes", "very no"), ("yes it is", "no"), ("yes", "no it is"))]


def forget_processes() -> None:
    "Have accelerate find its processes anew, on CPUs."
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    AcceleratorState._reset_state(reset_partial_state=True)


def train(batch_size: int, rows=None, **changes) -> dict:
    "Weights, and an evaluation over a number of pairs that two processes can't share evenly."
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    args = PreferenceConfig(
        output_dir=tempfile.mkdtemp(),
        beta=0.5,
        learning_rate=1e-2,
        optim="sgd",
        max_steps=4,
        seed=0,
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    data = pairs if rows is None else rows
    trainer = PreferenceTrainer(model, args, data, pairs[:5], processing_class=tokenizer)
    trainer.train()
    result = trainer.evaluate()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if trainer.baseline_head is not None:
        head = trainer.accelerator.unwrap_model(trainer.baseline_head)
        weights |= {f"baseline {name}": p.detach() for name, p in head.named_parameters()}
    return weights | {
        name: torch.tensor(result[name])
        for name in ("eval_loss", "eval_rewards/margins", "eval_kl/chosen")
        if name in result
    }


def main(out: str, batch_size: int) -> None:
    tbpo_q = dict(loss="tbpo_q", baseline_width=8, baseline_learning_rate=0.1)
    budget = dict(tbpo_q, token_budget=18)      # with which the two processes take different numbers of passes
    settings = {
        "tdpo2": dict(loss="tdpo2"),
        "tbpo_q": tbpo_q,
        "budget": budget,
        "precomputed": dict(loss="dpo", precompute_ref_logps=True),
    }
    runs = {name: train(batch_size, **changes) for name, changes in settings.items()}
    # as a stream, and cut by accelerate: a process gets whole pairs, chosen and rejected
    stream = prepare(pairs, tokenizer)[0].to_iterable_dataset()
    for split in (False, True):
        size = 4 if split else batch_size
        runs[f"stream, split_batches={split}"] = train(size, stream, accelerator_config={"split_batches": split})
    runs["split_batches"] = train(4, accelerator_config={"split_batches": True})
    # the last batch of an epoch is filled up with pairs of the first, which count once; with 13, a process has no other
    for count in (13, 15): runs[f"{count} pairs"] = train(batch_size, pairs[:count])
    if int(os.environ.get("RANK", 0)) == 0: torch.save(runs, out)
