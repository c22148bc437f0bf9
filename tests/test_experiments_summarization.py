"""Summaries: the made-up posts, the numbers at every temperature, the start, and what is refused."""
import json

import pytest

from tokpref.experiments.compare import compare, find_task
from tokpref.experiments.judges import longer_is_better
from tokpref.experiments.tasks import summarization
from tokpref.experiments.tasks.summarization import (
    SummarizationConfig,
    load_posts,
    made_up_posts,
    summary_metrics,
    temperature_table,
)

QUICK = {
    "train_pairs": 40,
    "eval_pairs": 16,
    "lm_tokens": 5000,
    "steps": 2,
    "eval_steps": 1,
    "posts": 6,
    "prompts": 4,
    "losses": ["dpo"],
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return compare("summarization", "smoke", out=tmp_path_factory.mktemp("run"), overrides=QUICK, progress=False)


def test_start_and_runs_are_judged_at_every_temperature(record):
    names = {f"{name}@{t}" for name in ("win_rate", "win_rate_se", "longer", "length_ratio") for t in ("0", "1")}
    assert names <= set(record["problem"]["start"]) and names <= set(record["runs"][0]["metrics"])
    assert record["problem"]["judge"] == "longer_is_better" and record["problem"]["posts"] == 6
    lines = temperature_table(record).splitlines()
    assert len(lines) == 5 and [line.split()[0] for line in lines] == ["loss", "start", "start", "dpo", "dpo"]


def test_the_rule_of_length_is_what_the_lengths_say(model, tokenizer):
    posts = [("say yes", " yes or no"), ("say no", " no"), ("go on", " a b c d e f g h i j k l m n o p")]
    config = SummarizationConfig(temperatures=(0.0, 1.0), max_new_tokens=12, eval_batch=4)
    asked = []
    def judge(prompts, first, second):
        asked.extend(zip(prompts, first, second, strict=True))
        return longer_is_better(prompts, first, second)
    found = summary_metrics(model, tokenizer, posts, judge, config)
    assert len(asked) == 2 * 2 * 3 and {x for x, _, _ in asked} == {post for post, _ in posts}
    for t in ("0", "1"): assert found[f"longer@{t}"] <= found[f"win_rate@{t}"] <= 1 and found[f"length_ratio@{t}"] > 0


def test_posts_are_unseen_and_drawn_once():
    config = SummarizationConfig(source="made-up", posts=20)
    assert load_posts(config) == load_posts(config) and len({post for post, _ in load_posts(config)}) == 20
    assert all(
        post.startswith("SUBREDDIT: r/") and post.endswith("TL;DR:") and summary[0] == " "
        for post, summary in load_posts(config)
    )
    with pytest.raises(ValueError, match="lower it"): load_posts(SummarizationConfig(source="made-up", posts=10**5))


def test_references_come_from_a_file_of_posts(tmp_path):
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up_posts(30, 3)), encoding="utf-8")
    found = load_posts(SummarizationConfig(references=str(path), references_split="train", posts=8))
    assert len(found) == 8 and all("TL;DR:" in post for post, _ in found)


def test_a_judge_without_a_key_stops_before_any_loss_is_trained(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("tokpref.experiments.compare.run.train_one", None)
    with pytest.raises(PermissionError, match="set OPENAI_API_KEY"):
        compare(
            "summarization",
            "smoke",
            out=tmp_path,
            overrides={**QUICK, "judge": "m@http://127.0.0.1:9/v1"},
            progress=False,
        )


def test_the_papers_settings():
    _, config = find_task("summarization").configure("paper")
    assert (config.beta, config.batch_size, config.learning_rate, config.optimizer, config.posts) == (
        0.5,
        64,
        1e-6,
        "rmsprop",
        256,
    )
    colab = summarization.SUMMARIZATION.profiles["colab"]
    assert isinstance(colab, SummarizationConfig) and colab.judge.startswith("reward:")
