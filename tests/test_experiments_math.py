"""Stories with sums: one solution each, a checker that finds where another breaks, lists that share no problem."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch

from tokpref import data
from tokpref.evaluation import Samples
from tokpref.experiments import gsm8k
from tokpref.experiments.compare import TASKS, compare, find_task, resolve_losses
from tokpref.experiments.gsm8k import GSM8KConfig
from tokpref.experiments.scratch import ScratchConfig, fresh_model, train_lm, train_tokenizer
from tokpref.experiments.stories import (
    CARELESS,
    breaks,
    careless_solution,
    check_solution,
    draw_problems,
    exact_match,
    final_answer,
    marked_samples,
    math_tokenizer,
    problems,
    solution_pairs,
    split_problems,
)
from tokpref.models import load_tokenizer

PROBLEMS = draw_problems(400, seed="test")


def test_solutions_calculate_and_lead_to_the_answer():
    for p in PROBLEMS:
        sums = [re.search(r"(\d+) ([-+*/]) (\d+) = (\d+)", step).groups() for step in p.steps]
        assert 2 <= len(sums) <= 4 and int(sums[-1][3]) == p.answer
        for a, op, b, c in sums:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op] == int(
                c
            )
        assert all(0 < int(c) <= 199 for *_, c in sums)


def test_numbers_of_a_solution_come_from_the_story_or_from_a_step_before():
    for p in PROBLEMS:
        known = set(re.findall(r"\d+", p.question))
        for step in p.steps:
            a, b, c = re.findall(r"\d+", step)
            assert {a, b} <= known, (p.question, step)
            known.add(c)


def test_some_stories_hold_a_number_that_is_not_needed():
    used = [set(re.findall(r"\d+", " ".join(p.steps))) >= set(re.findall(r"\d+", p.question)) for p in PROBLEMS]
    assert 0.55 < sum(used) / len(used) < 0.9


def test_right_answer_on_another_way_is_seen():
    p = next(p for p in PROBLEMS if len(p.steps) == 3)
    skipped = "\n".join([*p.steps[1:], f"#### {p.answer}"])
    check = check_solution(p, skipped)
    assert check.right and check.step == 0 and check.kind == "plan"


def test_text_behind_the_answer_or_none_at_all_is_no_right_end():
    p = PROBLEMS[0]
    assert check_solution(p, p.solution + "\n#### 1").kind == "end" and not check_solution(p, "\n".join(p.steps)).right
    assert check_solution(p, "").step == 0 and final_answer("####") is None


@pytest.mark.parametrize(
    "text, value",
    [("#### 1,234", 1234), ("A: 5", 5), ("#### 3\n#### 4", 4), ("#### -2", -2), ("A: $12.50", 12.5), ("12", None)],
)
def test_final_answer(text, value): assert final_answer(text) == value


def test_a_careless_pupil_errs_in_one_way_and_goes_on_with_his_own_numbers():
    for p in PROBLEMS:
        for way in CARELESS:
            own = careless_solution(p, way)
            assert own.question == p.question and final_answer(own.solution) == own.answer
            kinds = {check_solution(p, own.solution).kind}
            assert kinds <= {"carry": {"", "slip"}, "sign": {"", "plan"}, "early": {"plan"}}[way], (p, own)
    p = next(
        p
        for p in PROBLEMS
        if [" + " in s for s in p.steps] == [True, True]
        and check_solution(p, careless_solution(p, "carry").solution).step == 0
    )
    first, second = (re.findall(r"\d+", s) for s in careless_solution(p, "carry").steps)
    assert int(first[2]) == int(first[0]) + int(first[1]) - 10 and first[2] in second[:2]
    with pytest.raises(ValueError, match="carry, sign, early"): careless_solution(p, "late")


def test_no_problem_is_in_two_lists(monkeypatch):
    config = replace(
        find_task("math").profiles["smoke"],
        lm_problems=300,
        train_problems=100,
        eval_pair_problems=50,
        eval_problems=50,
    )
    lists = split_problems(config)
    questions = [p.question for part in lists.values() for p in part]
    assert len(set(questions)) == len(questions) == 500 and split_problems(config) == lists
    monkeypatch.setattr(problems, "PEOPLE", problems.PEOPLE[:2])
    monkeypatch.setattr(problems, "THINGS", problems.THINGS[:2])
    with pytest.raises(ValueError, match="ask for fewer"): draw_problems(4000, 0, (1, 1), 8)


def made_samples(tokenizer, texts):
    ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    prompt = tokenizer(PROBLEMS[0].prompt)["input_ids"]
    return Samples([prompt] * len(texts), texts, [prompt] * len(texts), ids, [False] * len(texts), [0] * len(texts))


def test_pairs_are_right_against_wrong_and_drawn_by_the_seed():
    tokenizer, p = math_tokenizer(PROBLEMS, 128), PROBLEMS[0]
    wrong = [p.solution.replace(f"#### {p.answer}", f"#### {p.answer + i}") for i in range(1, 6)]
    samples = made_samples(tokenizer, [p.solution] * 3 + wrong)
    marked = marked_samples(samples, [p])
    assert marked["right"] == [True] * 3 + [False] * 5
    pairs = solution_pairs(marked, 2, seed=0)
    assert (
        len(pairs) == 2
        and set(pairs["chosen"]) == {p.solution}
        and len(set(pairs["rejected"])) == 2
        and set(pairs["rejected"]) <= set(wrong)
    )
    assert {tuple(sorted(solution_pairs(marked, 2, seed)["rejected"])) for seed in range(8)} != {
        tuple(sorted(pairs["rejected"]))
    }
    with pytest.raises(ValueError, match="no problem has a right and a wrong sample"):
        solution_pairs(marked.select([0, 1]), 2, 0)
    numbers = breaks(samples, [p])
    assert numbers["break_step"] == len(p.steps) + 1 and numbers["slips"] == numbers["plans"] == numbers["lucky"] == 0
    assert torch.equal(
        exact_match(samples.prompts, samples.responses, {tuple(samples.prompts[0]): p.answer}),
        torch.tensor([1.0] * 3 + [0.0] * 5),
    )


def test_words_that_are_not_known_are_an_error_of_the_settings():
    with pytest.raises(ValueError, match="set vocab_size"): math_tokenizer(PROBLEMS, 40)


def test_every_granularity_is_a_label():
    runs = resolve_losses(None, find_task("math").profiles["nano"], find_task("math").variants)
    assert runs["adpo-k8"].options == {"window": 8} and runs["adpo-m32"].options == {"segments": 32}
    assert len({(run.loss, tuple(run.options.items())) for run in runs.values()}) == len(runs)


def test_smoke_end_to_end(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKPREF_DATA", raising=False)
    quick = {"lm_tokens": 120_000, "mixed_tokens": 20_000, "steps": 2, "eval_steps": 1, "eval_problems": 8}
    record = compare("math", "smoke", losses=["adpo-m4"], seeds=(0, 1), out=tmp_path, overrides=quick, progress=False)
    assert record["start"]["kl"] == pytest.approx(0, abs=1e-6) and {
        "greedy",
        "solved_any",
        "break_step",
        "lucky",
    } <= set(record["start"])
    assert record["problem"]["train_pairs"] == sum(record["problem"]["kinds"].values()) and [
        run["seed"] for run in record["runs"]
    ] == [0, 1]
    assert find_task("math").configure()[0] == "nano"


CHAT = ("{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer:"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


def test_own_samples_of_a_model_in_a_folder(tmp_path):
    """The way of the profiles `colab` and `paper`, with a small model and stories in the place of GSM8K.

    The questions are chat messages, by the template of a tokenizer of its own: it writes them as the model knows them.
    """
    config = GSM8KConfig(
        model=str(tmp_path / "model"),
        tokenizer_name=str(tmp_path / "tokenizer"),
        as_messages=True,
        questions="stories",
        completions=6,
        train_questions=60,
        test_questions=8,
        lora_rank=4,
        max_length=160,
        max_new_tokens=40,
        eval_batch=64,
        steps=2,
        eval_steps=1,
        batch_size=8,
        micro_batch=4,
        beta=1.0,
        learning_rate=1e-3,
    )
    texts = [f"{p.prompt} {p.solution}" for p in gsm8k.gsm8k_problems(config, "train")]
    tokenizer = train_tokenizer(texts, 360)
    small = ScratchConfig(
        hidden_size=64, layers=1, heads=2, context=128, lm_tokens=250_000, lm_batch=16, lm_learning_rate=1e-2
    )
    model = fresh_model(tokenizer, small)
    train_lm(model, [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts], small)
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    TASKS["gsm8k-test"] = replace(find_task("math"), name="gsm8k-test", profiles={"only": config})
    try: record = compare("gsm8k-test", losses=["dpo"], out=tmp_path / "out", progress=False)
    finally: del TASKS["gsm8k-test"]
    for row in record["answers"]: assert row["prompt"].startswith("Question: ") and row["prompt"].endswith("\nAnswer:")
    (start,) = (tmp_path / "out" / "prepared").glob("start-*")
    assert load_tokenizer(str(start)).chat_template == CHAT
    assert record["problem"]["train_pairs"] > 8 and {"reward", "greedy", "accuracy"} <= set(
        record["runs"][0]["metrics"]
    )
    assert record["start"]["kl"] == pytest.approx(0, abs=1e-5) and record["runs"][0]["metrics"]["kl"] != 0


@pytest.mark.parametrize("as_messages", [False, True])
def test_pairs_are_counted_by_author_as_text_and_as_messages(tmp_path, model, tokenizer, as_messages):
    rows = [{"prompt": f"What is {'a' * i}?", "chosen": f"It is {'b' * i}.", "rejected": "No.",
             "chosen_model": "human" if i % 3 else "6b"} for i in range(1, 19)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    config = GSM8KConfig(model=str(tmp_path / "model"), source=str(tmp_path / "pairs.jsonl"), test_split="",
                         eval_pairs=6, as_messages=as_messages, max_length=100, max_new_tokens=4, prompts=2,
                         precision="float32")
    problem = gsm8k.prepare_gsm8k(config, tmp_path, progress=False)
    authors = {len(row["chosen"]): row["chosen_model"] for row in rows}
    texts = [tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") for ids in problem.eval["chosen_ids"]]
    human = [authors[len(text) + 2] == "human" for text in texts]       # without its two spaces
    assert len(human) == 6 and problem.evaluate.groups == {"person": human, "model": [not h for h in human]}
    found = problem.evaluate(problem.policy)
    assert found["accuracy_person"] == found["accuracy_model"] == 0.5 and found["accuracy_person_se"] == 0


def test_pairs_of_ones_own_need_not_say_who_wrote_them(tmp_path, model, tokenizer):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(18)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    config = GSM8KConfig(model=str(tmp_path / "model"), source=str(tmp_path / "pairs.jsonl"), test_split="",
                         eval_pairs=6, max_length=100, max_new_tokens=4, prompts=2, precision="float32")
    problem = gsm8k.prepare_gsm8k(config, tmp_path, progress=False)
    found = problem.evaluate(problem.policy)
    assert found["accuracy"] == 0.5 and "accuracy_person" not in found


def test_questions_without_a_test_split_stop_before_anything_is_sampled(tmp_path, model, tokenizer):
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    config = GSM8KConfig(model=str(tmp_path / "model"), questions=str(tmp_path / "train.jsonl"), completions=2)
    with pytest.raises(ValueError, match="a file is one split"):
        gsm8k.prepare_gsm8k(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not data.data_root(), reason="needs the data")
def test_given_pairs_know_their_authors(tmp_path):
    quick = {
        "lm_tokens": 20_000,
        "hidden_size": 32,
        "layers": 1,
        "heads": 2,
        "train_pairs": 16,
        "eval_pairs": 24,
        "prompts": 2,
        "max_new_tokens": 8,
        "steps": 2,
        "eval_steps": 2,
        "batch_size": 4,
    }
    record = compare("math", "pairs", losses=["dpo"], seeds=[0], out=tmp_path, overrides=quick, progress=False)
    found = record["runs"][0]["metrics"]
    assert (
        min(found["accuracy_person"], found["accuracy_model"])
        <= found["accuracy"]
        <= max(found["accuracy_person"], found["accuracy_model"])
    )
    test = gsm8k.gsm8k_problems(GSM8KConfig(test_questions=5), "test")
    assert all(final_answer(p.solution) == p.answer and "<<" not in p.solution for p in test) and test[
        0
    ].prompt.startswith("Question: ")
