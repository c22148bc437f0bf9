"""Preference data across formats, files and processes, and on the real sets where they are at hand."""
import copy
import csv
import doctest
import gzip
import importlib
import importlib.util
import json
import os
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars
from datasets.exceptions import DatasetNotFoundError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tokpref.data import LOADERS, Loader, PreferenceCollator, describe_row, load_preferences, load_texts, prepare
from tokpref.data.formats import PARTS, SIDES, split_pair
from tokpref.data.prepare import encode_batch
from tokpref.data.sources import chat_pair, hh_pair, qa_pair, tldr_pair
from tokpref.data.tokens import continue_ids, fit_pair, shorten_chat

disable_progress_bars()
WORDS = [
    "The sky is blue and the sea is green.",
    "What is the answer? The answer is 42.",
    "Question: how many?\nAnswer: three of them.",
    "\n\nHuman: tell me about the sea\n\nAssistant: I would say it is deep",
]
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
ROOT = Path(os.environ.get("TOKPREF_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (ROOT / "Anthropic/hh-rlhf").is_dir(), reason="the real data are not here: set TOKPREF_DATA"
)


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<|user|>", "<|assistant|>"]
    bpe.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.delenv("TOKPREF_DATA", raising=False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def some_rows(n=40):
    return [dict(prompt="What is the answer?" * (1 + i % 7), chosen=f" The answer is {i}." * (1 + i % 5),
                 rejected=f" It is {i} or more" * (1 + i % 3)) for i in range(n)]


def columns(dataset):
    return {name: list(dataset[name]) for name in dataset.column_names}


# preparation

@pytest.mark.parametrize("max_length,max_prompt_length",
                         [(4, None), (4, 2), (7, None), (16, 3), (24, None), (64, 20), (1024, None)])
def test_truncation_invariants(tokenizer, max_length, max_prompt_length):
    rows = some_rows()
    prepared, report = prepare(rows, tokenizer, max_length, max_prompt_length)
    whole, _ = prepare(rows, tokenizer)
    assert report.kept + sum(report.dropped.values()) == len(rows)
    for row in prepared:
        full = whole[row["row"]]
        assert full["prompt_ids"][-len(row["prompt_ids"]):] == row["prompt_ids"]
        assert len(row["prompt_ids"]) <= (max_prompt_length or max_length)
        assert row["cut"][0] == len(full["prompt_ids"]) - len(row["prompt_ids"])
        for k, side in enumerate(("chosen_ids", "rejected_ids"), start=1):
            assert row[side][-1] == tokenizer.eos_token_id and len(row["prompt_ids"]) + len(row[side]) <= max_length
            assert row[side][:-1] == full[side][: len(row[side]) - 1] and row["cut"][k] == len(full[side]) - len(
                row[side]
            )
    assert report.truncated["prompt"] == sum(c[0] > 0 for c in prepared["cut"])


def test_prompt_gives_way_only_to_half(tokenizer):
    (row,), _ = prepare(
        [dict(prompt="The sky is blue" * 20, chosen=" green" * 30, rejected=" no")], tokenizer, max_length=20
    )
    assert len(row["prompt_ids"]) == 10 and len(row["chosen_ids"]) == 10
    (row,), _ = prepare([dict(prompt="The sky is blue" * 20, chosen=" yes", rejected=" no")], tokenizer, max_length=20)
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) == 20 and row["cut"][1:] == [
        0,
        0,
    ]


def test_processes_change_nothing(tokenizer):
    one, report = prepare(Dataset.from_list(some_rows()), tokenizer, max_length=24)
    two, again = prepare(Dataset.from_list(some_rows()), tokenizer, max_length=24, num_proc=2)
    assert columns(one) == columns(two) and report == again


def test_errors_cross_processes(tokenizer):
    rows = [row | dict(chosen_weights=[1.0], rejected_weights=[1.0]) for row in some_rows(4)]
    with pytest.raises(ValueError, match="toy: row [0-3]: chosen_weights needs one number per response token"):
        prepare(Dataset.from_list(rows), tokenizer, name="toy", num_proc=2)


def test_batches_of_only_bad_rows(tokenizer):
    rows = [dict(prompt="", chosen="a", rejected="b")] * 501 + some_rows(
        3
    )  # the first batch of the map has no good row
    prepared, report = prepare(rows, tokenizer)
    assert list(prepared["row"]) == [501, 502, 503] and report.dropped == {"empty prompt": 501}
    assert report.dropped_rows["empty prompt"] == [0, 1, 2, 3, 4] and "rows 0, 1, 2, 3, 4, ..." in str(report)


def test_null_cells_are_empty_responses(tokenizer):
    for rows in (
        some_rows(2),
        [
            dict(
                prompt=[dict(role="user", content="a")],
                chosen=[dict(role="assistant", content="b")],
                rejected=[dict(role="assistant", content="c")],
            )
        ],
    ):
        _, report = prepare(rows + [rows[0] | dict(rejected=None)], tokenizer)
        assert report.dropped == {"empty rejected": 1} and report.kept == len(rows)


def test_weights_follow_their_tokens(tokenizer):
    pair = dict(prompt="The sea is", chosen=" green and blue and green", rejected=" blue")
    (whole,), _ = prepare([pair], tokenizer)
    sizes = {side: len(whole[f"{side}_ids"]) for side in ("chosen", "rejected")}
    weights = {f"{side}_weights": [float(i) for i in range(n)] for side, n in sizes.items()}
    room = len(whole["prompt_ids"]) + 4
    (row,), _ = prepare([pair | weights], tokenizer, max_length=room, max_prompt_length=room - 4)
    assert row["chosen_weights"] == [0.0, 1.0, 2.0, sizes["chosen"] - 1.0] and len(row["chosen_ids"]) == 4
    weights["chosen_weights"][1] = float("inf")
    with pytest.raises(ValueError, match="row 0: chosen_weights holds a value that is not finite"):
        prepare([pair | weights], tokenizer)
    with pytest.raises(ValueError, match="come together"): prepare([pair | dict(chosen_weights=[1.0])], tokenizer)


@pytest.mark.parametrize("change,error,words", [
    (lambda d: d.remove_columns("rejected"), ValueError, "no column 'rejected'"),
    (lambda d: d.remove_columns("chosen").add_column("chosen", [1] * len(d)), TypeError, "column 'chosen' is Value"),
    (lambda d: DatasetDict(train=d), TypeError, "choose a split"),
    (lambda d: d.select([]), ValueError, "no rows"),
    (lambda d: d.to_iterable_dataset(), TypeError, "IterableDataset"),
])
def test_schema_errors_are_one_line(tokenizer, change, error, words):
    with pytest.raises(error, match=words) as caught: prepare(change(Dataset.from_list(some_rows(3))), tokenizer)
    assert "\n" not in str(caught.value)


def test_message_content_must_be_text(tokenizer):
    parts = [dict(role="assistant", content=[dict(type="text", text="a")])]
    rows = [dict(prompt=[dict(role="user", content="x")], chosen=parts, rejected=parts)]
    with pytest.raises(TypeError, match="row 0: a message's content is a list"):
        encode_batch({part: [rows[0][part]] for part in rows[0]}, [0], tokenizer, dict(name="toy"))


def test_several_turns(tokenizer):
    user, reply = dict(role="user", content="What is the sky?"), dict(role="assistant", content="It is blue.")
    last = [dict(role="assistant", content="The sea."), dict(role="assistant", content="It is green.")]
    explicit = dict(prompt=[user, reply, user], chosen=last[:1], rejected=last[1:])
    implicit = {side: explicit["prompt"] + explicit[side] for side in ("chosen", "rejected")}
    (a,), _ = prepare([explicit], tokenizer)
    (b,), _ = prepare([implicit], tokenizer)
    assert a == b and tokenizer.decode(a["chosen_ids"]) == "The sea.<eos>"
    prompt = tokenizer.apply_chat_template(explicit["prompt"], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(a["prompt_ids"]) == prompt


def test_a_user_turn_is_never_scored(tokenizer):
    user, reply = dict(role="user", content="What is the sky?"), lambda text: dict(role="assistant", content=text)
    late = {
        side: [user, reply("It is blue."), user, reply(text)]
        for side, text in (("chosen", "The sea."), ("rejected", "It is green."))
    }
    early = {
        side: [user, reply(text), user, reply("It is 42.")]
        for side, text in (("chosen", "The sea."), ("rejected", "It is green."))
    }
    rows, report = prepare(
        [dict(late, prompt=None), early, dict(prompt=[user], chosen=[reply("a")], rejected=[reply("b"), user])],
        tokenizer,
    )
    assert rows["row"] == [0] and report.dropped == {"user turn in chosen": 1, "user turn in rejected": 1}
    with pytest.raises(ValueError, match="row 1: user turn in chosen"):
        prepare([late, early], tokenizer, on_bad_row="raise")


def test_messages_beside_text_are_refused(tokenizer):
    row = dict(prompt=[dict(role="user", content="What is the sky?")], chosen="It is blue.", rejected="It is green.")
    with pytest.raises(TypeError, match="row 0: prompt is chat messages and the responses are text: use one format"):
        prepare([row], tokenizer)
    good = dict(row, chosen=[dict(role="assistant", content="a")], rejected=[dict(role="assistant", content="b")])
    assert prepare([good, dict(good, chosen=None), dict(good, chosen=None, rejected=None)], tokenizer)[1].dropped == {
        "empty chosen": 2
    }


def test_tools_reach_the_template(tokenizer):
    knows = deepcopy(tokenizer)
    knows.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    schema = lambda name, **fields: dict(
        type="function", function=dict(name=name, parameters=dict(type="object", properties=fields))
    )
    city, number = schema("sea", city=dict(type="string")), schema("answer", number=dict(type="integer"))
    say = lambda role, content: [dict(role=role, content=content)]
    pair = dict(prompt=say("user", "x"), chosen=say("assistant", "a"), rejected=say("assistant", "b"))
    for stored in (lambda tools: tools, json.dumps):  # as Arrow structs, and as text
        rows, _ = prepare(
            [dict(pair, tools=stored([city])), dict(pair, tools=stored([number])), dict(pair, tools=None)], knows
        )
        prompts = [knows.decode(row["prompt_ids"]) for row in rows]
        for tools, prompt in zip(([city], [number], None), prompts, strict=True):
            assert prompt == knows.apply_chat_template(
                pair["prompt"], tools=tools, tokenize=False, add_generation_prompt=True
            )
    assert "tools" not in rows.column_names
    shared, _ = prepare([pair, dict(pair)], knows, chat_template_kwargs={"tools": [city]})
    assert knows.decode(shared[0]["prompt_ids"]) == prompts[0]
    with pytest.raises(ValueError, match="row 0: tools is text, but not the JSON"):
        prepare([dict(pair, tools="[broken")], knows)


def test_template_arguments_without_a_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="chat_template_kwargs=.* would be ignored: the pairs are text"):
        prepare(some_rows(2), tokenizer, chat_template_kwargs={"enable_thinking": False})


def test_template_that_ends_with_another_token_gets_the_end_token(tokenizer):
    plain = deepcopy(tokenizer)
    plain.chat_template = TEMPLATE.replace("<eos>", "")
    say = lambda role, content: [dict(role=role, content=content)]
    rows = [dict(prompt=say("user", "x"), chosen=say("assistant", "a"), rejected=say("assistant", "b"))]
    (row,), _ = prepare(rows, plain)
    assert plain.decode(row["chosen_ids"]) == "a\n<eos>" and row["chosen_ids"].count(plain.eos_token_id) == 1


def test_begin_and_end_token_stand_once(tokenizer):
    "Whether the texts have them already or not."
    opening = deepcopy(tokenizer)
    opening.add_special_tokens({"bos_token": "<s>"})
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", opening.bos_token_id)])
    rows = [dict(prompt=start + "The sky is", chosen=" blue" + end, rejected=" green" + end)
            for start in ("", "<s>") for end in ("", "<eos>")]
    prepared, _ = prepare(rows, opening)
    for name in ("prompt_ids", "chosen_ids"): assert len({tuple(ids) for ids in prepared[name]}) == 1
    row = prepared[0]
    assert row["prompt_ids"][0] == opening.bos_token_id and row["prompt_ids"].count(opening.bos_token_id) == 1
    assert row["chosen_ids"][-1] == opening.eos_token_id and row["chosen_ids"].count(opening.eos_token_id) == 1


def test_a_conversation_that_goes_on_behind_the_other_keeps_a_turn_of_both():
    turns = [dict(role="user", content="q"), dict(role="assistant", content="a"), dict(role="assistant", content="b")]
    assert split_pair({"chosen": turns, "rejected": turns[:2]}) == (turns[:1], turns[1:], turns[1:2])


def test_a_question_as_text_stays_beside_an_answer_of_several_messages(tokenizer):
    say = lambda role, content: dict(role=role, content=content)
    steps = [say("assistant", "I look."), say("tool", "blue"), say("assistant", "It is blue.")]
    row = dict(prompt="What is the sky?", chosen=steps, rejected=[say("assistant", "It is green.")])
    (ready,), _ = prepare([row], tokenizer)
    assert tokenizer.decode(ready["prompt_ids"]) == "<|user|>What is the sky?<eos>\n<|assistant|>"
    answer = "I look.<eos>\n<|tool|>blue<eos>\n<|assistant|>It is blue.<eos>"
    assert (
        tokenizer.decode(ready["chosen_ids"]) == answer
        and tokenizer.decode(ready["rejected_ids"]) == "It is green.<eos>"
    )
    (other,), _ = prepare([dict(row, chosen=row["rejected"], rejected=steps)], tokenizer)
    assert other["prompt_ids"] == ready["prompt_ids"] and other["rejected_ids"] == ready["chosen_ids"]
    whole = [say("system", "Be short."), say("user", " What is the sky?\n")]
    (again,), _ = prepare([dict(row, **{side: whole + row[side] for side in ("chosen", "rejected")})], tokenizer)
    assert (
        tokenizer.decode(again["prompt_ids"]).count("What is the sky?") == 1
        and again["chosen_ids"] == ready["chosen_ids"]
    )
    with pytest.raises(ValueError, match="row 0: prompt is text, but not a user turn of the conversations"):
        prepare(
            [dict(row, prompt="What is the sea?", **{side: whole + row[side] for side in ("chosen", "rejected")})],
            tokenizer,
        )


def spaced_tokenizer(kind, letters="▁\n:()<|>abcdefghijklmnopqrstuvwxyz", words=None):
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "legacy":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    elif kind == "bytes":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    else:
        bpe.pre_tokenizer, bpe.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme=kind),
            decoders.Metaspace(prepend_scheme=kind),
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else list(letters)
    bpe.train_from_iterator((words or WORDS) * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<eos>"], initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    return tokenizer


@pytest.mark.parametrize("kind", ["always", "first", "never", "legacy", "bytes"])
def test_no_space_comes_in_between_prompt_and_response(tokenizer, kind):
    texts = [
        ("answer:", " three"),
        ("answer: ", "three"),
        ("What is (", "the sea)"),
        ("sea\n", "is deep"),
        ("sea", "\n\nis"),
    ]
    for each in (spaced_tokenizer(kind), tokenizer):
        lead = " " if each.decode(each("a", add_special_tokens=False)["input_ids"]) == " a" else ""
        for prompt, response in texts:
            (row,), _ = prepare([dict(prompt=prompt, chosen=response, rejected=" other")], each)
            assert each.decode(row["prompt_ids"] + row["chosen_ids"]) == lead + prompt + response + "<eos>"
        say = lambda role, content: [dict(role=role, content=content)]
        chat = dict(
            prompt=say("user", "What is the sea?"), chosen=say("assistant", "deep"), rejected=say("assistant", "blue")
        )
        (row,), _ = prepare([chat], each)
        whole = str(each.apply_chat_template(chat["prompt"] + chat["chosen"], tokenize=False))
        assert each.decode(row["prompt_ids"] + row["chosen_ids"]) == lead + whole.removesuffix("<eos>\n") + "<eos>"


@pytest.mark.parametrize("kind", ["always", "first", "legacy", "bytes"])
def test_a_small_vocabulary_tells_its_spaces_too(kind):
    each = spaced_tokenizer(kind, letters="▁:thre(sa\n)", words=["three the seas : (sea)"])
    texts = [("three:", " three"), ("three:", "three"), ("three: ", "three"), ("(", "sea)"), ("the\n", "\nsea")]
    for prompt, response in texts:
        (row,), _ = prepare([dict(prompt=prompt, chosen=response, rejected=" the")], each)
        assert str(each.decode(row["prompt_ids"] + row["chosen_ids"])).removeprefix(" ") == prompt + response + "<eos>"


def test_a_tokenizer_that_drops_white_space_keeps_words_apart():
    bpe = spaced_tokenizer("always").backend_tokenizer
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), bpe.pre_tokenizer])     # as T5's
    each = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")
    for prompt, response, read in (("answer: ", "three", "answer: three"), ("answer:", " three", "answer: three"),
                                   ("sea\n", "is deep", "sea is deep"), ("What is (", "the sea)", "What is (the sea)")):
        (row,), _ = prepare([dict(prompt=prompt, chosen=response, rejected=" other")], each)
        assert str(each.decode(row["prompt_ids"] + row["chosen_ids"][:-1])).strip() == read


def test_a_tokenizer_without_that_space_is_asked_for_plain_ids(tokenizer):
    for text in (" three", "three", "\n\nthe sea", ""):
        assert continue_ids([text], tokenizer) == [tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("declared", [{}, {"unk_token": "<unk>"}])
def test_a_tokenizer_of_whole_words_keeps_them(declared):
    vocab = {word: place for place, word in enumerate(("<unk>", "<eos>", "yes", "no"))}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", **declared)
    assert continue_ids(["yes", "no yes"], tokenizer) == [[2], [3, 2]]


def test_function_calls_are_content_and_keep_their_own_arguments(tokenizer, tmp_path):
    knows = deepcopy(tokenizer)
    knows.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.content }}"
                           "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>\n{% endfor %}"
                           "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    call = lambda **arguments: dict(type="function", function=dict(name="look", arguments=arguments))
    answer = lambda **fields: [dict(role="assistant", **fields)]
    rows = [
        dict(prompt="When?", chosen=answer(tool_calls=[call(year=1)]), rejected=answer(content="Now.")),
        dict(
            prompt="Where?", chosen=answer(tool_calls=[call(city="x")], content=None), rejected=answer(content="Here.")
        ),
        dict(prompt="Who?", chosen=answer(content="Me."), rejected=answer(content="I.", tool_calls=[call(city="y")])),
    ]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in (rows, Dataset.from_list(rows), load_preferences(tmp_path / "calls.jsonl")):
        prepared, report = prepare(given, knows)
        assert report.kept == 3
        for row, ready in zip(rows, prepared, strict=True):
            for side in ("chosen", "rejected"):
                whole = knows.apply_chat_template(
                    [dict(role="user", content=row["prompt"]), *row[side]], tokenize=False
                )
                assert knows.decode(ready["prompt_ids"] + ready[f"{side}_ids"]) == whole.removesuffix("\n")
    nothing = rows + [dict(rows[0], chosen=answer(content="", tool_calls=[]))]
    assert prepare(nothing, knows)[1].dropped == {"empty chosen": 1}


def test_function_calls_that_a_template_leaves_out_are_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}<eos>{% endfor %}" \
                              "{% if add_generation_prompt %}assistant: {% endif %}"
    say = lambda role, content, **more: [dict(role=role, content=content, **more)]
    row = dict(prompt=say("user", "go"), chosen=say("assistant", "I look.", tool_calls=[{"name": "look"}]),
               rejected=say("assistant", "no"))
    with pytest.raises(ValueError, match="train: row 0: the chat template leaves out the function calls of chosen"):
        prepare([row], tokenizer)
    with pytest.raises(ValueError, match="the chat template leaves out the function calls of rejected"):
        prepare([dict(row, chosen=row["rejected"], rejected=say("assistant", None, function_call={"name": "look"}))],
                tokenizer)
    thoughts = dict(row, chosen=say("assistant", "", reasoning_content="I look."))
    good = dict(row, chosen=say("assistant", "yes"))
    rows, report = prepare([thoughts, good, dict(good, tools=[{"name": "look"}])], tokenizer)
    assert report.dropped == {"chosen is empty once tokenised": 1} and rows["row"] == [1, 2]
    assert report.unread == ["tools (not in the chat template)"]


def test_instructions_in_both_answers_go_before_the_question(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}" \
                              "{% if add_generation_prompt %}assistant: {% endif %}"
    say = lambda role, content: dict(role=role, content=content)
    for role in ("system", "developer"):
        answers = {side: [say(role, "be short"), say("assistant", word)]
                   for side, word in (("chosen", "yes"), ("rejected", "no"))}
        for prompt in ("is it", [say("user", "is it")], [say(role, "be short"), say("user", "is it")]):
            (row,), _ = prepare([dict(prompt=prompt, **answers)], tokenizer)
            assert tokenizer.decode(row["prompt_ids"]) == f"{role}: be short<eos>user: is it<eos>assistant: "
            assert tokenizer.decode(row["chosen_ids"]) == "yes<eos>"
        answers["rejected"][0] = say(role, "be long")
        with pytest.raises(ValueError, match=f"{role} turn in chosen"):
            prepare([dict(prompt="is it", **answers)], tokenizer)


def test_a_conversation_keeps_what_its_turns_hold(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
                               "{{ c | tojson }}{% endfor %}<eos>{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    turn = lambda who, value, **more: {"from": who, "value": value, **more}
    rows = [dict(conversations=[turn("human", "go"), turn("gpt", "I go"), turn("tool", "gone")],
                 chosen=turn("gpt", "", tool_calls=[{"name": "a", "arguments": {"x": 1}}]), rejected=turn("gpt", "no")),
            dict(conversations=[turn("human", "go")], rejected=turn("gpt", "no"),
                 chosen=turn("gpt", "", tool_calls=[{"name": "b", "arguments": {"y": "z"}}]))]
    for data in (rows, Dataset.from_list(rows)):
        kept, _ = prepare(data, tokenizer)
        assert tokenizer.decode(kept[0]["prompt_ids"]) == "user: go<eos>assistant: I go<eos>tool: gone<eos>assistant: "
        calls = ('{"name": "a", "arguments": {"x": 1}}<eos>', '{"name": "b", "arguments": {"y": "z"}}<eos>')
        for row, call in zip(kept, calls, strict=True): assert tokenizer.decode(row["chosen_ids"]) == call


def test_a_null_that_somebody_wrote_stays(tokenizer):
    knows = deepcopy(tokenizer)
    knows.chat_template = "{{ tools | tojson }}" + TEMPLATE
    say = lambda role, content: [dict(role=role, content=content)]
    pair = dict(prompt=say("user", "x"), chosen=say("assistant", "a"), rejected=say("assistant", "b"))
    rows = [dict(pair, tools=[dict(name="sea", default=None)]), dict(pair, tools=[dict(name="sky", size=1)])]
    for given in (rows, [dict(row, tools=json.dumps(row["tools"])) for row in rows], Dataset.from_list(rows[:1])):
        for row, ready in zip(rows, prepare(given, knows)[0], strict=False):     # the last holds one row
            assert knows.decode(ready["prompt_ids"]).startswith(json.dumps(row["tools"]))


@pytest.mark.parametrize(
    "wrong,words",
    [
        ([None], "a message of chosen is no dictionary"),
        ([{"content": "a"}], "with a role"),
        ({"content": "a"}, "chosen is a dict"),
        ("a", "use one format"),
    ],
)
def test_rows_of_another_shape_are_named(tokenizer, wrong, words):
    say = lambda role, content: [dict(role=role, content=content)]
    good = dict(prompt=say("user", "x"), chosen=say("assistant", "a"), rejected=say("assistant", "b"))
    with pytest.raises(TypeError, match=f"row 1: .*{words}"): prepare([good, dict(good, chosen=wrong)], tokenizer)


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_format_of_the_dataset_changes_nothing(tokenizer, form):
    rows = [row | dict(chosen_weights=None, rejected_weights=None) for row in some_rows(3)]
    plain = prepare(some_rows(3), tokenizer)[0]
    for row, ready in zip(rows, plain, strict=True):
        row |= {f"{side}_weights": [0.5] * len(ready[f"{side}_ids"]) for side in ("chosen", "rejected")}
    given = Dataset.from_list(rows)
    expected, ready = prepare(given, tokenizer)[0], prepare(given.with_format(form), tokenizer)[0]
    assert columns(expected) == columns(ready)
    one, other = (PreferenceCollator(0)(list(rows)) for rows in (expected, ready.with_format(form)))
    for name in one: torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("bad,words", [
    ({"prompt": "a\ud800b"}, r"rows: row 1: prompt holds half a character \('\\ud800'"),
    ({"chosen": "\udfff"}, "rows: row 1: chosen holds half a character"),
    ({"chosen": 3}, "rows: row 1: chosen is a int, and in row 0 a str"),
    ("a", "rows: row 1 is a str: it must be a dictionary"),
])
def test_a_row_that_cannot_stand_in_a_table_is_named(tokenizer, bad, words):
    rows = some_rows(3)
    rows[1] = bad if isinstance(bad, str) else rows[1] | bad
    with pytest.raises((TypeError, ValueError), match=words) as caught: prepare(rows, tokenizer, name="rows")
    assert "\n" not in str(caught.value)


def test_half_a_character_in_a_name_is_named(tokenizer):
    with pytest.raises(ValueError, match="row 1: .*holds half a character"):
        pair = dict(prompt="a", chosen="b", rejected="c")
        prepare([pair, {**pair, "\ud83d": 1}], tokenizer)


def test_half_a_character_in_a_message_is_named(tokenizer):
    say = lambda role, content: [dict(role=role, content=content)]
    good = dict(prompt=say("user", "x"), chosen=say("assistant", "a"), rejected=say("assistant", "b"))
    whole = dict(good, chosen=say("assistant", "\U0001f600"))      # two halves that belong together are a character
    assert prepare([good, whole], tokenizer)[1].kept == 2
    with pytest.raises(ValueError, match="row 2: rejected holds half a character"):
        prepare([good, whole, dict(good, rejected=say("assistant", "\ud83d"))], tokenizer)


def test_what_is_no_tokenizer_is_told_what_to_pass(tokenizer):
    processor = SimpleNamespace(tokenizer=tokenizer)
    for wrong, words in ((processor, "pass the tokenizer inside it"), ("gpt2", "a str is no"),
                         (tokenizer.backend_tokenizer, "wrap it")):
        with pytest.raises(TypeError, match=words): prepare(some_rows(1), wrong)


def test_pairs_that_became_the_same_say_where(tokenizer):
    trims = deepcopy(tokenizer)
    trims.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    say = lambda role, content: [dict(role=role, content=content)]
    pair = dict(prompt=say("user", "x"), chosen=say("assistant", "b"), rejected=say("assistant", "a"))
    same = dict(pair, rejected=say("assistant", " b\n"))
    long = dict(pair, chosen=say("assistant", "the sea" * 20), rejected=say("assistant", "the sea" * 21))
    _, report = prepare([pair, same, long], trims, max_length=24)
    assert report.dropped == {"identical once tokenised": 1, "identical once truncated": 1}
    assert report.dropped_rows == {"identical once tokenised": [1], "identical once truncated": [2]}
    lower = deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert prepare([dict(prompt="x", chosen=" Yes", rejected=" yes"), *some_rows(1)], lower)[1].dropped == {
        "identical once tokenised": 1}


# chat prompts that are too long

def chat_tokenizer(tokenizer, bos, template):
    "The tokenizer of the tests with turns that begin and end as in `template`."
    chat = deepcopy(tokenizer)
    chat.add_special_tokens({"bos_token": bos, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.eos_token, chat.chat_template = "<|im_end|>", template
    return chat


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("bos,template", [("<|im_start|>", CHATML), ("<s>", "<s>" + CHATML)])
@pytest.mark.parametrize(
    "limits", [dict(max_length=90), dict(max_length=200, max_prompt_length=75), dict(max_length=60)])
def test_a_chat_loses_whole_turns_and_keeps_its_system_message(tokenizer, bos, template, limits):
    chat = chat_tokenizer(tokenizer, bos, template)
    say = lambda role, content: dict(role=role, content=content)
    turns = [say("user" if i % 2 == 0 else "assistant", f"Tell me about number {i}.") for i in range(9)]
    system = say("system", "Be kind.")
    pair = dict(prompt=[system, *turns], chosen=[say("assistant", "blue")], rejected=[say("assistant", "green")])
    (row,), report = prepare([pair], chat, **limits)
    text = chat.decode(row["prompt_ids"])
    render = lambda messages: str(chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    whole = [render([system, *turns[i:]]) for i in range(0, 9, 2)]
    longest = max(len(row[f"{side}_ids"]) for side in ("chosen", "rejected"))
    room = limits.get("max_prompt_length") or limits["max_length"] - longest
    sizes = [len(chat(text, add_special_tokens=False)["input_ids"]) for text in whole]
    fitting = next(text for text, size in zip(whole, sizes, strict=True) if size <= room)
    assert text == fitting and whole.index(fitting) > 0         # as much as fits, and no part of a turn
    assert len(row["prompt_ids"]) <= room and report.truncated["prompt"] == 1
    assert row["cut"][0] == sizes[0] - len(row["prompt_ids"])
    assert chat.decode(row["chosen_ids"]) == "blue<|im_end|>"


@pytest.mark.parametrize("bos,template", [("<|im_start|>", CHATML), ("<s>", "<s>" + CHATML)])
def test_a_turn_that_is_too_long_loses_the_beginning_of_its_text(tokenizer, bos, template):
    chat = chat_tokenizer(tokenizer, bos, template)
    say = lambda role, content: dict(role=role, content=content)
    question = "".join(f"{i} is less than {i + 1}. " for i in range(40)) + "What is more?"
    pair = dict(prompt=[say("system", "Be kind."), say("user", question)], chosen=[say("assistant", "41")],
                rejected=[say("assistant", "39")])
    for room in (60, 100, 200):
        (row,), _ = prepare([pair], chat, max_length=2 * room, max_prompt_length=room)
        text = chat.decode(row["prompt_ids"])
        begin, end = render_parts(chat, pair["prompt"], question)
        kept = text.removeprefix(begin).removesuffix(end)
        assert text == begin + kept + end and question.endswith(kept) and "What is more?" in kept
        assert room - 12 < len(row["prompt_ids"]) <= room       # no more is lost than must be
    instructions = dict(pair, prompt=[say("system", question), say("user", "What is more?")])
    (row,), _ = prepare([instructions], chat, max_length=200, max_prompt_length=100)
    text = chat.decode(row["prompt_ids"])
    assert "user\nWhat is more?<|im_end|>" in text and "system\n0 is less than 1. 1 is" in text
    (row,), _ = prepare([pair], chat, max_length=8)          # less room than the template alone needs
    assert 0 < len(row["prompt_ids"]) < 8 and (row["prompt_ids"][0] == chat.bos_token_id) == (bos == "<s>")


def render_parts(chat, messages, content):
    "What a template writes before and after a message's text."
    whole = str(chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    begin, end = whole.split(content)
    return begin, end


def test_a_template_that_refuses_half_a_talk_loses_the_exchange(tokenizer):
    say = lambda role, content: dict(role=role, content=content)
    turns = [say("user" if i % 2 == 0 else "assistant", f"This is number {i}.") for i in range(5)]
    plain = chat_tokenizer(tokenizer, "<|im_start|>", CHATML)
    rest = plain.apply_chat_template(turns[2:], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = shorten_chat(turns, len(rest) + 3, plain, None)
    refusing = deepcopy(plain)
    refusing.chat_template = ("{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}"
                              + CHATML)
    assert shorten_chat(turns, len(rest) + 3, refusing, None) == ids == rest


def test_max_prompt_length_is_a_number(tokenizer):
    with pytest.raises(TypeError, match="max_prompt_length must be a number of tokens, or None, got '3'"):
        prepare([dict(prompt="a", chosen="b", rejected="c")], tokenizer, max_prompt_length="3")


def test_max_length_is_a_number(tokenizer):
    with pytest.raises(TypeError, match="max_length must be a number of tokens, got None"):
        prepare(some_rows(1), tokenizer, None)


# collation

@pytest.mark.parametrize("side,multiple", [("right", None), ("left", None), ("right", 8), ("left", 8)])
def test_what_the_mask_keeps_is_the_response(tokenizer, side, multiple):
    prepared, _ = prepare(some_rows(6), tokenizer, max_length=48)
    prepared = prepared.select(range(5, -1, -1))
    batch = PreferenceCollator(tokenizer.eos_token_id, side, multiple)(list(prepared))
    responses = list(prepared["chosen_ids"]) + list(prepared["rejected_ids"])
    prompts = list(prepared["prompt_ids"]) * 2
    masks = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    for ids, there, scored, prompt, response in zip(batch["input_ids"], *masks, prompts, responses, strict=True):
        assert (
            ids[scored].tolist() == response
            and ids[there].tolist() == prompt + response
            and not (scored & ~there).any()
        )
        assert (there[0] or side == "left") and (there[-1] or side == "right")
    assert multiple is None or batch["input_ids"].shape[1] % multiple == 0
    assert batch["row"].tolist() == [5, 4, 3, 2, 1, 0] and "weights" not in batch and "ref_logps" not in batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_weights_stand_at_their_tokens(tokenizer, side):
    prepared, _ = prepare(some_rows(3), tokenizer)
    rows = [row | {f"{part}_weights": [token + 0.5 for token in row[f"{part}_ids"]] for part in ("chosen", "rejected")}
            for row in prepared]
    batch = PreferenceCollator(0, side)(rows)
    expected = torch.where(batch["completion_mask"].bool(), batch["input_ids"] + 0.5, 0.0)
    torch.testing.assert_close(batch["weights"], expected)


def test_loader_with_workers(tokenizer):
    prepared, _ = prepare(some_rows(7), tokenizer)
    collate = PreferenceCollator(tokenizer.pad_token_id)
    plain, forked = (list(DataLoader(prepared, batch_size=3, collate_fn=collate, num_workers=n)) for n in (0, 2))
    for a, b in zip(plain, forked, strict=True):
        for name in a: torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("side", ["right", "left"])
def test_ref_logps_are_left_aligned(tokenizer, side):
    prepared, _ = prepare(some_rows(3), tokenizer)
    values = {
        part: [[-1.0 - i for i in range(len(ids))] for ids in prepared[f"{part}_ids"]]
        for part in ("chosen", "rejected")
    }
    rows = [row | {f"{part}_ref_logps": values[part][i] for part in values} for i, row in enumerate(prepared)]
    ref_logps = PreferenceCollator(0, side, pad_to_multiple_of=16)(rows)["ref_logps"]
    expected = values["chosen"] + values["rejected"]
    assert ref_logps.shape == (6, max(map(len, expected)))
    assert [row[row < 0].tolist() for row in ref_logps] == expected and bool((ref_logps[:, 0] == -1).all())


def test_ref_logps_of_another_length_are_refused(tokenizer):
    prepared, _ = prepare(some_rows(1), tokenizer)
    row = prepared[0] | dict(chosen_ref_logps=[-1.0], rejected_ref_logps=[-1.0])
    with pytest.raises(ValueError, match="row 0: chosen_ref_logps has 1 values"): PreferenceCollator(0)([row])


def test_the_engine_reads_the_batch(tokenizer):
    stats = pytest.importorskip("tokpref.engine.stats")
    prepared, _ = prepare(some_rows(4), tokenizer, max_length=40)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=1, n_head=2, n_embd=8,
                                       bos_token_id=0, eos_token_id=0)).eval()
    right, left = (
        stats.token_stats(model, model, PreferenceCollator(tokenizer.pad_token_id, side)(list(prepared)), kl=False)
        for side in ("right", "left")
    )
    for a, b, name in zip(right, left, ("chosen_ids", "rejected_ids"), strict=True):
        assert a.lengths.tolist() == [len(ids) for ids in prepared[name]]
        torch.testing.assert_close(a.logps, b.logps)


@pytest.mark.parametrize("room", ["formats", "collate"])
def test_the_examples_of_the_docstrings(room):
    found = doctest.testmod(importlib.import_module(f"tokpref.data.{room}"))
    assert found.attempted >= 3 and not found.failed


def test_the_cache_knows_the_code_of_all_rooms_that_make_a_row(tokenizer, monkeypatch):
    room, seen = importlib.import_module("tokpref.data.prepare"), []
    monkeypatch.setattr(room, "code_digest", lambda *functions: seen.extend(f.__module__ for f in functions) or "code")
    prepare(some_rows(1), tokenizer)
    assert set(seen) == {f"tokpref.data.{name}" for name in ("formats", "tokens", "prepare")}


# sources

def test_every_file_format(tmp_path, no_hub):
    rows = some_rows(5)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f: f.write(lines)
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved_dict")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "saved_dict", "saved", "folder"):
        assert load_preferences(tmp_path / name).to_list() == rows, name
    assert load_preferences(str(tmp_path / "a.jsonl"), "train[1:3]").to_list() == rows[1:3]


def test_a_file_is_not_taken_for_another_split(tmp_path, no_hub):
    for name in ("train.jsonl", "test.jsonl"): (tmp_path / name).write_text(json.dumps(some_rows(1)[0]) + "\n")
    assert len(load_texts(tmp_path / "test.jsonl", "test")) == 1
    with pytest.raises(ValueError, match="a file is one split"): load_texts(tmp_path / "train.jsonl", "test")


def test_unreachable_and_broken_sources_are_one_line(tmp_path, no_hub):
    (tmp_path / "broken.jsonl").write_text('{"chosen": "a", \n')
    DatasetDict(train=Dataset.from_list(some_rows(2))).save_to_disk(tmp_path / "saved")
    for call, error, words in (
        (
            lambda: load_texts("nobody/nothing"),
            FileNotFoundError,
            "set TOKPREF_DATA to a directory that holds it, or go",
        ),
        (lambda: load_texts("tdlr"), FileNotFoundError, "did you mean 'tldr'"),
        (lambda: load_texts("./no/such/folder"), (FileNotFoundError, ValueError), "no/such/folder"),
        (lambda: load_texts(tmp_path / "none.jsonl"), FileNotFoundError, "no file"),
        (lambda: load_texts(tmp_path / "broken.jsonl"), ValueError, "broken.jsonl"),
        (lambda: load_texts(tmp_path / "saved", "test"), ValueError, "no split 'test' in"),
        (lambda: load_texts(tmp_path, data_dir="inside"), ValueError, "no folder 'inside'"),
        (lambda: load_texts(tmp_path / "broken.jsonl", config="main"), ValueError, "config='main' would be ignored"),
        (lambda: load_preferences("imdb"), (FileNotFoundError, ValueError), "imdb"),
    ):
        with pytest.raises(error, match=words) as caught: call()
        assert "\n" not in str(caught.value)


def test_a_gated_set_says_so(monkeypatch, no_hub):
    def refuse(*args, **kwargs):
        raise DatasetNotFoundError(
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated.\nMore lines."
        )

    monkeypatch.setattr("tokpref.data.sources.load_dataset", refuse)
    with pytest.raises(FileNotFoundError, match="is a gated dataset on the Hub.*log in with `hf auth login`") as caught:
        load_texts("a/b")
    assert "\n" not in str(caught.value) and "More" not in str(caught.value)


def test_a_chat_set_of_the_hub(tmp_path, tokenizer, no_hub, monkeypatch):
    user, good, bad = (
        dict(role="user", content="a?"),
        dict(role="assistant", content="b"),
        dict(role="assistant", content="c"),
    )
    row = dict(prompt="a?", prompt_id="1", chosen=[user, good], rejected=[user, bad], messages=[user, good],
               score_chosen=1.0, score_rejected=0.0)
    folder = tmp_path / "HuggingFaceH4/ultrafeedback_binarized/data"
    folder.mkdir(parents=True)
    Dataset.from_list([row]).to_parquet(folder / "train_prefs-00000-of-00001.parquet")
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train_prefs\n    path: data/train_prefs-*\n---\n"
    )
    (folder.parent / "README.md").write_text(card)
    monkeypatch.setenv("TOKPREF_DATA", str(tmp_path))
    loaded = load_preferences("ultrafeedback", "train")
    assert loaded.to_list() == [dict(prompt=[user], chosen=[good], rejected=[bad])]
    raw = load_preferences(
        folder / "train_prefs-00000-of-00001.parquet"
    )  # the prompt as text beside whole conversations
    assert prepare(raw, tokenizer)[0][0] == prepare(loaded, tokenizer)[0][0]


def test_edited_converter_is_not_served_from_cache(tmp_path, no_hub, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text(json.dumps(some_rows(1)[0]) + "\n")
    for word in ("one", "two"):
        source = tmp_path / word / "convert_of_this_test.py"
        source.parent.mkdir()
        source.write_text(
            f"def convert(row): return dict(prompt={word!r}, chosen=row['chosen'], rejected=row['rejected'])\n"
        )
        spec = importlib.util.spec_from_file_location(source.stem, source)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, source.stem, module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(LOADERS, "set", Loader(str(tmp_path / "set"), module.convert))
        assert load_preferences("set")[0]["prompt"] == word


@pytest.mark.parametrize("name,text", [
    ("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", ""), ("a.json", "[]"), ("a.csv", ""),
    ("a.tsv", "prompt\tchosen\n")])
def test_an_empty_file_is_one_line(tmp_path, no_hub, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}, split 'train': the file has no rows"): load_texts(tmp_path / name)


def test_a_table_of_text_is_read_as_it_stands(tmp_path, no_hub, tokenizer):
    rows = [dict(prompt="How many?", chosen="3", rejected="NA"),
            dict(prompt='Say "a, b"\nor c', chosen="", rejected="4"),
            dict(prompt="Größe?", chosen=" 1.50", rejected=" null")]
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:     # as spreadsheets save it
            writer = csv.DictWriter(file, list(rows[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file: file.write((tmp_path / name).read_bytes())
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert load_preferences(path).to_list() == rows
        assert prepare(load_preferences(path), tokenizer)[1].dropped == {"empty chosen": 1}
    assert load_preferences(tmp_path / "a.tsv", "train[2:]").to_list() == rows[2:]
    (tmp_path / "A.CSV").write_bytes((tmp_path / "a.csv").read_bytes())
    for name in ("a.csv", "a.tsv", "a.csv.gz"):         # a folder with one of them is the same
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        (folder / f"train{name[1:]}").write_bytes((tmp_path / name).read_bytes())
        for path in (folder, tmp_path / "A.CSV"): assert load_preferences(path).to_list() == rows


@pytest.mark.parametrize("name, text, words", [
    ("a.csv", "prompt,chosen,rejected\nQ,a,b\nQ,a,b,c\n", "row 1 has 4 cells, and the first line names 3 columns"),
    ("a.tsv", "prompt\tchosen\trejected\n\nQ\ta\n", "row 0 has 2 cells"),
    ("a.csv", "prompt;chosen;rejected\nQ;a;b\n", "its first line is one column, 'prompt;chosen;rejected': .*commas"),
    ("a.tsv", "prompt,chosen,rejected\nQ,a,b\n", "its first line is one column, .*tabs in a .tsv"),
])
def test_a_table_whose_columns_do_not_fit_is_refused(tmp_path, no_hub, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words): load_preferences(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"train{name[1:]}").write_text(text)
    with pytest.raises(ValueError, match=words): load_preferences(tmp_path / "folder")


def test_a_file_of_another_kind_says_which_can_be_read(tmp_path, no_hub):
    for name in ("a.txt", "a.xlsx", "a.jsonl.zst", "noname"):
        (tmp_path / name).write_text("a")
        with pytest.raises(ValueError, match="a file must be .jsonl, .json, .csv, .tsv or .parquet, gzipped or not"):
            load_texts(tmp_path / name)


def test_every_layout_becomes_a_chat_where_that_is_asked_for(tmp_path, no_hub):
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"far": True}}}]
    say = lambda role, content, **more: dict(role=role, content=content, **more)
    chat = [say("user", "Is it?")], [say("assistant", "Yes.")], [say("assistant", "No.")]
    called = chat[0], [say("assistant", "", tool_calls=calls)], chat[2]
    for given, right in (
        (dict(question="Is it?", chosen="Yes.", rejected="No."), chat),
        (dict(chosen="Is it? Yes.", rejected="Is it? No."), chat),
        (dict(prompt="Is it?", chosen=chat[1], rejected=chat[2]), ("Is it?", *chat[1:])),
        (dict(zip(PARTS, called, strict=True)), called),
    ):
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(given) + "\n")
        (row,) = load_preferences(path, as_messages=True)
        assert {part: row[part] for part in PARTS} == dict(zip(PARTS, right, strict=True))


def test_a_file_that_is_not_utf_8_names_the_row(tmp_path, no_hub):
    good = json.dumps(some_rows(1)[0]).encode()
    other = good.replace(b"answer", "Gr\xf6\xdfe".encode("latin-1"))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, good, other]))
    with pytest.raises(ValueError, match="a.jsonl, split 'train': row 2 is not written in UTF-8"):
        load_texts(tmp_path / "a.jsonl")


def test_a_split_is_a_whole_word_of_a_file_name(tmp_path, no_hub):
    for name in ("latest.jsonl", "my_test-0.jsonl"): (tmp_path / name).write_text(json.dumps(some_rows(1)[0]) + "\n")
    with pytest.raises(ValueError, match="a file is one split"): load_texts(tmp_path / "latest.jsonl", "test")
    assert len(load_texts(tmp_path / "my_test-0.jsonl", "test")) == 1


def test_sets_put_together_show_no_examples_if_one_of_them_shows_none(tokenizer):
    quiet, other = Dataset.from_list(some_rows(2)), Dataset.from_list(some_rows(3))
    quiet.info.description, other.info.description = "tokpref: a; no examples shown", "tokpref: b, licence MIT"
    for parts in ([quiet, other], [other, quiet]):
        assert not prepare(concatenate_datasets(parts), tokenizer)[1].examples
    assert prepare(other, tokenizer)[1].examples


def test_weights_are_shown_where_their_tokens_are(tokenizer):
    row = dict(prompt_ids=[5], chosen_ids=[6] * 9, rejected_ids=[7], chosen_weights=[float(i) for i in range(9)], row=0)
    assert "  weights 0 1 … 5 more … 7 8" in describe_row(row, tokenizer, most=4).splitlines()


# the real sets (their text is never shown: one of them is harmful)

@needs_data
@pytest.mark.parametrize("source,split,rows", [
    ("hh", "test", 2312), ("gsm8k-preferences", "train", 4797), ("gsm8k-preferences", "test", 900),
    ("alpaca_eval-preferences", "train", 8390), ("alpaca_eval-preferences", "test", 1429)])
@pytest.mark.parametrize("as_messages", [False, True])
def test_real_preferences(monkeypatch, tokenizer, source, split, rows, as_messages):
    monkeypatch.setenv("TOKPREF_DATA", str(ROOT))
    loaded = load_preferences(source, split, as_messages=as_messages)
    good = len(loaded) == rows and loaded.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert good, "wrong number of rows or columns"
    prepared, report = prepare(loaded.select(range(300)), tokenizer, max_length=256)
    assert report.kept + sum(report.dropped.values()) == 300 and bool(report.examples) == (source != "hh")
    batch = PreferenceCollator(tokenizer.pad_token_id)([prepared[i] for i in range(8)])
    good = batch["input_ids"].shape[1] <= 256 and bool((batch["completion_mask"].sum(-1) > 1).all())
    assert good, "a batch is too long or has an empty response"


def test_named_sets_keep_their_sides():
    "Without the data: rows as the sources have them."
    talk = "\n\nHuman: hi\n\nAssistant:"
    hh = hh_pair({"chosen": talk + " good", "rejected": talk + " bad"})
    assert hh == {"prompt": talk, "chosen": " good", "rejected": " bad"}
    info = {"subreddit": "s", "title": "t", "post": "p"}
    for choice, chosen, rejected in ((0, " one", " two"), (1, " two", " one")):
        tldr = tldr_pair({"info": info, "summaries": [{"text": "one"}, {"text": "two"}], "choice": choice})
        assert (tldr["chosen"], tldr["rejected"]) == (chosen, rejected)
    chats = {side: [{"role": "user", "content": "q"}, {"role": "assistant", "content": side}] for side in SIDES}
    assert [chat_pair(chats)[side][0]["content"] for side in SIDES] == list(SIDES)
    question = qa_pair({"prompt": "q", "chosen": "yes", "rejected": "no"})
    assert (question["chosen"], question["rejected"]) == (" yes", " no")


@needs_data
def test_hh_odd_rows(monkeypatch, tokenizer):
    monkeypatch.setenv("TOKPREF_DATA", str(ROOT))
    raw, loaded = load_texts("hh", "test"), load_preferences("hh", "test")
    same = all(
        row["prompt"] + row[side] == whole[side]
        for row, whole in zip(loaded, raw, strict=True)
        for side in ("chosen", "rejected")
    )
    ends = all(row["prompt"].endswith("\n\nAssistant:") for row in loaded)
    turns = all("\n\nHuman:" not in row[side] for row in loaded for side in ("chosen", "rejected"))
    assert same and ends and turns
    _, report = prepare(loaded, tokenizer, name="hh")
    assert "5 of 2312 rows: a reply holds a second assistant turn" in report.note
    assert report.dropped == {"empty chosen": 4} and not report.examples


@needs_data
def test_real_texts(monkeypatch):
    monkeypatch.setenv("TOKPREF_DATA", str(ROOT))
    assert [len(load_texts("stanfordnlp/imdb", split)) for split in ("train", "test", "unsupervised")] == [
        25000,
        25000,
        50000,
    ]
    assert len(load_texts("gsm8k", "test")) == 1319
    assert set(load_texts("gsm8k", "train[:1]").column_names) == {"question", "answer"}


def test_describe_row_shows_both_ends(tokenizer):
    (row,), _ = prepare(
        [dict(prompt="The sky is blue " * 40, chosen=" yes", rejected=" no")], tokenizer, max_length=100
    )
    text = describe_row(row, tokenizer, most=10)
    assert "more …" in text and "cut from its start" in text and text.count("<eos>") == 2


# Layouts of other tools

TURN = {"from": "human", "value": "Is it true?"}
CHAT = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def test_a_question_is_the_prompt(tokenizer):
    "As orca_dpo_pairs has it. Both answers begin alike, which is no part of the prompt."
    rows = [{"question": "Is it true?", "chosen": "The answer is yes.", "rejected": "The answer is no."}] * 2
    for column in ("question", "query", "instruction"):
        given = [{column: row["question"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
        prepared, report = prepare(given, tokenizer)
        assert report.examples[0]["prompt"].replace(" ", "") == "Isittrue?"
        assert report.examples[0]["chosen"].replace(" ", "").startswith("Theansweris")
        assert len(prepared) == 2 and not report.unread
    with pytest.raises(ValueError, match="no column 'prompt', and instruction and input could be parts of it"):
        prepare([{"instruction": "Say", "input": "yes", "chosen": "a", "rejected": "b"}], tokenizer)


def test_a_system_message_and_turns_of_other_names_become_messages(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    answers = {"chosen": "Yes.", "rejected": "No."}
    said = {side: {"from": "gpt", "value": text} for side, text in answers.items()}
    asked = [{"role": "user", "content": "Is it true?"}]
    plain = {"prompt": asked, **{side: [{"role": "assistant", "content": text}] for side, text in answers.items()}}
    with_system = {**plain, "prompt": [{"role": "system", "content": "Be brief."}, *asked]}
    for theirs, ours in (({"system": "Be brief.", "question": "Is it true?", **answers}, with_system),
                         ({"conversations": [TURN], **said}, plain), ({"conversations": [TURN], **answers}, plain)):
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        assert prepare([theirs], tokenizer)[0].select_columns(columns)[0] == (
            prepare([ours], tokenizer)[0].select_columns(columns)[0])
    with pytest.raises(ValueError, match="train: row 0: a turn is by 'narrator', known are human"):
        prepare([{"conversations": [{"from": "narrator", "value": "x"}], **answers}], tokenizer)


@pytest.mark.parametrize("row, said", [
    ({"prompt": "a", "completions": ["b", "c"], "ratings": [1, 2]}, "column 'completions' is a list of responses"),
    ({"prompt": "a", "response_0": "b", "response_1": "c", "safer": 0}, "columns 'response_0' and 'response_1' do not"),
    ({"prompt": "a", "completion": "b", "label": True}, "single responses with a label are no pairs"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, "column 'images' is filled, and only text"),
    ({"prompt": "a", "good": "b", "bad": "c"}, "no column 'chosen' in"),
])
def test_what_holds_no_pairs_of_text_is_refused_by_name(row, said, tokenizer):
    with pytest.raises(ValueError, match=f"train: {said}"): prepare([row], tokenizer)


def test_every_column_is_read_or_harmless_or_named(tokenizer):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    more = {"id": 1, "source": "x", "score_chosen": 3.0, "score_rejected": 5.0, "note": ""}
    report = prepare([{**pair, **more, "images": None}], tokenizer)[1]
    assert report.unread == ["score_chosen", "score_rejected", "images"]
    assert "columns that are not read: score_chosen, score_rejected, images" in str(report)
    assert "not read" not in str(prepare([pair], tokenizer)[1])


def test_a_row_may_bring_arguments_of_the_chat_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ mark }}" + CHAT
    chat = {"prompt": [{"role": "user", "content": "Is it?"}], "chosen": [{"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "assistant", "content": "No."}]}
    for own in ({"mark": "A"}, '{"mark": "A"}'):
        rows = prepare([{**chat, "chat_template_kwargs": own}], tokenizer, chat_template_kwargs={"mark": "B"})[0]
        assert tokenizer.decode(rows[0]["prompt_ids"]).startswith("A")
    both = [{**chat, "chat_template_kwargs": {"mark": "A"}}, {**chat, "chat_template_kwargs": None}]
    rows = prepare(both, tokenizer, chat_template_kwargs={"mark": "B"})[0]
    assert [tokenizer.decode(row["prompt_ids"])[0] for row in rows] == ["A", "B"]
    with pytest.raises(ValueError, match="row 0: chat_template_kwargs must be a dictionary"):
        prepare([{**chat, "chat_template_kwargs": "mark=A"}], tokenizer)


@pytest.mark.parametrize("swap", [False, True])
def test_a_prompt_makes_room_for_the_longer_response(swap):
    sides = [[1], [2] * 6]
    kept, room = fit_pair(list(range(10)), *(sides[::-1] if swap else sides), 12, max_prompt_length=None, begin=[])
    assert kept == list(range(4, 10)) and room == 6


def test_a_prompt_that_both_conversations_repeat_is_taken_off_each():
    turn = {"role": "user", "content": "Is it?"}
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    assert split_pair({"prompt": [turn], "chosen": [turn, *yes], "rejected": [turn, *no]}) == ([turn], yes, no)
