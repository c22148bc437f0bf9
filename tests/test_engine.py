"""Every loss on every family of models: engine plus loss against plain full logits plus loss, values and gradients of all weights."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from tokpref import LOSSES, BaselineHead, TokenStats, token_stats

SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
             vocab_size=41, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {"GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM", "Qwen2": "Qwen2ForCausalLM", "Mistral": "MistralForCausalLM",
          "Gemma2": "Gemma2ForCausalLM", "GPTNeoX": "GPTNeoXForCausalLM", "Cohere": "CohereForCausalLM", "Granite": "GraniteForCausalLM",
          "Phi3": "Phi3ForCausalLM", "OPT": "OPTForCausalLM"}
SPECIAL = {"Granite": dict(logits_scaling=3.0), "Cohere": dict(logit_scale=0.5), "Gemma2": dict(final_logit_softcapping=0.5),
           "OPT": dict(ffn_dim=32, word_embed_proj_dim=16)}


def make(family: str, seed: int = 0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SMALL, **SPECIAL.get(family, {}))
    return getattr(transformers, MODELS[family])(config).eval().double()


def make_batch(side: str = "right") -> dict:
    generator = torch.Generator().manual_seed(3)
    sizes, length = [(3, 4), (2, 6), (3, 2), (2, 5)], 9
    batch = {name: torch.zeros(4, length, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (m, n) in enumerate(sizes):
        start = 0 if side == "right" else length - m - n
        batch["input_ids"][row, start:start + m + n] = torch.randint(3, 41, (m + n,), generator=generator)
        batch["attention_mask"][row, start:start + m + n] = 1
        batch["completion_mask"][row, start + m:start + m + n] = 1
    return batch


def plain(model, ref_model, batch, baseline=None):
    "(chosen, rejected) from full logits, one unpadded row at a time."
    rows = []
    for ids, mask, completion in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool()):
        ids, keep = ids[mask][None], completion[mask][1:]
        out = model(ids, output_hidden_states=True)
        logp = out.logits[0, :-1].log_softmax(-1)[keep]
        with torch.no_grad(): logq = ref_model(ids).logits[0, :-1].log_softmax(-1)[keep]
        y = ids[0, 1:][keep][:, None]
        b = baseline(out.hidden_states[-1][0, :-1][keep].detach()) if baseline is not None else torch.zeros(len(y))
        rows.append((logp.gather(1, y)[:, 0], logq.gather(1, y)[:, 0], torch.ones(len(y)).bool(), (logq.exp() * (logq - logp)).sum(-1), b))
    pad = lambda part: TokenStats(*(torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in zip(*part)))
    return pad(rows[:2]), pad(rows[2:])


def gradients(name, stats, model):
    options = {"window": 2} if name == "adpo" else {}
    losses = LOSSES[name](*stats, **options).losses
    weights = [p for p in model.parameters() if p.requires_grad]
    return losses, torch.autograd.grad((losses * torch.tensor([1.0, -0.6]).to(losses)).sum(), weights)


def close(one, other, tolerance):
    assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(one[1], other[1]): assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_match_full_logits(family, side):
    if family == "Gemma2" and side == "left": pytest.skip("this family's own attention returns nan for float64 with padding on the left")
    model, ref_model, batch = make(family), make(family, 1), make_batch(side)
    head = BaselineHead(16, 8)
    torch.nn.init.normal_(head.layers[-1].weight)
    tolerance = 1e-6 if family in ("Gemma2", "Cohere") else 1e-9     # these two compute parts of every layer in float32
    for name, spec in LOSSES.items():
        baseline = head if spec.baseline else None
        ours = token_stats(model, ref_model, batch, kl=spec.kl, baseline=baseline, chunk_size=3)
        close(gradients(name, ours, model), gradients(name, plain(model, ref_model, batch, baseline), model),
              1e-6 if spec.baseline else tolerance)     # the baseline head works in float32


@pytest.mark.parametrize("name", LOSSES)
def test_adapter_off_is_the_reference(name):
    base = make("Llama")
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).double()
    stats = token_stats(model, None, make_batch(), kl=True, baseline=BaselineHead(16, 8))
    close(gradients(name, stats, model), gradients(name, token_stats(model, base, make_batch(), kl=True, baseline=BaselineHead(16, 8)), model), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision_stays_near(dtype, tolerance):
    model, ref_model = make("Llama").float(), make("Llama", 1).float()
    exact = token_stats(model, ref_model, make_batch(), kl=True)
    for low in (token_stats(model.to(dtype), ref_model.to(dtype), make_batch(), kl=True),):
        for a, b in zip(low, exact):
            assert a.logps.dtype == a.kl.dtype == torch.float32
            assert_close(a.logps, b.logps, rtol=tolerance, atol=tolerance)
            assert_close(a.kl, b.kl, rtol=tolerance, atol=tolerance)


def test_a_head_that_adapters_change_falls_back_and_says_so(caplog):
    model = get_peft_model(make("Llama"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).double()
    ours, oracle = token_stats(model, make("Llama", 1), make_batch()), plain(model, make("Llama", 1), make_batch())
    assert "full logits" in caplog.text
    close(gradients("tdpo1", ours, model), gradients("tdpo1", oracle, model), 1e-10)


def test_weights_of_tokens_reach_the_loss():
    model, ref_model, batch = make("Llama"), make("Llama", 1), make_batch()
    first = torch.zeros_like(batch["input_ids"], dtype=torch.float64)
    first[torch.arange(4), batch["completion_mask"].argmax(-1)] = 1.0
    chosen, _ = token_stats(model, ref_model, {**batch, "weights": first})
    bare, _ = token_stats(model, ref_model, batch)
    assert_close(chosen.log_ratio.sum(-1), bare.log_ratio[:, 0])
