"""Make tokpref/film_pair.json: one pair of film comments, scored while each loss trains: `python tools/record_pair.py`.

Needs the film reviews (TOKPREF_DATA) and takes about half an hour on two cores, most of it for the language model of the sentiment
comparison, which is kept under runs/ and used again. The pair itself is in no data set; it was written for the chapters.
"""
import copy
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from tokpref import token_stats
from tokpref.data import PreferenceCollator
from tokpref.experiments.compare import _arguments, find_task, resolve_losses, versions
from tokpref.training import PreferenceTrainer

ROOT = Path(__file__).resolve().parent.parent
PAIR = {"prompt": "I went to see this film with my sister",
        "chosen": " and we loved every minute of it. The acting is wonderful, the story is moving and I will watch it again.",
        "rejected": " and we were bored to death. The acting is awful and I want my money back."}
LOSS_NAMES = ("dpo", "ipo", "adpo", "tdpo1", "tdpo2", "bpo", "tbpo_q", "tbpo_a")


def encode(tokenizer) -> dict:
    "The pair as ids; each response ends with the end token."
    ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in PAIR.items()}
    return ids | {side: ids[side] + [tokenizer.eos_token_id] for side in ("chosen", "rejected")}


def measure(model, reference, head, ids: dict, pad: int) -> dict:
    "Token statistics of both responses under a model, as lists."
    batch = PreferenceCollator(pad)([{f"{name}_ids": row for name, row in ids.items()} | {"row": 0}])
    model.eval()
    with torch.no_grad(): stats = token_stats(model, reference, {k: v for k, v in batch.items() if k != "row"}, kl=True, entropy=True, baseline=head)
    model.train()
    named = lambda s: {"logps": s.logps, "ref_logps": s.ref_logps, "kl": s.kl, "entropy": s.entropy} | ({} if head is None else {"baseline": s.baseline})
    return {side: {k: [round(x, 6) for x in v[0].tolist()] for k, v in named(s).items()} for side, s in zip(("chosen", "rejected"), stats)}


class Recorder(TrainerCallback):
    "Measures the pair at the start and every few steps."

    def __init__(self, look, every: int): self.look, self.every, self.found = look, every, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0: self.found[0] = self.look()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0: self.found[state.global_step] = self.look()


def record(problem, config, name: str, folder: str) -> dict:
    "step -> statistics of the pair, while one loss trains."
    run = resolve_losses([name], config)[name]
    reference = copy.deepcopy(problem.policy).eval().requires_grad_(False)
    trainer = PreferenceTrainer(model=copy.deepcopy(problem.policy), args=_arguments(config, run, 0, Path(folder)), ref_model=reference,
                                train_dataset=problem.train, processing_class=problem.tokenizer)
    recorder = Recorder(lambda: measure(trainer.model, reference, trainer.baseline_head, encode(problem.tokenizer), problem.tokenizer.pad_token_id), config.eval_steps)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.found


def main(folder: str = "") -> None:
    task = find_task("sentiment")
    _, config = task.configure("nano")
    problem = task.prepare(config, Path(folder or ROOT / "runs" / "sentiment-nano" / "prepared"), True)
    ids = encode(problem.tokenizer)
    tokens = {side: [problem.tokenizer.decode([i]) for i in ids[side]] for side in ("chosen", "rejected")}
    policies = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOSS_NAMES:
            print(name, flush=True)
            policies[name] = record(problem, config, name, scratch)
    about = {"model": problem.info["model"], "beta": config.beta, "learning_rate": config.learning_rate, "batch_size": config.batch_size,
             "options": {name: resolve_losses([name], config)[name].options for name in LOSS_NAMES}, "versions": versions()}
    (ROOT / "tokpref" / "film_pair.json").write_text(written({"prompt": PAIR["prompt"], "tokens": tokens, "about": about, "policies": policies}), encoding="utf-8")


def written(value) -> str:
    "JSON with each list on a line of its own."
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[\n([^\[\]{}]*)\]", lambda m: "[" + re.sub(r",\n *", ", ", m[1]).strip() + "]", text) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
