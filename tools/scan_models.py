"""Every causal language model of the installed transformers, tiny: are the engine's numbers those of plain full logits?

`python tools/scan_models.py [NAME ...] [--json FILE]` prints one line a class: how the engine ran it (states and head,
or full logits and why; packed pairs or not and why) and how far loss and gradients are from those of unpadded rows, one
at a time, with plain logits. Classes that cannot be built small are listed with the reason. Exit code 1 if a number
differs.
"""

import argparse
import inspect
import json
import logging
import math
import signal
import sys
import warnings
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tokpref import LOSSES, pair_loss
from tokpref.engine.forward import full_logits_reason
from tokpref.engine.trial import packing_obstacle

VOCABULARY = 48
# settings by name, for whichever configuration has them; None removes what would not fit the small sizes
SMALL = {
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim lru_width word_embed_proj_dim dim_model "
        "input_embedding_size output_embedding_size attention_hidden_size embedding_hidden_size",
    40: "intermediate_size ffn_dim n_inner dim_ff dff d_inner decoder_ffn_dim encoder_ffn_dim feed_forward_size "
        "intermediate_size_mlp shared_expert_intermediate_size dense_intermediate_size ffn_hidden_size",
    16: "moe_intermediate_size moe_shared_expert_intermediate_size mamba_d_head mamba_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
       "num_encoder_layers num_key_value_heads n_shared_experts num_experts_per_tok moe_topk moe_k num_blocks "
       "num_experts_per_token",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
       "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
       "moe_num_experts mamba_n_heads mamba_num_heads time_step_rank n_mamba_heads kv_channels_unused",
    8: "head_dim d_head kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim rotary_dim dim_head "
       "attention_head_dim attention_head_size linear_key_head_dim linear_value_head_dim state_size mamba_d_state "
       "ssm_state_size kv_channels",
    VOCABULARY: "vocab_size pronunciation_vocab_size shape_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_sequence_length",
}
FIXED = {name: size for size, names in SMALL.items() for name in names.split()} | {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_shared_experts": 1, "type_vocab_size": 1, "sliding_window": 64, "layerdrop": 0.0, "dropout": 0.0,
    "mamba_n_groups": 1, "mamba_expand": 2, "qk_head_dim": 16, "num_memory_blocks": 1, "expand": 2,
}
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types", "hybrid_layer_ids",
         "attn_layer_indices", "full_attn_idxs", "attention_layers", "attention_types", "cross_attention_layers",
         "moe_layers", "mlp_only_layers", "attn_layers", "head_dim_list", "num_attention_heads_per_layer")
OWN = {      # what a family wants besides
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16),
    "bert": dict(is_decoder=True), "codegen": dict(rotary_dim=8), "gptj": dict(rotary_dim=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "reformer": dict(axial_pos_embds=False, is_decoder=True, attn_layers=["local", "local"], num_buckets=2),
    "bloom": dict(), "xlnet": dict(attn_type="uni"), "transfo-xl": dict(cutoffs=[]),
    "big_bird": dict(attention_type="original_full", is_decoder=True),
}
DECODERS = ("bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm "
            "roc_bert roformer xlm-roberta xlm-roberta-xl xmod qdqbert xlm").split()


class TooLong(Exception): pass


def alarm(*_): raise TooLong("takes more than a minute")


def shrunk(config, own: dict):
    "The same configuration with small sizes, in the parts of a composed one as well."
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig): shrunk(value, {})
        elif name in FIXED and value is not None and not isinstance(value, list | dict):
            setattr(config, name, FIXED[name])
    for name, value in own.items(): setattr(config, name, value)
    return config


def without_kernels(config) -> None:
    "Experts in plain products: the grouped ones know no float64."
    for part in [config, *(v for v in vars(config).values() if isinstance(v, transformers.PreTrainedConfig))]:
        part._experts_implementation = "eager"


def small_configs(kind: str):
    "Tiny configurations of a model type, the likeliest first."
    own = dict(OWN.get(kind, {}))
    if kind in DECODERS: own["is_decoder"] = True
    default = CONFIG_MAPPING[kind]()
    text = default.get_text_config(decoder=True)
    attempts = [lambda: made_small(type(text), text, own), lambda: made_small(type(text), text, own, True)]
    if text is not default: attempts.append(lambda: shrunk(default, own))
    for attempt in attempts:
        try: yield attempt()
        except Exception: continue


def made_small(cls: type, default, own: dict, drop_lists: bool = False):
    "A configuration made from small sizes, so that whatever it derives from them fits."
    known = {name: size for name, size in FIXED.items()
             if getattr(default, name, None) is not None and not isinstance(getattr(default, name), list | dict)}
    if hasattr(default, "kv_lora_rank"):
        known["num_key_value_heads"] = 4
        known.pop("head_dim", None)
    if drop_lists: known |= {name: None for name in LISTS if hasattr(default, name)}
    return cls(**known | own)


def build(kind: str, name: str):
    "A tiny model that runs, in float64 where its kernels know it."
    reasons = ["no small configuration can be made"]
    for config in small_configs(kind):
        try: return running(config, getattr(transformers, name))
        except TooLong: raise
        except Exception as error: reasons.append(f"{type(error).__name__}: {str(error)[:160]}")
    raise ValueError(reasons[-1])


def running(config, cls: type):
    without_kernels(config)
    with torch.device("meta"): size = sum(p.numel() for p in cls(config).parameters())
    if size > 12_000_000: raise ValueError(f"has {size:,} weights however small its settings")
    torch.manual_seed(0)
    model = cls(config).eval().double()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1 and weight.std() < 1e-8: torch.nn.init.normal_(weight, std=0.05)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    model.zero_grad()
    return model


def a_batch(side: str) -> dict:
    generator = torch.Generator().manual_seed(3)
    sizes, length = [(4, 4), (3, 6), (4, 3), (3, 5)], 9
    batch = {name: torch.zeros(4, length, dtype=torch.long)
             for name in ("input_ids", "attention_mask", "completion_mask")}
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (4, 3)]
    for row, (m, n) in enumerate(sizes):
        start = 0 if side == "right" else length - m - n
        batch["input_ids"][row, start:start + m] = prompts[row % 2]
        batch["input_ids"][row, start + m:start + m + n] = torch.randint(3, VOCABULARY, (n,), generator=generator)
        batch["attention_mask"][row, start:start + m + n] = 1
        batch["completion_mask"][row, start + m:start + m + n] = 1
    return batch


def plain_loss(model, reference, batch):
    "DPO's mean loss from plain logits of one unpadded row at a time."
    takes = inspect.signature(type(model).forward).parameters
    no_cache = {"use_cache": False} if "use_cache" in takes else {}
    ratios = []
    columns = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    for ids, mask, scored in zip(*columns, strict=True):
        ids, kept = ids[mask.bool()][None], scored[mask.bool()][1:].bool()
        def score(m, ids=ids, kept=kept):
            logps = m(input_ids=ids, **no_cache).logits[0, -ids.shape[1]:-1].log_softmax(-1)
            return logps.gather(1, ids[0, 1:, None])[kept].sum()
        with torch.no_grad(): base = score(reference)
        ratios.append(score(model) - base)
    pairs = len(ratios) // 2
    margins = torch.stack([ratios[i] - ratios[pairs + i] for i in range(pairs)])
    return -torch.nn.functional.logsigmoid(0.1 * margins).mean()


def look_back(model) -> float:
    "How far the logits of the first tokens change with the last one: 0 for a causal model."
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    other = torch.tensor([[5, 6, 7, 8, 11]])
    with torch.no_grad(): one, two = (model(input_ids=x).logits[0, -5:-1] for x in (ids, other))
    return ((one - two).abs().max() / one.abs().max()).item()


def gradients(loss, model):
    weights = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(w) if g is None else g
            for w, g in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)]


def difference(ours, wanted) -> float:
    "The largest difference between two lists of gradients, as a share of the largest entry."
    largest = max(g.abs().max().item() for g in wanted if g.numel())
    apart = [(a - b).abs().max().item() for a, b in zip(ours, wanted, strict=True) if a.numel()]
    return (max(apart) if all(map(math.isfinite, apart)) else math.inf) / max(largest, 1e-12)


def look(kind: str, name: str) -> dict:
    "What the engine does with one class."
    found: dict[str, Any] = {"type": kind, "class": name}
    try: model = build(kind, name)
    except Exception as error: return found | {"built": False, "why": f"{type(error).__name__}: {str(error)[:160]}"}
    found["built"] = True
    try:
        reference = build(kind, name)
        with torch.no_grad():
            for weight in reference.parameters(): weight.add_(0.02 * torch.randn_like(weight))
        wanted = plain_loss(model, reference, a_batch("right"))
        wanted_gradients = gradients(wanted, model)
        found["looks back"] = look_back(model)
    except Exception as error:
        return found | {"built": False, "why": f"alone: {type(error).__name__}: {str(error)[:160]}"}
    for side in ("right", "left"):
        for way in ("", " plain"):
            how = dict(one_pass=True, shared_prompt=None) if not way else dict(one_pass=False, shared_prompt=False)
            try:
                batch = a_batch(side)
                loss = pair_loss(model, reference, batch, LOSSES["dpo"], **how).loss
                off = abs(loss.item() - wanted.item()) / abs(wanted.item())
                found[side + way] = max(off, difference(gradients(loss, model), wanted_gradients))
            except Exception as error: found[side + way] = f"{type(error).__name__}: {str(error)[:160]}"
    found["head"] = full_logits_reason(model)
    try: found["packing"] = packing_obstacle(model, a_batch("right"))
    except Exception as error: found["packing"] = f"{type(error).__name__}: {str(error)[:160]}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; none: all")
    parser.add_argument("--json", help="write all results to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGALRM, alarm)
    results, seen = [], set()
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        names = [name] if isinstance(name, str) else list(name)
        for one in names:
            if one in seen or options.names and kind not in options.names: continue
            signal.alarm(60)
            try: result = look(kind, one)
            except TooLong as error: result = {"type": kind, "class": one, "built": False, "why": str(error)}
            signal.alarm(0)
            if result["built"]: seen.add(one)
            results.append(result)
            print(json.dumps(result), flush=True)
            if options.json:
                with open(options.json, "w") as file: json.dump(results, file, indent=1)
    ways = ("right", "right plain", "left", "left plain")
    off = [r for r in results if r["built"] and any(isinstance(r[way], float) and r[way] > 1e-5 for way in ways)]
    return 1 if off else 0


if __name__ == "__main__": sys.exit(main())
