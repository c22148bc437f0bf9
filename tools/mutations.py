"""Do the tests notice a fault? Put one into the package at a time, and run what must catch it: `make mutations`.

Each fault is one change of text in one module: a sign, a side, a lost stop-gradient, an average over the wrong thing.
The package is copied, the fault is put into the copy, and a forked process runs the fast tests of that room on it,
those first that should notice. Caught is a fault whose tests fail. `--only WORD` takes the faults whose module or text
has the word in it; `--record` keeps the outcome of the whole list, with its date, in results/mutations.json.
"""
import argparse
import datetime
import json
import os
import shlex
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
    Fault("losses/sums.py", "first = results[terms[0][0]]", "first = results[terms[-1][0]]",
          "tests/test_more_losses.py -k sum_adds"),
    Fault("losses/sums.py", "return shared | own", "return own | shared", "tests/test_more_losses.py -k sum_adds"),
    Fault("losses/more.py", "+ alpha * supervised", "+ supervised", "tests/test_more_losses.py -k plain_numbers"),
    Fault("losses/more.py", ".sum(-1).detach() for side in (chosen, rejected)]",
          ".sum(-1) for side in (chosen, rejected)]", "tests/test_more_losses.py -k measured_against"),
    Fault("losses/more.py", "point = (totals[0] + totals[1]) / 2",
          "point = ((totals[0] + totals[1]) / 2).mean().expand(len(totals[0]))",
          "tests/test_losses.py -k layout_of_a_batch"),
    Fault("losses/more.py", "rejected_rewards = rejected_rewards / nonempty_lengths(rejected)",
          "rejected_rewards = rejected_rewards / nonempty_lengths(chosen)",
          "tests/test_more_losses.py -k trl_has_too"),
    Fault("losses/tbpo.py", "self.layers(hidden.detach().to(dtype))", "self.layers(hidden.to(dtype))",
          "tests/test_losses.py -k baseline_head"),
    Fault("losses/bregman.py", "min(30.0, 80.0 / max(1 + lam, -lam))", "30.0", "tests/test_losses.py -k clamp_stops"),
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
    Fault("data/collate.py", "[[0.0] * len(p) + w for p, w in", "[w + [0.0] * len(p) for p, w in",
          "tests/test_data.py -k weights_stand"),
    Fault("data/collate.py", "    for side in SIDES:\n        for row in rows:\n            values",
          "    for row in rows:\n        for side in SIDES:\n            values",
          "tests/test_data.py -k ref_logps_are"),
    Fault("data/collate.py", "self.pad([[1] * len(prompt + response) for prompt, response in pairs], 0)",
          "self.pad([[1] * len(prompt + response) for prompt, response in pairs], 1)",
          "tests/test_data.py -k mask_keeps"),
    Fault("data/collate.py", "torch.tensor([row.get(\"row\", place) for place, row in enumerate(rows)])",
          "torch.arange(len(rows))", "tests/test_data.py -k mask_keeps"),
    Fault("data/tokens.py", "return keep + ids[len(ids) - limit + len(keep):]", "return ids[:limit]",
          "tests/test_data.py -k truncation_invariants"),
    Fault("data/tokens.py", "return prompt, max_length - len(prompt)", "return prompt, max_length - len(prompt) + 1",
          "tests/test_data.py -k truncation_invariants"),
    Fault("data/tokens.py", "part if part[:1] == begin else begin + part", "begin + part",
          "tests/test_data.py -k stand_once"),
    Fault("data/tokens.py", "last = len(ids) - 1 - ids[::-1].index(eos)", "last = ids.index(eos)",
          "tests/test_data.py -k several_messages"),
    Fault("data/prepare.py", "**{name: cut_response(values, room) for name, values in weights.items()}",
          "**{name: values[:room] for name, values in weights.items()}", "tests/test_data.py -k weights_follow"),
    Fault("data/prepare.py", "kept = (full if len(good) == len(full) else full.select(good))",
          "kept = (full if len(good) == len(full) else full.select(range(len(good))))",
          "tests/test_data.py -k only_bad_rows"),
    Fault("data/formats.py", "return max(0, min(same, shortest - 1))", "return same",
          "tests/test_data.py -k goes_on_behind"),
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
    Fault("evaluation/judging.py", "(there + back) / 2\n", "(there + 1 - back) / 2\n",
          "tests/test_evaluation.py -k judge"),
    Fault("evaluation/judging.py", "clustered_estimate(scores[read], shared)",
          "clustered_estimate(scores[read], range(len(shared)))", "tests/test_evaluation.py -k clustered"),
    Fault("evaluation/pairs.py", "[(side.logps - side.need(\"ref_logps\")).masked_fill(~side.mask, 0.0) for",
          "[side.log_ratio for", "tests/test_evaluation.py -k columns_of_the_training"),
    Fault("evaluation/pairs.py", "\"reverse_kl/margin\": won - lost", "\"reverse_kl/margin\": lost - won",
          "tests/test_evaluation.py -k columns_of_the_training"),
    Fault("evaluation/divergence.py", "response_stats(model, ref_model, batch,",
          "response_stats(ref_model or model, model, batch,", "tests/test_evaluation.py -k exact_kl"),
    Fault("evaluation/sampling.py", "[[0] * (longest - len(row)) + [1] * len(row) for row", "[[1] * longest for row",
          "tests/test_evaluation.py -k left_padding"),
    Fault("metrics.py", "self.counts.get(name, 0) + len(value)", "self.counts.get(name, 0) + 1",
          "tests/test_evaluation.py -k trainers_evaluation"),
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
    Fault("training/saving.py", "rows[~finite].tolist()", "rows[finite].tolist()",
          "tests/test_trainer.py -k broken_run"),
    Fault("training/saving.py", "model)\n        self.load_head(resume_from_checkpoint)", "model)",
          "tests/test_trainer.py -k saved_baseline"),
    Fault("training/reference.py", "for weight in model.parameters() if not weight.requires_grad}",
          "for weight in model.parameters()}", "tests/test_trainer.py -k trained_before"),
    Fault("training/setup.py", "sizes.append(prompt + np.maximum(chosen, rejected))",
          "sizes.append(prompt + np.minimum(chosen, rejected))", "tests/test_trainer.py -k like_length"),
    Fault("training/trainer.py", "curious = self.args.eval_kl and not model.training",
          "curious = self.args.eval_kl and model.training", "tests/test_trainer.py -k entropy_is_measured"),
    Fault("models.py", "return frozen(copy.deepcopy(policy)) if otherwise == \"copy\"",
          "return policy if otherwise == \"copy\"", "tests/test_trainer.py -k reference_follows"),
    Fault("models.py", "adapter_off = reference.disable_adapter() if ref_model is None else contextlib.nullcontext()",
          "adapter_off = contextlib.nullcontext()", "tests/test_trainer.py -k cache_tells"),
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
    Fault("experiments/compare/train.py", "model=copy.deepcopy(problem.policy), args=", "model=problem.policy, args=",
          "tests/test_experiments.py -k has_its_seed"),
    Fault("experiments/compare/train.py", "loss_options=dict(run.options), seed=seed,",
          "loss_options=dict(run.options), seed=0,", "tests/test_experiments.py -k has_its_seed"),
    Fault("experiments/compare/measure.py", "with torch.random.fork_rng(): metrics = self.evaluate(model.eval())",
          "metrics = self.evaluate(model.eval())", "tests/test_experiments.py -k measuring_leaves"),
    Fault("experiments/compare/measure.py", "model.train(was_training)", "pass",
          "tests/test_experiments.py -k measuring_leaves"),
    Fault("experiments/compare/measure.py", "for side in (chosen, rejected)]\n        parts",
          "for side in (rejected, chosen)]\n        parts", "tests/test_experiments.py -k held_out_numbers"),
    Fault("experiments/compare/measure.py", "torch.cat(parts, 1).mean(1)",
          "torch.stack([part.mean(1) for part in parts], 1).mean(1)", "tests/test_experiments.py -k held_out_numbers"),
    Fault("experiments/compare/baselines.py", "return -(smaller * mask).sum() / len(logps)",
          "return -(smaller * mask).sum() / mask.sum()", "tests/test_experiments.py -k gain_of_a_policy"),
    Fault("experiments/compare/baselines.py", "bound = math.log(n) - (n - 1) / n", "bound = math.log(n)",
          "tests/test_experiments.py -k best_of_n"),
    Fault("experiments/compare/table.py", "(metrics[\"reward\"] - start) / (best - start)",
          "metrics[\"reward\"] / best", "tests/test_experiments.py -k share_of_the"),
    Fault("experiments/compare/table.py", "pair[label] - pair[against] for", "pair[against] - pair[label] for",
          "tests/test_experiments.py -k gains_are_read"),
    Fault("experiments/compare/table.py", "_T95.get(len(gains) - 1,", "_T95.get(len(gains),",
          "tests/test_experiments.py -k interval_of"),
    Fault("experiments/compare/resolve.py", "**{**config.tuning.get(name, {}), **own})",
          "**{**own, **config.tuning.get(name, {})})", "tests/test_experiments.py -k a_sweep"),
]
JUDGES = [
    Fault("experiments/judges/verdicts.py", "_PARTS = (\"judge\", \"prompt\", \"first\", \"second\")",
          "_PARTS = (\"judge\", \"prompt\", \"second\", \"first\")", "tests/test_judges.py -k asked_once"),
    Fault("experiments/judges/verdicts.py", "digest(self.name, *question), question)",
          "digest(self.name, *sorted(question)), question)", "tests/test_judges.py -k asked_once"),
    Fault("experiments/judges/endpoint.py", "{\"A\": 1.0, \"B\": 0.0, \"T\": 0.5}",
          "{\"A\": 0.0, \"B\": 1.0, \"T\": 0.5}", "tests/test_judges.py -k replies"),
    Fault("experiments/judges/endpoint.py", "letters != {last[1]} or ", "", "tests/test_hostile.py -k no_verdict"),
    Fault("experiments/judges/endpoint.py", "first=first.strip(), second=second.strip()",
          "first=second.strip(), second=first.strip()", "tests/test_judges.py -k both_orders"),
    Fault("experiments/judges/endpoint.py", "pace.rest(trouble.asked)        # everybody", "pass",
          "tests/test_faults.py -k stumbles"),
    Fault("experiments/judges/endpoint.py", "add_unredirected_header", "add_header",
          "tests/test_hostile.py -k another_server"),
    Fault("experiments/judges/reward_model.py", "score[x, a] - score[x, b] for", "score[x, b] - score[x, a] for",
          "tests/test_judges.py -k bradley"),
    Fault("experiments/judges/reward_model.py", "for i, score in zip(rows, outputs.tolist(), strict=True)",
          "for i, score in zip(sorted(rows), outputs.tolist(), strict=True)", "tests/test_judges.py -k bradley"),
    Fault("experiments/judges/reward_model.py", "[:, self.label or 0]", "[:, 0]", "tests/test_judges.py -k label_says"),
    Fault("experiments/judges/reward_model.py", "truncation=\"only_first\"", "truncation=\"longest_first\"",
          "tests/test_judges.py -k only_the_prompt"),
    Fault("experiments/judges/reward_model.py", "room = limit - len(answer_ids)", "room = limit",
          "tests/test_judges.py -k chat_is_cut"),
    Fault("experiments/judges/comparisons.py", "policies * z**2", "z**2", "tests/test_judges.py -k comparisons"),
    Fault("experiments/judges/comparisons.py", "[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]",
          "tests/test_judges.py -k bootstrap"),
]
TESTS = {
    "losses": (LOSSES, ["tests/test_more_losses.py", "tests/test_losses.py"]),
    "engine": (ENGINE, ["tests/test_fuzz.py", "tests/test_engine.py", "tests/test_trainer.py"]),
    "data": (DATA, ["tests/test_data.py"]),
    "evaluation": (EVALUATION, ["tests/test_evaluation.py", "tests/test_trainer.py"]),
    "trainer": (TRAINER, ["tests/test_trainer.py"]),
    "harness": (HARNESS, ["tests/test_experiments.py", "tests/test_experiments_sentiment.py"]),
    "judges": (JUDGES, ["tests/test_judges.py", "tests/test_hostile.py"]),
}
RECORD = ROOT / "results" / "mutations.json"


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


def write_record(rooms: dict[str, list[int]], survivors: list[Fault]) -> None:
    "Keep what the whole list came to: [caught, tried] of each room and of all, and what was not caught."
    whole = [sum(numbers) for numbers in zip(*rooms.values(), strict=True)]
    record = {"date": datetime.date.today().isoformat(), "caught": whole[0], "tried": whole[1], "rooms": rooms,
              "survived": [f"{fault.module}: {fault.right.strip()} -> {fault.wrong.strip()}" for fault in survivors]}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"kept in results/{RECORD.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Put faults into the package and see whether the tests notice.")
    parser.add_argument("--rooms", nargs="+", choices=TESTS, default=list(TESTS), help="which faults (default: all)")
    parser.add_argument("--only", default="", help="only faults with this word in their module or text")
    parser.add_argument("--record", action="store_true", help=f"keep the outcome in results/{RECORD.name}")
    parser.add_argument("--check", action="store_true", help="only look whether every fault can be put in")
    args = parser.parse_args()
    os.chdir(ROOT)
    gone = [said for room in TESTS for fault in TESTS[room][0] if (said := why_not(fault))]
    if gone: sys.exit("\n".join(gone))
    if args.check: return 0
    if args.record and (args.only or args.rooms != list(TESTS)):
        parser.error("--record keeps the outcome of the whole list: leave out --rooms and --only")
    preload()
    survivors, tried, rooms = [], 0, {}
    for room in args.rooms:
        faults, tests = TESTS[room]
        before = tried, len(survivors)
        for fault in faults:
            if args.only not in fault.module + fault.right + fault.wrong: continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                with_fault(fault, folder)
                likely = [shlex.split(fault.first)] if fault.first else []
                caught = any(run_tests(folder, some, folder / "log.txt") for some in [*likely, tests])
                last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            tried += 1
            if not caught: survivors.append(fault)
            said = "caught" if caught else "SURVIVED"
            what = f"{fault.module}: {fault.wrong.strip()[:60]}"
            print(f"{said:9s} {time.monotonic() - start:5.0f} s  {what}  {' '.join(last)[:60]}", flush=True)
        rooms[room] = [tried - before[0] - len(survivors) + before[1], tried - before[0]]
    print(f"{tried - len(survivors)} of {tried} caught")
    for fault in survivors: print(f"  survived: {fault.module}: {fault.right.strip()} -> {fault.wrong.strip()}")
    if args.record: write_record(rooms, survivors)
    return 0 if 10 * len(survivors) <= tried else 1


if __name__ == "__main__":
    sys.exit(main())
