"""A model by name, LoRA, fine-tuning, pairs and measures: the pieces of the experiments on open models.

Tiny random models in folders stand for hub ids.
"""

import importlib.util
import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from tokpref.data import prepare
from tokpref.engine import one_pass
from tokpref.engine.attention import checkpoints
from tokpref.experiments import pretrained
from tokpref.experiments.compare import (
    TASKS,
    Preparation,
    Task,
    compare,
    comparison_figure,
    comparison_table,
    find_task,
    merge_records,
    resolve_losses,
)
from tokpref.experiments.pretrained import (
    HubConfig,
    PairMeasure,
    SFTConfig,
    hold_out,
    length_baseline,
    load_pairs,
    made_up_pairs,
    measured_runs,
    pair_accuracies,
    pair_table,
    prepare_pairs,
    results_folder,
    run_suites,
    sft,
    sft_rows,
    stored_result,
)
from tokpref.experiments.pretrained.prepare import prepared_pairs
from tokpref.models import load_model, load_tokenizer, lora
from tokpref.precision import pick_precision
from tokpref.training import PreferenceConfig, PreferenceTrainer

QUIET = dict(save_strategy="no", eval_strategy="no", disable_tqdm=True, logging_steps=100)
QUICK = HubConfig(
    test_split="",
    eval_pairs=24,
    train_pairs=48,
    max_length=100,
    max_prompt_length=50,
    max_new_tokens=6,
    prompts=6,
    eval_batch=16,
    precision="float32",
    losses=("dpo", "tdpo2"),
    steps=3,
    eval_steps=2,
    batch_size=8,
    learning_rate=1e-3,
)


@pytest.fixture
def named(tmp_path, model, tokenizer):
    "A folder that stands for a hub id."
    place = tmp_path / "model"
    model.save_pretrained(place), tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture
def task():
    "A task whose configuration is given as overrides, and that is gone afterwards."
    TASKS["pairs"] = Task("pairs", "made-up pairs", {"smoke": QUICK}, prepare_pairs)
    yield "pairs"
    del TASKS["pairs"]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def card(monkeypatch, bf16):
    "Pretend that there is a GPU, with or without bfloat16 of its own; with emulation every card has it."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


def test_precision_follows_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_precision() == (torch.float32, "no")
    for name in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match="needs a GPU"): pick_precision(name)
    card(monkeypatch, True)
    assert pick_precision() == (torch.bfloat16, "bf16") and pick_precision("float16").arguments() == {
        "bf16": False,
        "fp16": True,
    }
    card(monkeypatch, False)
    assert pick_precision() == (torch.float16, "fp16")


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<end>"


def test_weights_are_loaded_in_the_type_that_is_asked_for(named):
    narrow = load_model(named, torch.bfloat16)
    narrow.save_pretrained(named)       # from here on, "as saved" would be bfloat16
    assert {p.dtype for p in load_model(named).parameters()} == {torch.float32} and narrow.dtype == torch.bfloat16
    adapted = get_peft_model(narrow, lora(2))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    with pytest.raises(ValueError, match="at least 1"): lora(0)


def test_fine_tuning_resumes_and_small_batches_change_nothing(named, tokenizer, tmp_path, monkeypatch):
    pairs, _ = prepare(made_up_pairs(12, seed=0), tokenizer, max_length=110, examples=0)
    rows, precision = sft_rows(pairs), pick_precision("float32")
    config = SFTConfig(
        epochs=2, batch_size=4, learning_rate=1e-3, warmup_steps=1, optimizer="adamw_torch", save_steps=2
    )
    tune = lambda name, **more: weights(
        sft(load_model(named), tokenizer, rows, replace(config, **more), folder=tmp_path / name, precision=precision)
    )
    whole = tune("whole")
    torch.testing.assert_close(tune("small", micro_batch=2), whole, rtol=1e-3, atol=1e-5)
    real, calls = pretrained.start.Trainer.training_step, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrained.start.Trainer, "training_step", stops)
    with pytest.raises(KeyboardInterrupt): tune("stopped")
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-2"]
    torch.testing.assert_close(tune("stopped"), whole, rtol=0, atol=0)
    assert len(calls) < 4 + -(-len(rows) // 4) * 2, "it went on from the checkpoint"


def test_only_responses_are_learnt_and_repeats_count_once(tokenizer):
    pairs, _ = prepare(
        [{"prompt": "a", "chosen": "b c", "rejected": "d"}, {"prompt": "a", "chosen": "b c", "rejected": "e"}],
        tokenizer,
        32,
        examples=0,
    )
    (row,) = sft_rows(pairs)
    assert [label for label in row["labels"] if label != -100] == pairs[0]["chosen_ids"] and row["labels"][0] == -100
    assert len(sft_rows(pairs, "rejected")) == 2
    with pytest.raises(ValueError, match="choose a divisor"): pretrained.accumulation(8, 3)


def test_a_merged_adapter_is_a_plain_model(named, tokenizer, tmp_path):
    pairs, _ = prepare(made_up_pairs(8, seed=0), tokenizer, max_length=110, examples=0)
    config = SFTConfig(
        epochs=2,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        optimizer="adamw_torch",
        lora_rank=2,
        gradient_checkpointing=True,
    )
    before, tuned = (
        load_model(named),
        sft(
            load_model(named),
            tokenizer,
            sft_rows(pairs),
            config,
            folder=tmp_path / "work",
            precision=pick_precision("float32"),
        ),
    )
    assert not hasattr(tuned, "peft_config") and [n for n, _ in tuned.named_parameters()] == [
        n for n, _ in before.named_parameters()
    ]
    assert not torch.equal(weights(tuned), weights(before))


def test_held_out_prompts_are_not_trained_on():
    pairs = made_up_pairs(120, seed=1)
    train, held = hold_out(pairs, 30, seed=0)
    assert not set(train["prompt"]) & set(held["prompt"]) and len(train) + len(held) == 120 and len(held) >= 30
    assert hold_out(pairs, 30, seed=1)[1]["prompt"] != held["prompt"]
    with pytest.raises(ValueError, match="lower eval_pairs"): hold_out(pairs, 120, seed=0)


def test_pairs_from_a_file_are_filtered_and_counted(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a b c" if i % 4 else "a", "rejected": "d e"} for i in range(40)]
    rows += [{"prompt": "long", "chosen": "x " * 30, "rejected": "y"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = replace(QUICK, source=str(tmp_path / "pairs.jsonl"), max_words=10, eval_pairs=8, train_pairs=0)
    found = load_pairs(config)
    assert found.info["too_long"] + (len(found.texts) - len(found.train) == 0) == 1 and len(found.eval) <= 8
    assert set(found.train["chosen_words"]) == {1, 3} and found.info["train_longer_chosen"] == sum(
        n == 3 for n in found.train["chosen_words"]
    ) / len(found.train)


def test_the_report_of_a_task_names_no_column_that_the_task_itself_has_added(tokenizer, tmp_path, caplog):
    rows = [{"prompt": f"q{i}", "chosen": "a b c", "rejected": "d e"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = replace(QUICK, source=str(tmp_path / "pairs.jsonl"), eval_pairs=4, train_pairs=0)
    with caplog.at_level("INFO", logger="tokpref"):
        ready = prepared_pairs(load_pairs(config).eval, tokenizer, config, "eval")
    assert "eval: 4 of 4 pairs kept" in caplog.text and "not read" not in caplog.text
    assert ready["chosen_words"][:] == [3] * 4 and ready["rejected_words"][:] == [2] * 4


def test_as_many_pairs_are_held_out_as_were_asked_for(tmp_path):
    "Pairs that are too long are left out before, and not after, so that no error is taken over a single pair."
    rows = [{"prompt": f"q{i}", "chosen": "a b c", "rejected": "d " * (50 if i % 4 else 2)} for i in range(80)]
    rows += [{"prompt": "q0", "chosen": "again " * 50, "rejected": "no"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = load_pairs(replace(QUICK, source=str(tmp_path / "pairs.jsonl"), max_words=10, eval_pairs=9, train_pairs=0))
    assert len(found.eval) == 9 and len(found.train) == 20 - 9 and found.info["eval_pairs"] == 9
    assert not set(found.texts["prompt"]) & set(found.eval["prompt"])
    held = "q0" in found.eval["prompt"]
    assert len(found.texts) == 81 - 9 - held and found.info["too_long"] == len(found.texts) - len(found.train)
    with pytest.raises(ValueError, match="lower eval_pairs"):
        load_pairs(replace(QUICK, source=str(tmp_path / "pairs.jsonl"), max_words=10, eval_pairs=20))


@pytest.mark.skipif(not os.environ.get("TOKPREF_DATA"), reason="TOKPREF_DATA is not set")
def test_length_of_real_pairs():
    "What the source says of its data, counted: the longer answer is chosen in 87 % of the pairs."
    found = load_pairs(HubConfig(source="alpaca_eval-preferences", eval_pairs=0))
    assert found.info["train_pairs"] == 8390 and found.info["eval_pairs"] == 1429
    assert round(found.info["train_longer_chosen"], 2) == round(found.info["eval_longer_chosen"], 2) == 0.87
    assert length_baseline(found.eval)["accuracy"] == pytest.approx(found.info["eval_longer_chosen"] + 0.001, abs=0.002)


def test_accuracies_by_hand():
    found = pair_accuracies(torch.tensor([1.0, -1.0, 2.0, 0.0]), [10, 10, 20, 100], [5, 20, 40, 105])
    assert (
        found["accuracy"] == 0.625
        and found["accuracy_longer"] == 1
        and found["accuracy_shorter"] == pytest.approx(1.5 / 3)
        and found["accuracy_matched"] == 0.5
    )
    assert "accuracy_matched" not in pair_accuracies(torch.ones(1), [1], [9])
    with pytest.raises(ValueError, match="lengths"): pair_accuracies(torch.ones(2), [1], [1])


def test_every_part_of_the_pairs_has_an_error_of_its_own():
    right, chosen, rejected = [1, 1, 1, -1, 1], [1, 1, 1, 1, 9], [5, 5, 5, 5, 2]
    groups = {"first": [True, True, False, False, False], "none": [False] * 5}
    found = pair_accuracies(right, chosen, rejected, prompts="aaabb", groups=groups)
    assert found["accuracy_shorter"] == 0.75 and found["accuracy_shorter_se"] == pytest.approx(0.375)
    assert found["accuracy_longer"] == 1 and "accuracy_longer_se" not in found
    assert found["accuracy_first"] == 1 and found["accuracy_first_se"] == 0 and "accuracy_none" not in found


def test_the_error_of_an_accuracy_is_clustered_by_prompt(named, tokenizer):
    right, words = [1, 1, 1, -1], [1] * 4
    for prompts, error in {"aaab": 0.375, "abcd": 0.25}.items():
        assert pair_accuracies(right, words, words, prompts=prompts)["accuracy_se"] == pytest.approx(error)
    assert pair_accuracies(right, words, words)["accuracy_se"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="4 margins but 3 prompts"): pair_accuracies(right, words, words, prompts="abc")
    rows = [{"prompt": "Q", "chosen": "long " * 3, "rejected": "one"}] * 3
    rows.append({"prompt": "R", "chosen": "one", "rejected": "long " * 3})
    pairs = Dataset.from_list(rows)
    for side, lengths in {"chosen": [3, 3, 3, 1], "rejected": [1, 1, 1, 3]}.items():
        pairs = pairs.add_column(f"{side}_words", lengths)
    assert length_baseline(pairs)["accuracy_se"] == pytest.approx(0.375)
    named_model = load_model(named).eval()
    ready, _ = prepare(pairs, tokenizer, max_length=110, examples=0)
    for side in ("chosen", "rejected"):
        if f"{side}_words" not in ready.column_names:
            ready = ready.add_column(f"{side}_words", list(pairs[f"{side}_words"]))
    measure = PairMeasure(tokenizer, load_model(named).eval(), ready, ready["prompt_ids"][:1], QUICK)
    with torch.no_grad():
        for weight in named_model.parameters(): weight.mul_(1.3)
    accuracy = measure(named_model)
    assert accuracy["accuracy"] in (0, 0.25, 0.75, 1)
    assert accuracy["accuracy_se"] == pytest.approx(0.375 if accuracy["accuracy"] in (0.25, 0.75) else 0)


def test_an_adapter_switched_off_is_the_reference(named, tokenizer):
    pairs = made_up_pairs(10, seed=0)
    ready, _ = prepare(pairs, tokenizer, max_length=110, examples=0)
    for side in ("chosen", "rejected"): ready = ready.add_column(f"{side}_words", list(range(10)))
    adapted = get_peft_model(load_model(named), lora(2))
    for name, p in adapted.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.3)
    measures = [
        PairMeasure(tokenizer, reference, ready, ready["prompt_ids"][:4], QUICK)
        for reference in (None, load_model(named).eval())
    ]
    off, copy = (measure(adapted.eval()) for measure in measures)
    assert off["kl"] > 0.01 and off == pytest.approx(copy, rel=1e-4)
    assert measures[0](load_model(named).eval())["kl"] == pytest.approx(
        0, abs=1e-6
    )  # the start, before there is an adapter


@pytest.mark.parametrize("rank", [0, 2])
def test_a_comparison_on_a_named_model(task, named, tmp_path, rank, monkeypatch):
    more = {
        "model": named,
        "lora_rank": rank,
        "micro_batch": 4,
        "gradient_checkpointing": bool(rank),
        "sft_epochs": 1.0,
        "sft_batch": 16,
        "sft_learning_rate": 1e-3,
        "sft_warmup_steps": 0,
        "nucleus_samples": 2,
        "judge": "longer",
    }
    record = compare(task, out=tmp_path / "out", overrides=more, progress=False)
    assert record["value"] == "accuracy" and record["start"]["accuracy"] == 0.5 and abs(record["start"]["kl"]) < 1e-6
    for run in record["runs"]:
        assert (
            "error" not in run
            and run["metrics"]["kl"] > 0
            and {"accuracy_shorter", "entropy", "self_bleu", "nucleus_entropy", "win_rate"} <= set(run["metrics"])
        )
        assert [point["step"] for point in run["history"]] == [0, 2, 3]
    assert record["problem"]["longer is better"]["accuracy_longer"] == 1 and "accuracy" in comparison_table(record)
    assert (
        list((tmp_path / "out" / "prepared" / "verdicts").glob("*.jsonl"))
        and "wins" in pair_table(record).splitlines()[0]
    )
    assert [line.split()[0] for line in pair_table(record).splitlines()[2:]] == ["start", "longer", "dpo", "tdpo2"]
    assert comparison_figure(record).axes[0].get_ylabel() == "accuracy on held-out pairs"
    monkeypatch.setattr(pretrained.prepare, "sft", None)       # the stage is on disk: nothing may be tuned again
    problem = prepare_pairs(replace(QUICK, **more), tmp_path / "out" / "prepared", progress=False)
    assert not torch.equal(weights(problem.policy), weights(load_model(named))) and (problem.adapter is None) == (
        rank == 0
    )
    assert not list((tmp_path / "out" / "prepared").glob("*.checkpoints"))


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_keeps_the_fast_ways(named, tokenizer, rank, tmp_path, monkeypatch):
    "As in the profiles `colab` and `paper`: the same ways, the same layout, the same weights."
    layouts, chosen = [], one_pass.choose_layout
    monkeypatch.setattr(one_pass, "choose_layout", lambda *args: layouts.append(chosen(*args)) or layouts[-1])
    long = [{**row, "prompt": "What colour is grass? " + row["prompt"]} for row in made_up_pairs(16, 0).to_list()]
    rows, _ = prepare(Dataset.from_list(long), tokenizer, max_length=120, examples=0)
    rows = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    found = []
    for on in (False, True):
        config = replace(QUICK, gradient_checkpointing=on, lora_rank=rank, micro_batch=4)
        layouts.clear()
        trainer = PreferenceTrainer(
            model=load_model(named), ref_model=None if rank else load_model(named), train_dataset=rows,
            processing_class=tokenizer, peft_config=config.adapter(),
            args=PreferenceConfig(
                output_dir=str(tmp_path), loss="tdpo2", max_length=120, max_steps=2, seed=3, report_to=[], **QUIET,
                **config.arguments(pick_precision("float32"), 8)))
        trainer.train()
        trained = trainer.model
        assert isinstance(trained, torch.nn.Module) and checkpoints(trained) == on
        found.append((trainer.engine, list(layouts), weights(trained)))
    assert found[0][0] == found[1][0] == {"one_pass": True, "shared_prompt": True}
    assert found[0][1] == found[1][1] and set(found[1][1]) == {"segments"}
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-5, atol=1e-6)


def test_other_weights_in_the_same_folder_are_another_start_and_another_run(task, named, tmp_path):
    "And the tuned start is a whole model, with its tokenizer."
    more = {"model": named, "sft_epochs": 1.0, "sft_batch": 48, "sft_learning_rate": 1e-3, "sft_warmup_steps": 0,
            "losses": ["dpo"], "steps": 1, "eval_steps": 1}
    again = lambda: compare(task, out=tmp_path / "out", overrides=more, progress=False)
    first = again()
    assert again()["runs"] == first["runs"] and list(first["models"]) == [named]
    (start,) = (tmp_path / "out" / "prepared").glob("sft-*")
    assert load_tokenizer(str(start)).get_vocab() == load_tokenizer(named).get_vocab()
    model = load_model(named)
    with torch.no_grad():
        for weight in model.parameters(): weight.mul_(1.5)
    model.save_pretrained(named)
    second = again()
    assert second["models"][named] != first["models"][named] and second["start"] != first["start"]
    assert len(list((tmp_path / "out" / "prepared").glob("sft-*"))) == len(list((tmp_path / "out/runs").iterdir())) == 2
    assert len(first["answers"]) == len(first["runs"][0]["answers"]) > 1
    with pytest.raises(ValueError, match="differ in models"): merge_records(first, second)


def test_other_rows_in_the_same_file_are_another_start_and_another_run(task, named, tmp_path):
    "A row that is mended in `pairs.jsonl` counts, as other weights in the folder of a model do."
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."} for i in range(24)]
    path = tmp_path / "pairs.jsonl"
    more = {"model": named, "source": str(path), "test_split": "", "eval_pairs": 6, "train_pairs": 0, "sft_epochs": 1.0,
            "sft_batch": 24, "sft_learning_rate": 1e-3, "sft_warmup_steps": 0, "losses": ["dpo"], "steps": 1,
            "eval_steps": 1}

    def again(rows):
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return compare(task, out=tmp_path / "out", overrides=more, progress=False)

    first = again(rows)
    assert again(rows)["runs"] == first["runs"] and list(first["data"]) == [str(path)], "the same rows, written again"
    second = again([{**row, "chosen": row["chosen"] + " Of course it is."} for row in rows])
    assert second["data"] != first["data"] and second["runs"] != first["runs"]
    assert len(list((tmp_path / "out" / "prepared").glob("sft-*"))) == len(list((tmp_path / "out/runs").iterdir())) == 2
    with pytest.raises(ValueError, match="differ in data"): merge_records(first, second)


@pytest.mark.parametrize("judge, error, says", [
    ("reward:nobody/none", FileNotFoundError, "cannot load the judge 'nobody/none'"),
    ("m@http://127.0.0.1:9/v1", PermissionError, "set OPENAI_API_KEY")])
def test_a_judge_that_cannot_be_asked_stops_before_anything_is_tuned(
        task, named, tmp_path, monkeypatch, judge, error, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(pretrained.prepare, "sft", None)
    more = {"model": named, "sft_epochs": 1.0, "judge": judge}
    with pytest.raises(error, match=says): compare(task, out=tmp_path / "out", overrides=more, progress=False)
    monkeypatch.setattr(pretrained.prepare, "load_pairs", None)
    for label in ("ppo", "best-of-2"):      # and no reward is looked for in a task that has none
        with pytest.raises(ValueError, match=f"{label}.*needs a known reward"):
            compare(task, losses=[label], out=tmp_path / "out", overrides=more, progress=False)


def test_a_model_from_scratch_is_kept_with_its_tokenizer(task, tmp_path):
    more = {"losses": ["dpo"], "steps": 1, "eval_steps": 1, "hidden_size": 16, "layers": 1, "heads": 2,
            "lm_tokens": 2000, "vocab_size": 300}
    compare(task, out=tmp_path, overrides=more, progress=False)
    (start,) = (tmp_path / "prepared").glob("language_model-*")
    (words,) = (tmp_path / "prepared").glob("tokenizer-*")
    assert load_tokenizer(str(start)).get_vocab() == load_tokenizer(str(words)).get_vocab()


def test_chat_messages_go_through_the_template(named, tmp_path):
    tokenizer = load_tokenizer(named)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(named)
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    problem = prepare_pairs(
        replace(QUICK, model=named, source=str(tmp_path / "pairs.jsonl"), as_messages=True, eval_pairs=5),
        tmp_path,
        progress=False,
    )
    assert (
        tokenizer.decode(problem.train[0]["prompt_ids"]).replace(" ", "").endswith("assistant:")
        and problem.train["chosen_words"][0] == 3
    )
    with pytest.raises(ValueError, match="no chat template"):
        prepare_pairs(
            replace(QUICK, source=str(tmp_path / "pairs.jsonl"), as_messages=True, eval_pairs=5),
            tmp_path,
            progress=False,
        )


def test_a_run_that_nobody_made_is_left_out_without_a_word(tmp_path, capsys):
    "A published page has no line on what it does not show."
    (tmp_path / "dialogue-nano.json").write_text('{"seeds": [0]}', encoding="utf-8")
    assert measured_runs("dialogue", ("nano", "smol", "paper"), tmp_path) == {"nano": {"seeds": [0]}}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("place", ["here", "beside"])
def test_a_run_of_ones_own_is_read(place, tmp_path, monkeypatch, capsys):
    """What `tokpref compare` wrote where it was started, in the page's folder or at the top.

    But what lies in results/ comes first, and the book's own pages see nothing else.
    """
    (tmp_path / "here").mkdir(), (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path / "here"), monkeypatch.delenv("TOKPREF_RESULTS_ONLY", raising=False)
    own = (tmp_path if place == "beside" else tmp_path / "here") / "runs" / "dialogue-colab" / "comparison.json"
    own.parent.mkdir(parents=True), own.write_text('{"seeds": [7]}', encoding="utf-8")
    assert measured_runs("dialogue", ("colab",), "../results") == {"colab": {"seeds": [7]}}
    assert capsys.readouterr().out.startswith("colab: your own run, ")
    monkeypatch.setenv("TOKPREF_RESULTS_ONLY", "1")
    assert measured_runs("dialogue", ("colab",), "../results") == {}
    monkeypatch.delenv("TOKPREF_RESULTS_ONLY")
    (tmp_path / "results" / "dialogue-colab.json").write_text('{"seeds": [0]}', encoding="utf-8")
    assert measured_runs("dialogue", ("colab",), "../results") == {"colab": {"seeds": [0]}}


def test_results_are_those_of_the_checkout_or_of_a_named_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TOKPREF_RESULTS", raising=False)
    (tmp_path / "results").mkdir()
    (tmp_path / "nbs" / "deep").mkdir(parents=True)
    assert results_folder(tmp_path / "nbs" / "deep") != tmp_path / "results"        # no checkout: the package's
    (tmp_path / "settings.ini").touch()
    assert results_folder(tmp_path / "nbs" / "deep") == tmp_path / "results"
    monkeypatch.chdir(tmp_path / "nbs" / "deep")
    assert stored_result("results/x.json") is None and "x.json is not there" in capsys.readouterr().out
    (tmp_path / "results" / "x.json").write_text("[3]", encoding="utf-8")
    assert stored_result("results/x.json") == [3]
    monkeypatch.setenv("TOKPREF_RESULTS", str(tmp_path / "nbs"))
    assert results_folder() == tmp_path / "nbs"
    monkeypatch.setenv("TOKPREF_RESULTS", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="is not a folder"): results_folder()


def test_fine_tuning_with_another_optimiser_is_another_stage():
    key = lambda **changes: Preparation(pretrained.PAIR_STAGES, replace(QUICK, **changes), Path()).place("sft")
    assert len({key(), key(optimizer="adamw_torch"), key(max_grad_norm=1.0)}) == 3 and key() == key(beta=0.5, steps=7)


@pytest.mark.parametrize("name", ["dialogue", "instructions"])
def test_every_profile_is_sound(name):
    "Losses, steps and batches of every profile fit together; the first one needs neither network nor card."
    profiles = find_task(name).profiles
    smol = [profile for profile in profiles if profile.startswith("smol")]
    assert list(profiles) == ["nano", "smoke", *smol, "colab", "paper"] and smol[0] == "smol"
    for profile, config in profiles.items():
        assert isinstance(config, HubConfig)
        if profile in ("nano", "smoke"): assert config.model == "scratch"
        assert set(resolve_losses(None, config)) == set(config.losses) and config.steps % config.eval_steps == 0
        assert pretrained.accumulation(config.batch_size, config.micro_batch) and pretrained.accumulation(
            config.sft_batch, config.micro_batch
        )
        assert config.max_prompt_length < config.max_length
        if profile in smol:
            assert config.model.endswith("SmolLM2-135M-Instruct") and config.as_messages and len(config.seeds) == 3
            assert not config.gradient_checkpointing, "there is room without it"
            continue
        assert (config.model == "scratch") == (config.lora_rank == 0 and "pythia-2.8b" not in config.model)


def test_a_setting_that_nothing_reads_is_refused():
    "It would be ignored without a word. One that the other settings make use of is taken; so is one that is as it was."
    for task, profile, settings, idle in (
        ("math", "smol-stories", {"judge": "longer", "steps": 3}, "judge"),
        ("math", "smol", {"test_questions": 5}, "test_questions"),
        ("dialogue", "smol", {"hidden_size": 64, "layers": 2}, "hidden_size, layers"),
        ("sentiment", "smol", {"lm_tokens": 100}, "lm_tokens"),
        ("sentiment", "colab", {"passages": 1}, "passages"),
        ("instructions", "nano", {"judged_top_p": 0.5}, "judged_top_p"),
    ):
        with pytest.raises(ValueError, match=f"{task}, profile '{profile}': nothing reads {idle} with these settings"):
            find_task(task).configure(profile, settings)
    for task, profile, settings in (
        ("math", "smol-stories", {"judge": "", "test_questions": 5}),
        ("math", "smol", {"completions": 4, "test_questions": 5}),
        ("dialogue", "smol", {"model": "scratch", "as_messages": False, "hidden_size": 64}),
        ("sentiment", "smol", {"context": 32, "passages": 1}),
        ("instructions", "nano", {"judge": "longer", "judged_top_p": 0.5}),
    ):
        _, config = find_task(task).configure(profile, settings)
        assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("name", ["dialogue", "instructions"])
def test_smoke_needs_no_data(name, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKPREF_DATA", raising=False)
    record = compare(
        name, "smoke", out=tmp_path, overrides={"steps": 2, "eval_steps": 1, "lm_tokens": 5000}, progress=False
    )
    assert not any("error" in run for run in record["runs"]) and len(record["runs"]) == 2


def test_suites_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lm_eval\[hf\]'"): run_suites(tmp_path)


def test_suites_are_asked_for_one_by_one(tmp_path, monkeypatch):
    "A recorder in place of the harness: what it is called with is what its documentation asks for."
    asked = []

    def simple_evaluate(**said):
        asked.append(said)
        return {
            "results": {
                said["tasks"][0]: {
                    "alias": "x",
                    "acc,none": 0.25,
                    "acc_stderr,none": 0.01,
                    "acc_norm,none": 0.5,
                    "acc_norm_stderr,none": "N/A",
                }
            }
        }

    module = types.ModuleType("lm_eval")
    monkeypatch.setattr(module, "simple_evaluate", simple_evaluate, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/base"}), encoding="utf-8"
    )
    suites = {"winogrande": (5, "acc"), "hellaswag": (10, "acc_norm")}
    assert run_suites(tmp_path, suites, limit=3) == {
        "winogrande": {"value": 0.25, "se": 0.01},
        "hellaswag": {"value": 0.5},
    }
    assert [(a["tasks"], a["num_fewshot"], a["model"], a["limit"]) for a in asked] == [
        (["winogrande"], 5, "hf", 3),
        (["hellaswag"], 10, "hf", 3),
    ]
    assert asked[0]["model_args"] == {"pretrained": "some/base", "peft": str(tmp_path)}
    with pytest.raises(ValueError, match="name another metric"): run_suites(tmp_path, {"gsm8k": (5, "exact_match")})


def test_one_dataset_of_made_up_pairs(tmp_path):
    pairs = made_up_pairs(50, seed=3)
    assert (
        isinstance(pairs, Dataset)
        and pairs[:] == made_up_pairs(50, seed=3)[:]
        and all(a != b for a, b in zip(pairs["chosen"], pairs["rejected"], strict=True))
    )
