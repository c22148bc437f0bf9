"""The sentiment experiment with models by name: tiny random ones in folders take the place of hub ids."""
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tokpref.experiments import reviews
from tokpref.experiments.compare import Preparation, compare, find_task
from tokpref.experiments.scratch import ScratchConfig, fresh_model, train_tokenizer
from tokpref.models import load_tokenizer

TINY = {
    "sft_epochs": 0.2,
    "sft_batch": 16,
    "micro_batch": 4,
    "sft_warmup_steps": 2,
    "context": 32,
    "train_prompts": 8,
    "eval_pair_prompts": 4,
    "eval_prompts": 8,
    "frontier_prompts": 2,
    "frontier_samples": 16,
    "steps": 2,
    "eval_steps": 1,
    "batch_size": 8,
    "source": "templates",
    "seeds": (0,),
    "warmup_steps": 1,
}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    "A language model and a classifier, each with its tokenizer, in folders."
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(reviews.template_reviews(100, 0)[0], 400)
    fresh_model(tokenizer, ScratchConfig(hidden_size=32, layers=1, heads=2, context=64)).save_pretrained(folder / "lm")
    classifier = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=2,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
        )
    )
    classifier.save_pretrained(folder / "classifier")
    for name in ("lm", "classifier"): tokenizer.save_pretrained(folder / name)
    return {"model": str(folder / "lm"), "reward_model": str(folder / "classifier")}


@pytest.mark.parametrize("profile", ["colab", "paper"])
def test_profiles_with_models_by_name_run(profile, names, tmp_path):
    record = compare("sentiment", profile, ["dpo", "tdpo2"], out=tmp_path, overrides={**TINY, **names}, progress=False)
    assert (
        record["start"]["kl"] == pytest.approx(0, abs=1e-6)
        and record["problem"]["classifier"]["name"] == names["reward_model"]
    )
    for run in record["runs"]:
        assert (
            run["metrics"]["kl"] > 0 and len(run["history"]) == 3 and {"kl_chosen", "accuracy"} <= set(run["metrics"])
        )
    assert {path.name.split("-")[0] for path in (tmp_path / "prepared").iterdir()} == {"start", "measure", "pairs"}


def test_the_classifier_of_words_is_a_reward_too(names, tmp_path):
    "The way of the profile `smol`: nothing but the language model has a name, and the accuracy is in the record."
    overrides = {**TINY, "model": names["model"], "sft_unlabelled": False, "test_reviews": 5, "sweep": {}}
    record = compare("sentiment", "smol", ["dpo"], out=tmp_path, overrides=overrides, progress=False)
    known = record["problem"]["classifier"]
    assert known["name"] == "words" and known["accuracy_reviews"] > 0.8 and list(record["models"]) == [names["model"]]
    assert record["problem"]["model"]["openings"] <= 400 and record["runs"][0]["metrics"]["kl"] > 0
    assert all(0 <= row["reward"] <= 1 for row in record["answers"] + record["runs"][0]["answers"])
    (start,) = (tmp_path / "prepared").glob("start-*")
    assert load_tokenizer(str(start)).get_vocab() == load_tokenizer(names["model"]).get_vocab()


def test_baselines_train_an_adapter_too(names, tmp_path):
    overrides = {**TINY, **names, "micro_batch": 0, "steps": 2}
    record = compare(
        "sentiment", "colab", ["ppo", "sft", "best-of-2"], out=tmp_path, overrides=overrides, progress=False
    )
    assert all("error" not in run and run["metrics"]["reward"] > 0 for run in record["runs"])


def test_reward_of_the_hub_is_the_probability_of_positive(names):
    tokenizer = load_tokenizer(names["model"])
    classifier = LlamaForSequenceClassification.from_pretrained(names["reward_model"])
    prompts, responses = (
        [tokenizer("The film")["input_ids"]] * 3,
        [" was dull.", " was wonderful, moving and superb.", ""],
    )
    together = reviews.hub_reward(prompts, responses, classifier, tokenizer, tokenizer=tokenizer, batch_size=2)
    with torch.no_grad():
        alone = [
            classifier(torch.tensor([tokenizer("The film" + r)["input_ids"]])).logits.softmax(-1)[0, 1].item()
            for r in responses
        ]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)


def test_what_is_measured_does_not_depend_on_what_is_trained():
    config = find_task("sentiment").profiles["colab"]
    key = lambda stage, **changes: Preparation(reviews.HUB_STAGES, replace(config, **changes), "").place(stage)
    assert key("measure") == key("measure", beta=0.5, learning_rate=1.0, train_prompts=7)
    assert key("measure") != key("measure", reward_model="other")
    assert key("start") == key("start", reward_model="other") != key("start", model="other") and key("pairs") != key(
        "pairs", train_prompts=7
    )


def test_a_reward_that_cannot_be_loaded_stops_before_anything_is_tuned(names, tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot load reward_model"):
        compare(
            "sentiment",
            "colab",
            ["dpo"],
            out=tmp_path,
            overrides={**TINY, **names, "reward_model": "nobody/none"},
            progress=False,
        )
    assert not list((tmp_path / "prepared").glob("start*"))
