"""Comparisons end to end: they continue where they stopped, mix nothing, say what they were made with, and measure what they claim."""
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokpref.evaluation import estimate, sample, sample_kl
from tokpref.experiments import compare as harness
from tokpref.experiments import scratch, sentiment, toy
from tokpref.experiments.compare import (TASKS, VARIANTS, LossRun, RunConfig, compare, comparison_figure, comparison_table, find_task,
                                         resolve_losses, summarise)
from tokpref.losses import LOSSES

QUICK = {"steps": 3, "eval_steps": 2, "pretrain_steps": 10, "pairs": 64, "eval_pairs": 16, "letters": 3}


def run_toy(out, losses=("dpo", "tdpo2"), **options):
    return compare("toy", "smoke", losses=list(losses), out=out, overrides={**QUICK, **options}, progress=False)


def test_every_label_and_profile_is_sound():
    for name in ("toy", "sentiment"):
        for profile in find_task(name).profiles:
            _, config = find_task(name).configure(profile)
            runs = resolve_losses(None, config)
            assert set(runs) == set(config.losses) and all(run.loss in LOSSES and run.beta > 0 and run.learning_rate > 0 for run in runs.values())
            assert config.steps % config.eval_steps == 0
    assert {run.loss for run in VARIANTS.values()} >= {"dpo", "ipo", "simpo", "adpo", "tdpo1", "tdpo2", "bpo", "tbpo_q", "tbpo_a"}


def test_the_first_profile_of_the_toy_is_the_demo():
    assert find_task("toy").configure()[0] == "demo" and find_task("sentiment").configure()[0] == "nano"


def test_record_is_complete_and_private(tmp_path):
    record = run_toy(tmp_path, seeds=(0, 1), losses=("dpo",))
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(record))
    assert set(record) == {"task", "profile", "description", "config", "seeds", "versions", "hardware", "problem", "start", "value", "optimum", "runs"}
    assert {"torch", "transformers", "tokpref", "python"} <= set(record["versions"]) and {"cpu", "gpu", "threads"} <= set(record["hardware"])
    for run in record["runs"]:
        assert [point["step"] for point in run["history"]] == [0, 2, 3]
        assert {"reward", "kl", "accuracy", "kl_chosen", "kl_rejected"} <= set(run["metrics"]) and run["seconds"] > 0
        assert run["beta"] == record["config"]["beta"] and run["options"] == {}
    text = (tmp_path / "comparison.json").read_text()
    for private in (socket.gethostname(), str(tmp_path), str(Path.home()) + os.sep): assert private not in text


def test_a_stopped_comparison_continues(tmp_path, monkeypatch):
    real, calls = harness.train_one, []

    def stops_at_the_second(*args, **kwargs):
        calls.append(args[3].loss)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(harness, "train_one", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt): run_toy(tmp_path)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1 and not (tmp_path / "scratch").exists()
    record = run_toy(tmp_path)
    assert calls == ["dpo", "tdpo2", "tdpo2"] and [run["label"] for run in record["runs"]] == ["dpo", "tdpo2"]


def test_changed_settings_are_never_mixed(tmp_path, monkeypatch):
    first = run_toy(tmp_path, ["dpo"])
    changed = run_toy(tmp_path, ["dpo"], learning_rate=1e-4)
    harder = run_toy(tmp_path, ["dpo"], void_reward=-9.0)
    assert len({run["runs"][0]["metrics"]["reward"] for run in (first, changed, harder)}) == 3
    monkeypatch.setattr(harness, "train_one", None)     # from here on nothing may be trained
    assert run_toy(tmp_path, ["dpo"])["runs"] == first["runs"]


def test_same_seed_same_numbers(tmp_path):
    a, b = (run_toy(tmp_path / name, ["tbpo_q"]) for name in "ab")
    assert a["runs"][0]["history"] == b["runs"][0]["history"]


def test_a_broken_run_is_reported_and_not_kept(tmp_path):
    losses = {"dpo": LossRun("dpo"), "wild": LossRun("dpo", learning_rate=1e30)}
    record = compare("toy", "smoke", losses=losses, out=tmp_path, overrides=QUICK, progress=False)
    assert "error" not in record["runs"][0] and "not finite" in record["runs"][1]["error"]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1
    assert "wild: the loss is not finite" in comparison_table(record)
    assert comparison_figure(record).axes


@pytest.mark.parametrize("call, says", [
    (lambda: compare("toys"), "did you mean 'toy'"),
    (lambda: compare("toy", "smok"), "did you mean 'smoke'"),
    (lambda: compare("toy", losses=["tdpo3"]), "did you mean 'tdpo"),
    (lambda: compare("toy", losses={"x": ("dpo", {"window": 2})}), "'window' is not used"),
    (lambda: compare("toy", overrides={"stpes": 3}), "did you mean 'steps'"),
])
def test_slips_are_caught_before_anything_runs(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says): call()
    assert not list(tmp_path.iterdir())


def test_wrong_type_of_a_setting():
    for wrong in ({"steps": "3"}, {"steps": 2.5}, {"steps": True}, {"losses": "dpo"}):
        with pytest.raises(TypeError, match="must be"): find_task("toy").configure(overrides=wrong)
    assert find_task("toy").configure(overrides={"beta": 1, "losses": ["dpo"]})[1].losses == ("dpo",)


def test_table_over_seeds(tmp_path):
    record = run_toy(tmp_path, ["dpo"], seeds=(0, 1))
    rewards = torch.tensor([run["metrics"]["reward"] for run in record["runs"]], dtype=torch.float64)
    (line,) = summarise(record)
    assert line["seeds"] == 2 and abs(line["reward"] - rewards.mean()) < 1e-12 and abs(line["reward_sd"] - rewards.std()) < 1e-12
    assert "±" in comparison_table(record)


def test_exact_numbers_of_the_toy_agree_with_sampling(tmp_path):
    "Expected reward and KL by listing all responses equal those by sampling, for a policy that moved."
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    problem = toy.prepare_toy(config, tmp_path, progress=False)
    torch.manual_seed(0)
    moved = toy.toy_policy(problem.tokenizer, config)
    moved.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in problem.policy.state_dict().items()})
    exact = problem.evaluate(moved.eval())
    prompts = toy.all_prompts(config.letters)
    table = toy.outcome_rewards(toy.string_rewards(prompts, config), config.void_reward)
    texts = ["".join(chr(97 + c) for c in s) for d in range(config.max_letters + 1) for s in toy.all_strings(config.letters, d).tolist()]
    place = {text: i for i, text in enumerate(texts)}
    samples = sample(moved, problem.tokenizer, [toy.to_text(p).strip() for p in prompts], n=400, batch_size=600,
                     max_new_tokens=config.max_letters + 1, progress=False)
    rewards = []
    for i, ids, text in zip(samples.index, samples.response_ids, samples.responses):
        letters = text.replace(" ", "")
        whole = ids[-1] == problem.tokenizer.eos_token_id and letters in place and len(ids) == len(letters) + 1
        rewards.append(table[i, place[letters]].item() if whole else config.void_reward)
    value, se, _ = estimate(torch.tensor(rewards, dtype=torch.float64))
    assert exact["kl"] > 0.02 and abs(value - exact["reward"]) < 4 * se
    numbers = sample_kl(moved, problem.policy.eval(), samples, batch_size=600, progress=False)["kl"]
    assert numbers.mean() > exact["kl"] - 4 * numbers.std() / len(numbers) ** 0.5      # listing lumps all void responses together


def test_toy_start_is_kept_and_read_again(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    first, second = (toy.prepare_toy(config, tmp_path, progress=False) for _ in range(2))
    for a, b in zip(first.policy.parameters(), second.policy.parameters()): assert torch.equal(a, b)
    assert len(list(tmp_path.glob("start-*"))) == 1 and first.train[:] == second.train[:]


def test_sentiment_smoke_end_to_end(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKPREF_DATA", raising=False)
    record = compare("sentiment", "smoke", losses=["dpo"], out=tmp_path, overrides={"steps": 4, "eval_steps": 2}, progress=False)
    stages = {path.name.split("-")[0]: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()}
    assert set(stages) == {"tokenizer", "model", "classifier", "pairs"}
    assert record["start"]["kl"] == pytest.approx(0, abs=1e-6) and record["runs"][0]["metrics"]["kl"] > 0
    again = compare("sentiment", "smoke", losses=["dpo"], out=tmp_path, overrides={"steps": 4, "eval_steps": 2}, progress=False)
    assert again["runs"] == record["runs"]
    assert {path.name.split("-")[0]: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()} == stages


def test_a_stage_that_stopped_half_way_is_made_again(tmp_path):
    stages = scratch.Stages(find_task("sentiment").configure("smoke")[1], tmp_path, {"tokenizer": ("vocab_size",)})

    def stops(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): stages.run("tokenizer", stops)
    place = stages.run("tokenizer", lambda folder: (folder / "whole").write_text("y") and "done")
    assert [path.name for path in place.iterdir()] == ["whole"] and [path.name for path in tmp_path.iterdir()] == [place.name]


def test_nothing_is_learnt_from_the_test_split(monkeypatch):
    raw = {"train": (["Same text.", "Own text.", "Own text."], [1, 0, 0]), "unsupervised": (["Same text.", "Third."], [-1, -1]),
           "test": (["Same text.", "Test only."], [1, 0])}
    monkeypatch.setattr(sentiment, "_read_split", lambda source, split: raw[split])
    reviews = sentiment.load_reviews("imdb")
    assert reviews.train == ["Own text."] and reviews.labels == [0] and reviews.unlabelled == ["Third."] and reviews.repeated == 3
    assert reviews.test == ["Same text.", "Test only."]


def test_missing_reviews_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKPREF_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="set TOKPREF_DATA.*profile smoke") as error: sentiment.load_reviews("nobody/imdb")
    assert len(str(error.value).splitlines()) == 1


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "mine", replace(find_task("toy"), name="mine", profiles={"only": replace(find_task("toy").profiles["smoke"], **QUICK)}))
    assert compare("mine", losses="dpo", out=tmp_path, progress=False)["profile"] == "only"
    assert isinstance(find_task("mine").profiles["only"], RunConfig)
