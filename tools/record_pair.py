"""Make tokpref/film_pair.json: one pair of film comments, scored while each loss trains: `python tools/record_pair.py`.

Needs the film reviews (TOKPREF_DATA) and takes about half an hour on two cores, most of it for the language model of
the sentiment comparison, which is kept under runs/ and used again. The pair itself is in no data set; it was written
for the chapters. A small trial: `python tools/record_pair.py --profile smoke --losses dpo --output trial.json`.
"""
import argparse
import copy
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from tokpref import TokenStats, token_stats
from tokpref.data import PreferenceCollator
from tokpref.experiments.compare import Problem, RunConfig, find_task, resolve_losses, run_arguments, versions
from tokpref.training import PreferenceTrainer

ROOT = Path(__file__).resolve().parent.parent
PAIR = {"prompt": "I went to see this film with my sister",
        "chosen": " and we loved every minute of it. The acting is wonderful, the story is moving "
                  "and I will watch it again.",
        "rejected": " and we were bored to death. The acting is awful and I want my money back."}
SIDES = ("chosen", "rejected")
LOSS_NAMES = ("dpo", "ipo", "adpo", "tdpo1", "tdpo2", "bpo", "tbpo_q", "tbpo_a")


def encode(tokenizer: Any) -> dict[str, list[int]]:
    "The pair as ids; each response ends with the end token."
    ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in PAIR.items()}
    return {"prompt": ids["prompt"], **{side: ids[side] + [tokenizer.eos_token_id] for side in SIDES}}


def as_lists(stats: TokenStats) -> dict[str, list[float]]:
    "The statistics of one response, six digits each; a baseline only where there is one."
    names = ["logps", "ref_logps", "kl", "entropy"] + (["baseline"] if stats.baseline is not None else [])
    return {name: [round(value, 6) for value in stats.need(name)[0].tolist()] for name in names}


def measure(model: nn.Module, reference: nn.Module, head: Callable | None, ids: dict[str, list[int]], pad: int) -> dict:
    "Token statistics of both responses under a model, as lists."
    batch = PreferenceCollator(pad)([{f"{name}_ids": row for name, row in ids.items()}])
    del batch["row"]
    training = model.training
    model.eval()
    with torch.no_grad(): both = token_stats(model, reference, batch, kl=True, entropy=True, baseline=head)
    model.train(training)
    return {side: as_lists(stats) for side, stats in zip(SIDES, both, strict=True)}


class Recorder(TrainerCallback):
    "Measures the pair at the start and every few steps."

    def __init__(self, measured: Callable[[], dict], every: int):
        self.measured = measured
        self.every = every
        self.by_step: dict[int, dict] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0: self.by_step[0] = self.measured()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0: self.by_step[state.global_step] = self.measured()


def record(problem: Problem, config: RunConfig, name: str, folder: str) -> dict[int, dict]:
    "step -> statistics of the pair, while one loss trains."
    run = resolve_losses([name], config)[name]
    reference = copy.deepcopy(problem.policy).eval().requires_grad_(False)
    arguments = run_arguments(config, run, 0, Path(folder), problem.arguments)
    policy: Any = copy.deepcopy(problem.policy)
    trainer = PreferenceTrainer(model=policy, args=arguments, ref_model=reference, train_dataset=problem.train,
                                processing_class=problem.tokenizer)
    ids = encode(problem.tokenizer)

    def measured() -> dict:
        return measure(policy, reference, trainer.baseline_head, ids, problem.tokenizer.pad_token_id)

    recorder = Recorder(measured, config.eval_steps)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.by_step


def written(value: Any) -> str:
    "JSON with each list on a line of its own."
    text = json.dumps(value, indent=1, ensure_ascii=False)
    on_one_line = re.sub(r"\[\n([^\[\]{}]*)\]", lambda m: "[" + re.sub(r",\n *", ", ", m[1]).strip() + "]", text)
    return on_one_line + "\n"


def film_record(problem: Problem, config: RunConfig, names: Sequence[str]) -> dict:
    "What film_pair.json holds: the pair, and its statistics under each loss at each step."
    ids = encode(problem.tokenizer)
    policies = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            print(name, flush=True)
            policies[name] = record(problem, config, name, scratch)
    about = {"model": problem.info["model"], "beta": config.beta, "learning_rate": config.learning_rate,
             "batch_size": config.batch_size, "options": {n: resolve_losses([n], config)[n].options for n in names},
             "versions": versions()}
    tokens = {side: [problem.tokenizer.decode([i]) for i in ids[side]] for side in SIDES}
    return {"prompt": PAIR["prompt"], "tokens": tokens, "about": about, "policies": policies}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", default="nano", help="of the sentiment comparison")
    parser.add_argument("--losses", nargs="+", default=LOSS_NAMES, choices=LOSS_NAMES)
    parser.add_argument("--folder", type=Path, help="where the prepared problem is kept")
    parser.add_argument("--output", type=Path, default=ROOT / "tokpref" / "film_pair.json")
    options = parser.parse_args(arguments)
    task = find_task("sentiment")
    profile, config = task.configure(options.profile)
    problem = task.prepare(config, options.folder or ROOT / "runs" / f"sentiment-{profile}" / "prepared", True)
    options.output.write_text(written(film_record(problem, config, options.losses)), encoding="utf-8")


if __name__ == "__main__":
    main()
