"""The models and the batches of the benchmark: random weights and ids, real lengths."""
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from tokpref import PreferenceCollator

# (prompt, chosen, rejected) tokens of pairs of Anthropic/hh-rlhf, harmless-base, test split (MIT licence): lengths
# only, no text. Counted with a byte-level BPE of 32,000 entries trained on film reviews and AlpacaEval answers (3.9
# characters a token), begin and end token included; the 3 % of the pairs with more than 512 tokens are left out. Of
# 2,001 random draws of 8, and of 4, each is the one nearest to the median in six numbers: packed tokens, response
# tokens, longest row, and the ratios of padded, unshared and shared tokens. The 32 are drawn the same way, with
# SmolLM2's tokenizer. The 16 are longer pairs, drawn at random: prompts of 60 to 320 tokens, chosen responses of 120
# to 520, rejected ones of 80 to 480. The one of 2 is made up, for tests.
HH_LENGTHS = {
    32: (
        (171, 28, 19), (93, 12, 15), (36, 19, 42), (17, 45, 29), (23, 9, 13), (231, 85, 70), (35, 47, 20),
        (318, 38, 70), (15, 25, 15), (179, 57, 152), (161, 13, 16), (120, 8, 39), (24, 17, 17), (168, 77, 56),
        (32, 31, 171), (80, 17, 60), (74, 48, 23), (263, 34, 24), (301, 63, 26), (119, 148, 134), (389, 62, 52),
        (100, 15, 12), (40, 53, 25), (86, 58, 36), (25, 43, 13), (39, 72, 75), (123, 22, 10), (23, 21, 18),
        (151, 12, 3), (130, 47, 74), (107, 38, 50), (35, 10, 91),
    ),
    16: (
        (257, 508, 295), (80, 252, 341), (308, 327, 235), (304, 303, 378), (171, 378, 151), (204, 191, 466),
        (108, 436, 208), (135, 278, 130), (97, 470, 249), (301, 406, 131), (241, 342, 241), (164, 402, 324),
        (286, 386, 213), (91, 400, 87), (107, 488, 284), (60, 433, 332),
    ),
    8: (
        (213, 82, 100), (89, 28, 3), (18, 23, 30), (265, 83, 36), (26, 22, 13), (103, 28, 16), (31, 60, 73),
        (174, 60, 29),
    ),
    4: ((106, 11, 38), (131, 72, 62), (200, 27, 88), (22, 15, 24)),
    2: ((9, 5, 3), (4, 2, 6)),
}


class Shape(NamedTuple):
    "A model of the benchmark and how many pairs it gets."

    family: str         # llama or neox
    vocab: int          # V
    hidden: int         # H
    layers: int
    heads: int
    inner: int          # width of the feed-forward layers
    kv_heads: int = 0   # 0: as many as heads
    tied: bool = False  # embedding and head share their weights
    pairs: int = 8      # which of HH_LENGTHS


SHAPES = {
    "32k": Shape("llama", 32_000, 256, 4, 4, 688),
    "128k": Shape("llama", 128_256, 64, 2, 2, 176, pairs=4),
    "tiny": Shape("llama", 96, 32, 1, 2, 64, pairs=2),
    "narrow": Shape("llama", 8192, 64, 1, 2, 176, pairs=2),
    "llama-1b": Shape("llama", 128_256, 2048, 16, 32, 8192, kv_heads=8, tied=True),
    "llama-1b-long": Shape("llama", 128_256, 2048, 16, 32, 8192, kv_heads=8, tied=True, pairs=16),
    "smollm-135m": Shape("llama", 49_152, 576, 30, 9, 1536, kv_heads=3, tied=True, pairs=32),
    "launches": Shape("llama", 512, 64, 16, 4, 128, kv_heads=2, tied=True),
    "launches-32": Shape("llama", 512, 64, 16, 4, 128, kv_heads=2, tied=True, pairs=32),
    "pythia-2.8b": Shape("neox", 50_304, 2560, 32, 32, 10_240),
}


def token_counts(lengths) -> dict[str, int]:
    "Tokens of a batch: of responses, of all with each prompt once, of all with each prompt twice, and with padding."
    longest = max(p + max(c, r) for p, c, r in lengths)
    return {"response": sum(c + r for _, c, r in lengths), "shared": sum(map(sum, lengths)),
            "unshared": sum(2 * p + c + r for p, c, r in lengths), "padded": 2 * len(lengths) * longest}


def config_of(shape: Shape) -> PreTrainedConfig:
    "The transformers configuration of a shape; its random weights give scores that are far from uniform."
    common = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        initializer_range=0.5 / shape.hidden**0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    if shape.family == "neox": return GPTNeoXConfig(**common)
    return LlamaConfig(**common, num_key_value_heads=shape.kv_heads or shape.heads)


def make_models(
    shape: Shape, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    "(policy, reference): the reference is the policy with a little noise on each weight, so that no statistic is zero."
    torch.manual_seed(seed)
    with torch.device(device):
        policy, reference = (AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype) for _ in range(2))
    with torch.no_grad():
        for p, r in zip(policy.parameters(), reference.parameters(), strict=True):
            r.copy_(torch.randn_like(p).mul_(0.3 * p.std() if p.ndim > 1 else 0).add_(p))
    return policy.train(), reference.eval().requires_grad_(False)


def make_batch(lengths, vocab: int, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    "Random ids of such lengths: input_ids, attention_mask, completion_mask [2B, L], chosen rows first."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(2, vocab, (n,), generator=generator).tolist()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, map(draw, triple), strict=True)) for triple in lengths]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    return {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "completion_mask")}


def save(folder: Path, name: str, models: tuple[nn.Module, nn.Module], batch: dict) -> Path:
    "Weights and batch to one file that every contender reads."
    path = folder / f"{name}.pt"
    torch.save(
        {"shape": name, "policy": models[0].state_dict(), "reference": models[1].state_dict(), "batch": batch}, path
    )
    return path


def load(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, dict]:
    "(policy, reference, batch) from `save`."
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with torch.device(device):
        models = [AutoModelForCausalLM.from_config(config_of(SHAPES[saved["shape"]]), dtype=dtype) for _ in range(2)]
    for model, key in zip(models, ("policy", "reference"), strict=True): model.load_state_dict(saved[key])
    batch = {k: v.clone().to(device) for k, v in saved["batch"].items()}
    return models[0].train(), models[1].eval().requires_grad_(False), batch
