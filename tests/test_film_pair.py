"""The pair that the chapters colour, and the tool that recorded it."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from tokpref.example import FilmPair, film_pair
from tokpref.experiments.compare import Problem, RunConfig

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "record_pair.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("record_pair", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    "A random GPT-2 with room for the pair, one token a letter."
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=160, n_embd=32, n_layer=1, n_head=2, bos_token_id=None,
                                      eos_token_id=1, pad_token_id=0)).eval()


def test_the_tool_records_what_the_package_reads(tool, model, tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": "ab c", "chosen": "yes", "rejected": "no"}] * 4)
    problem = Problem(tokenizer, model, rows, rows, evaluate=lambda policy: {}, info={"model": {"parameters": 1}},
                      arguments={"use_cpu": True})
    config = RunConfig(
        losses=("dpo", "tbpo_q"), steps=4, batch_size=2, eval_steps=2, learning_rate=1e-2, warmup_steps=0
    )
    file = tmp_path / "pair.json"
    file.write_text(tool.written(tool.film_record(problem, config, config.losses)), encoding="utf-8")
    saved = json.loads(file.read_text(encoding="utf-8"))
    pair = FilmPair(
        saved["prompt"], saved["tokens"]["chosen"], saved["tokens"]["rejected"], saved["about"], saved["policies"]
    )
    assert pair.steps == [0, 2, 4] and pair.losses == ["dpo", "tbpo_q"]
    for loss in pair.losses:
        start, end = pair.stats(loss, 0)[0], pair.stats(loss)[0]
        assert_close(start.logps, start.ref_logps, rtol=0, atol=1e-5)
        assert (end.logps - end.ref_logps).abs().max() > 1e-3, "the policy has moved"
        assert_close(end.ref_logps, start.ref_logps, rtol=0, atol=1e-5)
        assert (end.baseline is not None) == (loss == "tbpo_q") and len(pair.chosen) == end.logps.shape[1]


def test_the_statistics_are_those_of_the_model(tool, model, tokenizer):
    ids = tool.encode(tokenizer)
    rows = tool.measure(model.train(), model, None, ids, tokenizer.pad_token_id)
    assert model.training
    model.eval()
    for side in ("chosen", "rejected"):
        whole = torch.tensor([ids["prompt"] + ids[side]])
        with torch.no_grad(): logps = model(whole).logits[0, len(ids["prompt"]) - 1:-1].log_softmax(-1)
        expected = logps[range(len(ids[side])), ids[side]]
        assert_close(torch.tensor(rows[side]["logps"]), expected, rtol=1e-4, atol=1e-4)


def test_the_recorded_pair_is_whole():
    pair = film_pair()
    assert len(pair.losses) == 8 and pair.steps == [0, 30, 60, 90, 120]
    with pytest.raises(ValueError, match="did you mean 'dpo'"): pair.stats("dpoo")
