"""Do the tests notice a fault? Put one into the package at a time, and run what must catch it: `make mutations`.

Each fault is one change of text in one module: a sign, a side, a lost stop-gradient, an average over the wrong thing.
The package is copied, the fault is put into the copy, and a forked process runs the fast tests of that room on it,
those first that should notice. Caught is a fault whose tests fail. `--only WORD` takes the faults whose module or text
has the word in it.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    "One change that makes the package wrong."

    module: str     # below tokpref/
    right: str      # text that is there once
    wrong: str
    first: str = ""     # the tests that should notice, as pytest takes them: they are run before the others of the room


LOSSES = [
    Fault("losses/dpo.py", "margin = chosen_rewards - rejected_rewards\n",
          "margin = rejected_rewards - chosen_rewards\n"),
    Fault("losses/dpo.py", "- label_smoothing * F.logsigmoid(-margin)", "- label_smoothing * F.logsigmoid(margin)"),
    Fault("losses/dpo.py", "-(1 - label_smoothing) * F.logsigmoid(margin)", "-F.logsigmoid(margin)"),
    Fault("losses/dpo.py", "return -_expm1(-delta)", "return _expm1(delta)"),
    Fault("losses/dpo.py", "F.logsigmoid(delta) + math.log(2)", "F.logsigmoid(delta)"),
    Fault("losses/dpo.py", "- 1 / (2 * beta)) ** 2", "- 1 / beta) ** 2"),
    Fault("losses/dpo.py", "chosen_rewards - rejected_rewards - gamma)",
          "chosen_rewards - rejected_rewards - beta * gamma)"),
    Fault(
        "losses/dpo.py",
        "rejected_rewards = beta * rejected.per_token(rejected.logps).sum(-1) / nonempty_lengths(rejected)",
        "rejected_rewards = beta * rejected.per_token(rejected.logps).sum(-1) / nonempty_lengths(chosen)",
    ),
    Fault("losses/tdpo.py", "drift = rejected_kl - chosen_kl\n", "drift = chosen_kl - rejected_kl\n"),
    Fault("losses/tdpo.py", "chosen_kl.detach())", "chosen_kl)"),
    Fault("losses/tdpo.py", "alpha * (rejected_kl - chosen_kl.detach())", "rejected_kl - alpha * chosen_kl.detach()"),
    Fault("losses/tdpo.py", "beta * (chosen_delta + chosen_kl)", "beta * chosen_delta"),
    Fault("losses/adpo.py", "windows = -(-lengths.amax(0) // window)", "windows = lengths.amax(0) // window"),
    Fault("losses/adpo.py", "(_positions(mask) + 1) * segments[:, None] - 1", "_positions(mask) * segments[:, None]"),
    Fault("losses/adpo.py", ".masked_fill(~own, 0.0).sum(-1)", ".sum(-1)"),
    Fault("losses/adpo.py", "margins = beta * (chosen_sums - rejected_sums)",
          "margins = chosen_sums - beta * rejected_sums"),
    Fault("losses/tbpo.py", "risk.sum(-1) / chosen_part.lengths", "risk.sum(-1) / chosen.lengths"),
    Fault("losses/tbpo.py", "risk.sum(-1) / chosen_part.lengths", "risk.sum(-1)"),
    Fault("losses/tbpo.py", "risk.sum(-1) / chosen_part.lengths",
          "(risk.sum() / chosen_part.lengths.sum()).expand(len(risk))"),
    Fault("losses/tbpo.py", "gap.sum(-1, keepdim=True) / chosen.lengths[:, None]", "gap.mean(-1, keepdim=True)"),
    Fault("losses/tbpo.py", "torch.expm1(rho.clamp(max=30.0)) - rho", "torch.expm1(rho.clamp(max=30.0))"),
    Fault("losses/tbpo.py", "token_scores(rejected_part, variant) - token_scores(chosen_part, variant)",
          "token_scores(chosen_part, variant) - token_scores(rejected_part, variant)"),
    Fault("losses/bregman.py", "lambda lam, scale: (lam, 1 / scale)", "lambda lam, scale: (lam, 1.0)"),
    Fault("losses/bregman.py", "(_phi(1 + lam, z) + _phi(-lam, z))", "(_phi(1 + lam, z) + _phi(lam, z))"),
    Fault("losses/bregman.py", "losses = bregman_risk(rejected_rewards - chosen_rewards,",
          "losses = bregman_risk(chosen_rewards - rejected_rewards,"),
    Fault("losses/types.py", "if self.weights is not None: value = value * self.weights", "if False: pass"),
    Fault("losses/types.py", "return self.per_token(self.need(\"kl\"))",
          "return self.need(\"kl\").masked_fill(~self.mask, 0.0)"),
    Fault("losses/more.py", "/ (1 - 2 * flip_rate)", "/ (1 - flip_rate)"),
    Fault("losses/more.py", "penalty * (-chosen_rewards).relu()", "penalty * chosen_rewards.relu()"),
    Fault("losses/more.py", "torch.sigmoid(beta * point - chosen_rewards)", "torch.sigmoid(point - chosen_rewards)"),
    Fault("losses/more.py", "return PairLoss(-won + beta * odds,", "return PairLoss(-won - beta * odds,"),
    Fault("losses/sums.py", "weight * results[name].losses", "results[name].losses"),
]
ENGINE = [
    Fault("engine/forward.py", "before = batch[\"attention_mask\"].bool()",
          "before = batch[\"completion_mask\"].bool()"),
    Fault("engine/one_pass.py", "states = rows, columns - 1", "states = rows, columns",
          "tests/test_engine.py -k fast_ways_match_full_logits"),
    Fault("engine/stats.py", "positions = rows, columns - 1", "positions = rows, columns"),
    Fault("engine/one_pass.py", "torch.full_like(result.losses, 1 / pairs)", "torch.full_like(result.losses, 1.0)",
          "tests/test_fuzz.py -k losses_of_features"),
    Fault("engine/one_pass.py", "torch.full_like(result.losses, 1 / pairs)",
          "torch.full_like(result.losses, 1 / len(result.losses))",
          "tests/test_fuzz.py -k losses_of_features"),
    Fault("engine/one_pass.py", "batch[\"weights\"][layout.source].float()",
          "torch.ones_like(batch[\"weights\"][layout.source]).float()",
          "tests/test_engine.py -k weights_and_reference"),
    Fault("engine/gradients.py", "p.mul_((k - g)[:, None]).addcmul_(ref_probs[rows], -k[:, None])",
          "p.mul_(-g[:, None]).addcmul_(ref_probs[rows], -k[:, None])",
          "tests/test_fuzz.py -k statistics_and"),
    Fault("engine/gradients.py", "if work.scale != 1.0: grad.mul_(work.scale)", "if False: pass",
          "tests/test_fuzz.py -k statistics_and"),
    Fault("engine/gradients.py", "grad_logps = (targets - first).clamp(0, probs.shape[1] - 1), grad_logps * here",
          "grad_logps = (targets - first).clamp(0, probs.shape[1] - 1), grad_logps",
          "tests/test_fuzz.py -k statistics_and"),
    Fault("engine/gradients.py", "scaled = (g if g is None or plain else g * upstream.to(g.dtype)", "scaled = (g",
          "tests/test_engine.py -k factor_on_the_loss"),
    Fault("engine/in_place.py", "stats[\"kl\"] = gap.mul_(ref_z).nansum(-1) + shift",
          "stats[\"kl\"] = gap.mul_(z).nansum(-1) + shift",
          "tests/test_fuzz.py -k statistics_and"),
    Fault("engine/in_place.py", "-(z * gap).nansum(-1) - shift", "-(z * gap).nansum(-1) + shift",
          "tests/test_fuzz.py -k statistics_and"),
    Fault("engine/in_place.py", "if head.bias is not None: z.add_(head.bias[columns])", "if False: pass",
          "tests/test_fuzz.py -k statistics_and"),
    Fault("engine/packing.py", "seen = (segment == other_segment) & same_branch & (other_position <= position)",
          "seen = (segment == other_segment) & (other_position <= position)",
          "tests/test_engine.py -k fast_ways_match_full_logits"),
    Fault("engine/packing.py", "(position - other_position < window)", "(position - other_position <= window)",
          "tests/test_engine.py -k fast_ways_match_full_logits"),
    Fault("engine/packing.py", "return torch.where(index < shared, self.base[rows] + index,",
          "return torch.where(index <= shared, self.base[rows] + index,",
          "tests/test_engine.py -k packed_pairs_hold"),
    Fault("engine/attention.py", "lse[:, head:] = total", "pass",
          "tests/test_engine.py -k all_layouts"),
    Fault("engine/reference.py", "rows += zip(_values(chosen), _values(rejected), strict=True)",
          "rows += zip(_values(rejected), _values(chosen), strict=True)",
          "tests/test_trainer.py -k precomputed"),
    Fault(
        "engine/head.py",
        "(getattr(config, \"logit_scale\", None) or 1.0) / (getattr(config, \"logits_scaling\", None) or 1.0)",
        "(getattr(config, \"logit_scale\", None) or 1.0)",
        "tests/test_engine.py -k head_that_was_taken_off",
    ),
]
DATA = [
    Fault("data/sources.py", "\"chosen\": chosen[start:], \"rejected\": rejected[start:]}",
          "\"chosen\": rejected[start:], \"rejected\": chosen[start:]}",
          "tests/test_data.py -k sets_keep_their_sides"),
    Fault("data/sources.py", "\"chosen\": summaries[choice], \"rejected\": summaries[1 - choice]",
          "\"chosen\": summaries[1 - choice], \"rejected\": summaries[choice]",
          "tests/test_data.py -k sets_keep_their_sides"),
    Fault("data/collate.py", "[[0] * len(start) + [1] * len(rest) for start, rest in pairs]",
          "[[0] * (len(start) - 1) + [1] * (len(rest) + 1) for start, rest in pairs]",
          "tests/test_data.py -k what_the_mask_keeps"),
    Fault("data/collate.py", "[row[f\"{side}_ids\"] for side in SIDES for row in rows]",
          "[row[f\"{side}_ids\"] for side in SIDES[::-1] for row in rows]",
          "tests/test_data.py -k engine_reads"),
    Fault("data/tokens.py", "responses = [part if part[-1:] == end else part + end for part in ids]",
          "responses = ids"),
    Fault("data/tokens.py", "values[:limit - 1] + values[-1:]", "values[:limit]"),
    Fault("data/tokens.py", "longest = max(len(chosen), len(rejected))", "longest = len(chosen)",
          "tests/test_data.py -k longer_response"),
    Fault("data/formats.py", "return chosen[:start], chosen[start:], rejected[start:]",
          "return chosen[:start], rejected[start:], chosen[start:]"),
    Fault("data/formats.py", "== rejected[:start]: return prompt, chosen[start:], rejected[start:]",
          "== rejected[:start]: return prompt, rejected[start:], chosen[start:]",
          "tests/test_data.py -k both_conversations_repeat"),
]
EVALUATION = [
    Fault("evaluation/judging.py", "scores, first = (there + 1 - back) / 2, (there + back) / 2",
          "scores, first = there, (there + back) / 2"),
    Fault("evaluation/judging.py", "[*prompts, *prompts], [*candidates, *references], [*references, *candidates]",
          "[*prompts, *prompts], [*candidates, *candidates], [*references, *references]"),
    Fault("evaluation/divergence.py", "\"log_ratio\": stats.log_ratio, \"kl\": stats.reverse_kl,",
          "\"log_ratio\": stats.log_ratio, \"kl\": stats.kl,"),
    Fault("evaluation/divergence.py", "{name: torch.cat(values)[back] for", "{name: torch.cat(values) for"),
    Fault("evaluation/estimate.py", "[values[list(group)].mean() for group in groups]",
          "[values[list(group)[:1]].mean() for group in groups]"),
    Fault("evaluation/estimate.py", "correction = len(numbers) / (len(numbers) - 1)", "correction = 1"),
    Fault("evaluation/frontier.py", "kl = (w * (log_w + math.log(rewards.shape[1]))).sum(-1)",
          "kl = (w * log_w).sum(-1)"),
    Fault("evaluation/frontier.py", "point[\"reward\"] for point in points if point[\"kl\"] <= kl",
          "point[\"reward\"] for point in points if point[\"kl\"] >= kl"),
    Fault("evaluation/pairs.py", "\"implicit/accuracies\": won > lost,", "\"implicit/accuracies\": won >= lost,"),
    Fault("evaluation/sampling.py", "\"top_k\": 0}", "\"top_k\": 50}", "tests/test_evaluation.py -k top_k"),
    Fault("evaluation/sampling.py", "return ids[:first + 1]", "return ids[:first]"),
    Fault("metrics.py", "(result.margins > 0).float()", "(result.margins >= 0).float()"),
    Fault("metrics.py", "total / (chosen.lengths + rejected.lengths)", "total / chosen.lengths",
          "tests/test_evaluation.py -k mean_over_the_tokens"),
]
TRAINER = [
    Fault("training/trainer.py", "weight = batches / int(num_items_in_batch)", "weight = 1 / batch_pairs",
          "tests/test_trainer.py -k every_pair_of_a_step"),
    Fault("training/trainer.py", "self.share = weight * (len(part[\"input_ids\"]) // 2)", "self.share = 1.0",
          "tests/test_trainer.py -k every_pair_of_a_step"),
    Fault("training/saving.py", "if finite.all(): continue", "continue",
          "tests/test_trainer.py -k broken_run"),
    Fault("training/trainer.py", "if module is not None: disable_dropout(module)", "pass",
          "tests/test_trainer.py -k dropout"),
    Fault("training/reference.py", "weight.lerp_(source[name].to(weight), share)",
          "weight.lerp_(source[name].to(weight), 1 - share)",
          "tests/test_trainer.py -k share_of_the_policy"),
    Fault("training/reference.py", "if state.global_step % self.every == 0:",
          "if state.global_step % self.every == 1:",
          "tests/test_trainer.py -k reference_follows"),
    Fault("training/reference.py", "if own_adapter and (args.sync_ref_model or not adapter_is_new(policy)):",
          "if own_adapter and args.sync_ref_model:", "tests/test_trainer.py -k trained_before"),
    Fault("training/setup.py", "optimizer.register_step_post_hook(lambda *_: head.zero_grad())", "pass",
          "tests/test_trainer.py -k do_not_add_up"),
]
HARNESS = [
    Fault("experiments/compare/baselines.py", "\"labels\": [-100] * len(prompt) + response}",
          "\"labels\": prompt + response}",
          "tests/test_experiments.py -k learns_the_response"),
    Fault("experiments/compare/baselines.py", "return (returns - returns.mean(1, keepdim=True)) * k / (k - 1)",
          "return returns - returns.mean(1, keepdim=True)",
          "tests/test_experiments.py -k reinforce"),
    Fault("experiments/compare/baselines.py", "torch.minimum(ratio * gain,", "torch.maximum(ratio * gain,",
          "tests/test_experiments.py -k gain_of_a_policy"),
    Fault("experiments/compare/baselines.py", "rollout[\"rewards\"] - self.beta * stats.log_ratio",
          "rollout[\"rewards\"] + self.beta * stats.log_ratio",
          "tests/test_experiments.py -k policy_gradient"),
    Fault("experiments/compare/run.py", "shared.seed, code])", "shared.seed])",
          "tests/test_experiments.py -k edited_loss"),
]
TESTS = {
    "losses": (LOSSES, ["tests/test_losses.py", "tests/test_more_losses.py"]),
    "engine": (ENGINE, ["tests/test_fuzz.py", "tests/test_engine.py", "tests/test_trainer.py"]),
    "data": (DATA, ["tests/test_data.py"]),
    "evaluation": (EVALUATION, ["tests/test_evaluation.py", "tests/test_trainer.py"]),
    "trainer": (TRAINER, ["tests/test_trainer.py"]),
    "harness": (HARNESS, ["tests/test_experiments.py", "tests/test_experiments_sentiment.py"]),
}


def text_of(fault: Fault) -> str:
    "The module that a fault is put into."
    return (ROOT / "tokpref" / fault.module).read_text(encoding="utf-8")


def why_not(fault: Fault) -> str:
    "Why a fault can't be put in; empty: it can."
    times = text_of(fault).count(fault.right)
    return "" if times == 1 else f"tokpref/{fault.module} has {fault.right!r} {times} times: name what is there once"


def with_fault(fault: Fault, folder: Path) -> None:
    "A copy of the package in `folder` that has the fault."
    text = text_of(fault)
    shutil.copytree(ROOT / "tokpref", folder / "tokpref", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tokpref" / fault.module).write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def preload() -> None:
    "Import what takes long, but nothing of the package: a fork then starts at once."
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers
    torch.set_num_threads(1)
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "Trainer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)


NOT_RUN = (4, 5)     # what pytest ends with where there are no such tests


def run_tests(folder: Path, tests: list[str], log: Path) -> bool:
    "Whether the tests notice the fault of the package in `folder`, in a process that writes to `log`."
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in NOT_RUN: sys.exit(f"no such tests: {' '.join(tests)}\n{log.read_text(errors='replace')}")
        return code != 0
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    os.environ.update(PYTHONPATH=str(folder), TOKPREF_DRAWS="20")
    import pytest
    code = 3
    try: code = pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"])
    finally: os._exit(int(code))


def main() -> int:
    parser = argparse.ArgumentParser(description="Put faults into the package and see whether the tests notice.")
    parser.add_argument("--rooms", nargs="+", choices=TESTS, default=list(TESTS), help="which faults (default: all)")
    parser.add_argument("--only", default="", help="only faults with this word in their module or text")
    parser.add_argument("--check", action="store_true", help="only look whether every fault can be put in")
    args = parser.parse_args()
    os.chdir(ROOT)
    gone = [said for room in TESTS for fault in TESTS[room][0] if (said := why_not(fault))]
    if gone: sys.exit("\n".join(gone))
    if args.check: return 0
    preload()
    survivors, tried = [], 0
    for room in args.rooms:
        faults, tests = TESTS[room]
        for fault in faults:
            if args.only not in fault.module + fault.right + fault.wrong: continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                with_fault(fault, folder)
                likely = [fault.first.split()] if fault.first else []
                caught = any(run_tests(folder, some, folder / "log.txt") for some in [*likely, tests])
                last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            tried += 1
            if not caught: survivors.append(fault)
            said = "caught" if caught else "SURVIVED"
            what = f"{fault.module}: {fault.wrong.strip()[:60]}"
            print(f"{said:9s} {time.monotonic() - start:5.0f} s  {what}  {' '.join(last)[:60]}", flush=True)
    print(f"{tried - len(survivors)} of {tried} caught")
    for fault in survivors: print(f"  survived: {fault.module}: {fault.right.strip()} -> {fault.wrong.strip()}")
    return 0 if 10 * len(survivors) <= tried else 1


if __name__ == "__main__":
    sys.exit(main())
