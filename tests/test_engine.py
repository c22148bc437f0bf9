"""Every loss on every family of models: engine plus loss against plain full logits plus loss.

Values and gradients of all weights are compared.
"""

import copy
import functools
import inspect

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from tokpref import (
    LOSSES,
    BaselineHead,
    PairLoss,
    PreferenceCollator,
    TokenStats,
    engine,
    pair_loss,
    pair_stats,
    token_stats,
)
from tokpref.engine import gradients as gradients_of_a_chunk
from tokpref.engine import in_place, one_pass, trial
from tokpref.engine.attention import packed_attention, packed_inputs
from tokpref.engine.forward import Features, full_logits_reason
from tokpref.engine.gradients import GradientSums
from tokpref.engine.head import Head, split_head
from tokpref.engine.in_place import Wants
from tokpref.engine.packing import LAYOUTS, pack_pairs, pack_rows, split_by_tokens
from tokpref.engine.trial import choose_layout, packing_obstacle, takes_segments
from tokpref.models import compile_layers, disable_dropout

SMALL = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=41,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS = {
    "GPT2": "GPT2LMHeadModel",
    "Llama": "LlamaForCausalLM",
    "Qwen2": "Qwen2ForCausalLM",
    "Mistral": "MistralForCausalLM",
    "Gemma2": "Gemma2ForCausalLM",
    "GPTNeoX": "GPTNeoXForCausalLM",
    "Cohere": "CohereForCausalLM",
    "Granite": "GraniteForCausalLM",
    "Phi3": "Phi3ForCausalLM",
    "OPT": "OPTForCausalLM",
}
SPECIAL = {
    "Granite": dict(logits_scaling=3.0),
    "Cohere": dict(logit_scale=0.5),
    "Gemma2": dict(final_logit_softcapping=0.5),
    "OPT": dict(ffn_dim=32, word_embed_proj_dim=16),
}


def make(family: str, seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SMALL, **SPECIAL.get(family, {}), **changes)
    return getattr(transformers, MODELS[family])(config).eval().double()


def make_batch(side: str = "right") -> dict:
    generator = torch.Generator().manual_seed(3)
    sizes, length = [(3, 4), (2, 6), (3, 2), (2, 5)], 9
    batch = {
        name: torch.zeros(4, length, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (m, n) in enumerate(sizes):
        start = 0 if side == "right" else length - m - n
        batch["input_ids"][row, start:start + m + n] = torch.randint(3, 41, (m + n,), generator=generator)
        batch["attention_mask"][row, start:start + m + n] = 1
        batch["completion_mask"][row, start + m:start + m + n] = 1
    return batch


def plain(model, ref_model, batch, baseline=None):
    "(chosen, rejected) from full logits, one unpadded row at a time."
    rows = []
    for ids, mask, completion in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        ids, keep = ids[mask][None], completion[mask][1:]
        out = model(ids, output_hidden_states=True)
        logp = out.logits[0, :-1].log_softmax(-1)[keep]
        with torch.no_grad(): logq = ref_model(ids).logits[0, :-1].log_softmax(-1)[keep]
        y = ids[0, 1:][keep][:, None]
        b = baseline(out.hidden_states[-1][0, :-1][keep].detach()) if baseline is not None else torch.zeros(len(y))
        rows.append(
            (
                logp.gather(1, y)[:, 0],
                logq.gather(1, y)[:, 0],
                torch.ones(len(y)).bool(),
                (logq.exp() * (logq - logp)).sum(-1),
                b,
                -(logp.exp() * logp).sum(-1).detach(),
                (logp.exp() * (logp - logq)).sum(-1).detach(),
            )
        )
    def pad(part):
        *first, entropy, reverse_kl = (
            torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in zip(*part, strict=True)
        )
        return TokenStats(*first, entropy=entropy, reverse_kl=reverse_kl)
    return pad(rows[:len(rows) // 2]), pad(rows[len(rows) // 2:])


def gradients(name, stats, model):
    options = {"window": 2} if name == "adpo" else {}
    losses = LOSSES[name](*stats, **options).losses
    weights = [p for p in model.parameters() if p.requires_grad]
    return losses, torch.autograd.grad((losses * torch.tensor([1.0, -0.6]).to(losses)).sum(), weights)


def near(ours, wanted, tolerance):
    "Equal up to a tolerance that is relative to the largest entry, where that is above 1."
    assert_close(ours, wanted, rtol=tolerance, atol=tolerance * max(1.0, wanted.abs().max().item()))


def close(one, other, tolerance):
    near(one[0], other[0], tolerance)
    for a, b in zip(one[1], other[1], strict=True): near(a, b, tolerance)


@pytest.mark.parametrize("family", MODELS)
def test_a_head_that_was_taken_off_gives_the_models_own_logits(family):
    "With a wrong scale the engine would fall back to full logits, which are right and cost more."
    model, ids = make(family), make_batch()["input_ids"]
    head = split_head(model)
    assert head is not None
    outputs = model(ids, output_hidden_states=True)
    near(head.logits(outputs.hidden_states[-1]), outputs.logits, 1e-5)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_losses_match_full_logits(family, side):
    if family == "Gemma2" and side == "left":
        pytest.skip("this family's own attention returns nan for float64 with padding on the left")
    model, ref_model, batch = make(family), make(family, 1), make_batch(side)
    head = BaselineHead(16, 8)
    torch.nn.init.normal_(head.layers[-1].weight)
    tolerance = 1e-6 if family in ("Gemma2", "Cohere") else 1e-9     # these two compute parts of every layer in float32
    for name, spec in LOSSES.items():
        baseline = head if spec.baseline else None
        ours = token_stats(
            model, ref_model, batch, kl=spec.kl, reverse_kl=spec.reverse_kl, baseline=baseline, chunk_size=3)
        close(gradients(name, ours, model), gradients(name, plain(model, ref_model, batch, baseline), model),
              1e-6 if spec.baseline else tolerance)     # the baseline head works in float32


@pytest.mark.parametrize("name", LOSSES)
def test_adapter_off_is_the_reference(name):
    base = make("Llama")
    torch.manual_seed(5)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).double()
    off, apart = (
        token_stats(model, reference, make_batch(), kl=True, reverse_kl=True, baseline=BaselineHead(16, 8))
        for reference in (None, base)
    )
    close(gradients(name, off, model), gradients(name, apart, model), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_low_precision_stays_near(dtype, tolerance):
    model, ref_model = make("Llama").float(), make("Llama", 1).float()
    exact = token_stats(model, ref_model, make_batch(), kl=True)
    for low in (token_stats(model.to(dtype), ref_model.to(dtype), make_batch(), kl=True),):
        for a, b in zip(low, exact, strict=True):
            assert a.logps.dtype == a.kl.dtype == torch.float32
            assert_close(a.logps, b.logps, rtol=tolerance, atol=tolerance)
            assert_close(a.kl, b.kl, rtol=tolerance, atol=tolerance)


def test_a_head_that_adapters_change_falls_back_and_says_so(caplog):
    model = get_peft_model(make("Llama"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).double()
    ours, oracle = token_stats(model, make("Llama", 1), make_batch()), plain(model, make("Llama", 1), make_batch())
    assert "full logits" in caplog.text
    close(gradients("tdpo1", ours, model), gradients("tdpo1", oracle, model), 1e-10)


def test_full_logits_are_mentioned_once(caplog):
    model, ref_model = (
        get_peft_model(make("Llama", seed), LoraConfig(r=2, target_modules=["lm_head"])).double() for seed in (0, 1)
    )
    for _ in range(3): token_stats(model, ref_model, make_batch())
    assert caplog.text.count("full logits") == 2        # policy and reference


def test_weights_of_tokens_reach_the_loss():
    model, ref_model, batch = make("Llama"), make("Llama", 1), make_batch()
    first = torch.zeros_like(batch["input_ids"], dtype=torch.float64)
    first[torch.arange(4), batch["completion_mask"].argmax(-1)] = 1.0
    chosen, _ = token_stats(model, ref_model, {**batch, "weights": first})
    bare, _ = token_stats(model, ref_model, batch)
    assert_close(chosen.log_ratio.sum(-1), bare.log_ratio[:, 0])


# One pass, and packed pairs

FAST = [
    (family, dtype, side)
    for family in MODELS
    for dtype, side in (("float64", "right"), ("float64", "left"), ("float32", "right"))
    if (family, dtype) != ("Gemma2", "float64")
] + [("Gemma2", "float32", "left")]
WINDOWED = {"Mistral": dict(sliding_window=4), "Phi3": dict(sliding_window=4), "Gemma2": dict(sliding_window=4),
            "Qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)}


def shared_batch(side: str = "right") -> dict:
    "Two pairs whose rows share their prompt, the first also the start of the response; and one whose prompts differ."
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randint(3, 41, (n,), generator=generator).tolist()
    prompts = [draw(5), draw(3), draw(2)]
    begin = draw(1)
    chosen = [prompts[0] + begin + draw(5), prompts[1] + draw(2), prompts[2] + draw(1)]
    rejected = [prompts[0] + begin + draw(2), prompts[1] + draw(6), draw(2) + draw(3)]
    rows, sizes, length = chosen + rejected, [5, 3, 2] * 2, 12
    batch = {
        name: torch.zeros(6, length, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (ids, prompt) in enumerate(zip(rows, sizes, strict=True)):
        start = 0 if side == "right" else length - len(ids)
        batch["input_ids"][row, start:start + len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, start:start + len(ids)] = 1
        batch["completion_mask"][row, start + prompt:start + len(ids)] = 1
    return batch


def options_of(name: str) -> dict: return {"window": 2} if name == "adpo" else {}


def mean_and_gradients(loss, weights): return loss.detach(), torch.autograd.grad(loss, weights)


def fast(name, model, ref_model, batch, weights, baseline=None, **changes):
    loss = functools.partial(LOSSES[name], **options_of(name))
    return mean_and_gradients(pair_loss(model, ref_model, batch, loss, baseline=baseline, **changes).loss, weights)


def slow(name, model, ref_model, batch, weights, baseline=None):
    "From full logits, each row on its own."
    return mean_and_gradients(
        LOSSES[name](*plain(model, ref_model, batch, baseline), **options_of(name)).losses.mean(), weights
    )


@pytest.mark.parametrize("family, dtype, side", FAST)
def test_fast_ways_match_full_logits(family, dtype, side):
    model, ref_model = (make(family, seed, **WINDOWED.get(family, {})).to(getattr(torch, dtype)) for seed in (0, 1))
    ref_model.requires_grad_(False)
    batch, weights = shared_batch(side), list(model.parameters())
    tolerance = (
        1e-5 if dtype == "float32" else 1e-9 if family in ("GPT2", "GPTNeoX", "OPT") else 1e-6
    )  # the others normalise in float32
    for name in ("dpo", "tdpo1", "tbpo_a"):
        wanted = slow(name, model, ref_model, batch, weights)
        for changes in (
            dict(shared_prompt=True),
            dict(shared_prompt=True, chunk_size=4),
            dict(shared_prompt=False, chunk_size=7),
            dict(shared_prompt=True, one_pass=False),
        ):
            close(fast(name, model, ref_model, batch, weights, **changes), wanted, tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_fast_ways_serve_every_loss(name):
    model, ref_model, batch = make("GPT2"), make("GPT2", 1).requires_grad_(False), shared_batch()
    head = BaselineHead(16, 8).double()
    torch.nn.init.normal_(head.layers[-1].weight)
    baseline = (lambda hidden: head.layers(hidden).squeeze(-1)) if LOSSES[name].baseline else None
    weights = list(model.parameters()) + (list(head.parameters()) if baseline else [])
    wanted = slow(name, model, ref_model, batch, weights, baseline)
    for chunk_size in (1, 5, None):
        close(fast(name, model, ref_model, batch, weights, baseline, chunk_size=chunk_size), wanted, 1e-9)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2"])
def test_fast_ways_with_an_adapter(family):
    base = make(family, **WINDOWED.get(family, {})).float()
    torch.manual_seed(5)
    modules = {"GPT2": ["c_attn"]}.get(family, ["q_proj", "v_proj"])
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False, fan_in_fan_out=family == "GPT2")
    model = get_peft_model(copy.deepcopy(base), config).float().eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    for name in ("dpo", "tdpo1"):
        close(
            fast(name, model, None, shared_batch(), weights, chunk_size=6),
            slow(name, model, base, shared_batch(), weights),
            1e-5,
        )
    assert model.get_base_model().get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_pairs_in_both_attentions(attention):
    model, ref_model = (make("Llama", seed).float() for seed in (0, 1))
    for m in (model, ref_model): m.set_attn_implementation(attention)
    weights = list(model.parameters())
    close(fast("tdpo2", model, ref_model, shared_batch(), weights, shared_prompt=True),
          slow("tdpo2", model, ref_model, shared_batch(), weights), 1e-5)


def test_packed_pairs_hold_nothing_twice():
    batch = shared_batch()
    packed = pack_pairs(batch, hidden_size=16)
    rows, columns = batch["attention_mask"].nonzero(as_tuple=True)
    places = packed.locate(rows, columns)
    assert_close(packed.input_ids.flatten()[places], batch["input_ids"][rows, columns])
    assert (
        len(places.unique()) == (packed.segment >= 0).sum() == len(places) - 6 - 3
    )  # two prompts and one begun response are shared
    assert_close(packed.shared, torch.tensor([6, 3, 0] * 2))
    assert packed.sees().any(-1).all(), "a row that sees nothing has a softmax of nan"


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_one_pass_against_finite_differences(needs, size):
    torch.manual_seed(1)
    lengths, targets = [3, 2, 1, 2], torch.randint(7, (8,))
    ref_hidden, ref_head = (
        torch.randn(8, 4, dtype=torch.float64),
        Head(torch.randn(7, 4, dtype=torch.float64), softcap=3.0),
    )

    def loss(chosen, rejected):
        total = lambda s: (s.log_ratio.sin() + 0.3 * s.kl_terms ** 2 + s.logps * s.baseline).sum(-1)
        value = (0.5 * total(chosen) - total(rejected)).tanh()
        return PairLoss(value, value, value)
    def run(hidden, weight, bias, baseline):
        policy, reference = Features(hidden, Head(weight, bias, 0.5, 2.0)), Features(ref_hidden, ref_head)
        pairs = one_pass.PairFeatures(policy, reference, targets, lengths, {"baseline": baseline})
        return 3 * one_pass.loss_of_features(pairs, loss, Wants(kl=True), chunk_size=size).loss
    shapes, grads = ((8, 3), (7, 3), (7,), (8,)), (needs[0], needs[1], needs[1], True)
    assert torch.autograd.gradcheck(
        run, [torch.randn(s, dtype=torch.float64, requires_grad=g) for s, g in zip(shapes, grads, strict=True)]
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_one_pass_in_low_precision_and_under_autocast(name, dtype, tolerance):
    model, ref_model, batch = make("Llama").float(), make("Llama", 1).float(), shared_batch()
    weights = list(model.parameters())
    exact = fast(name, model, ref_model, batch, weights)
    with torch.autocast("cpu", dtype): mixed = fast(name, model, ref_model, batch, weights)
    low = fast(name, model.to(dtype), ref_model.to(dtype), batch, list(model.parameters()))
    assert mixed[0].dtype == low[0].dtype == torch.float32 and {g.dtype for g in mixed[1]} == {torch.float32}
    for other in (mixed, low):
        assert_close(other[0], exact[0], rtol=tolerance, atol=tolerance)
        for a, b in zip(other[1], exact[1], strict=True):
            assert_close(a.float(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_a_factor_on_the_loss_reaches_every_gradient():
    model, ref_model, batch = make("GPT2"), make("GPT2", 1), shared_batch()
    weights = list(model.parameters())
    loss = lambda: pair_loss(model, ref_model, batch, LOSSES["tdpo1"]).loss
    for a, b in zip(torch.autograd.grad(0.25 * loss(), weights), torch.autograd.grad(loss(), weights), strict=True):
        assert_close(4 * a, b)
    twice = loss()
    twice.backward(retain_graph=True), twice.backward()
    for p, b in zip(weights, torch.autograd.grad(loss(), weights), strict=True): assert_close(p.grad, 2 * b)


def test_without_gradient_statistics_only():
    model, ref_model, batch = make("GPT2"), make("GPT2", 1), shared_batch()
    with torch.no_grad():
        found = pair_loss(model, ref_model, batch, LOSSES["tdpo2"], entropy=True, reverse_kl=True, chunk_size=4)
    assert not found.loss.requires_grad
    for ours, oracle in zip(
        (found.chosen, found.rejected), token_stats(model, ref_model, batch, entropy=True, reverse_kl=True), strict=True
    ):
        for field, value in vars(oracle).items():
            if value is not None: assert_close(getattr(ours, field), value.detach())


def test_weights_and_reference_log_probs_of_the_batch_are_used():
    model, ref_model, batch = make("GPT2"), make("GPT2", 1), shared_batch()
    bare = pair_loss(model, ref_model, batch, LOSSES["dpo"])
    longest = max(s.logps.shape[1] for s in (bare.chosen, bare.rejected))
    known = torch.cat(
        [
            torch.nn.functional.pad(s.ref_logps, (0, longest - s.ref_logps.shape[1]))
            for s in (bare.chosen, bare.rejected)
        ]
    )
    assert_close(pair_loss(model, None, {**batch, "ref_logps": known}, LOSSES["dpo"]).loss, bare.loss)
    half = {**batch, "weights": 0.5 * batch["completion_mask"]}
    assert_close(pair_loss(model, ref_model, half, LOSSES["dpo"]).chosen.log_ratio, 0.5 * bare.chosen.log_ratio)


def test_what_cannot_be_packed_is_refused_or_runs_apart(caplog):
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=41)
    model, ref_model = (transformers.BloomForCausalLM(config).eval() for _ in range(2))
    with pytest.raises(ValueError, match="takes no position ids"):
        pair_loss(model, ref_model, shared_batch(), LOSSES["dpo"], shared_prompt=True)
    apart = pair_loss(model, ref_model, shared_batch(), LOSSES["dpo"])
    assert "runs with its own prompt" in caplog.text
    assert_close(apart.loss, pair_loss(model, ref_model, shared_batch(), LOSSES["dpo"], shared_prompt=False).loss)


def test_a_model_that_counts_columns_is_found_out():
    class Counts(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)
        forward.__signature__ = inspect.signature(transformers.LlamaForCausalLM.forward)
    model = Counts(make("Llama").config).eval()
    assert "states differ" in packing_obstacle(model, shared_batch())


def test_a_loss_that_mixes_pairs_is_found_out():
    def centred(chosen, rejected):
        margin = chosen.logps.sum(-1) - rejected.logps.sum(-1)
        return PairLoss((margin - margin.mean()) ** 2, margin, margin)
    model, ref_model, batch = make("GPT2"), make("GPT2", 1), shared_batch()
    with pytest.raises(ValueError, match="other pairs"): pair_loss(model, ref_model, batch, centred, chunk_size=1)
    assert "other pairs" in engine.engine_obstacles(model, ref_model, batch, centred)["one_pass"]


@pytest.mark.parametrize("name", ["bpo", "tbpo_q"])
def test_rounding_of_a_loss_of_nothing_is_no_obstacle(name):
    "On its reference the loss is zero but for rounding, whichever way it is taken; its gradient is not."
    model, batch = make("Llama", 2).float(), make_batch()
    head = BaselineHead(16, 8) if LOSSES[name].baseline else None
    sides = token_stats(model, None, batch, kl=False)
    known = torch.cat([torch.nn.functional.pad(s.logps.detach(), (0, 6 - s.logps.shape[1])) for s in sides])
    noise = 1e-6 * torch.randn(
        known.shape, generator=torch.Generator().manual_seed(0)
    )  # of a reference scored in another batch
    assert (
        engine.engine_obstacles(model, None, {**batch, "ref_logps": known + noise}, LOSSES[name], baseline=head)[
            "one_pass"
        ]
        is None
    )


# What needs no reference

def test_a_loss_without_a_reference_does_not_run_it():
    model, batch, calls = make("Llama"), make_batch(), []
    ref_model = make("Llama", 1)
    pair_loss(model, ref_model, batch, LOSSES["dpo"])       # both models are tried, once
    ref_model.register_forward_hook(lambda *_: calls.append("reference"))
    simpo = functools.partial(LOSSES["simpo"], beta=2.0)
    bare = pair_loss(model, None, batch, simpo, shared_prompt=False)
    given = pair_loss(model, ref_model, batch, simpo, shared_prompt=False)
    assert not calls and given.chosen.ref_logps is None and given.chosen.kl is None
    assert_close(given.loss, bare.loss)
    assert engine.engine_obstacles(model, ref_model, batch, simpo)["one_pass"] is None
    with torch.no_grad(): asked = pair_loss(model, ref_model, batch, simpo, kl=True, shared_prompt=False)
    assert calls and asked.chosen.kl is not None
    assert pair_stats(model, ref_model, batch)[0].ref_logps is not None


def test_a_loss_without_a_reference_runs_an_adapter_once():
    model, calls = get_peft_model(make("Llama"), LoraConfig(r=2, target_modules=["q_proj"])).double(), []
    pair_loss(model, None, make_batch(), LOSSES["dpo"], shared_prompt=False)        # the model is tried, once
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    for name, runs in (("simpo", 1), ("dpo", 2)):
        calls.clear()
        pair_loss(model, None, make_batch(), LOSSES[name], shared_prompt=False)
        assert len(calls) == runs, name


# Layouts and their attentions

@pytest.mark.parametrize("family", [family for family in MODELS if family != "Gemma2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same(family, layout, monkeypatch):
    model, ref_model = (make(family, seed).float() for seed in (0, 1))
    assert takes_segments(model, shared_batch())
    monkeypatch.setattr(one_pass, "choose_layout", lambda models, batch, host: layout)
    batch, weights = shared_batch(), list(model.parameters())
    fast_way = fast("tdpo1", model, ref_model, batch, weights, shared_prompt=True)
    close(fast_way, slow("tdpo1", model, ref_model, batch, weights), 1e-5)
    assert model.config._attn_implementation == ref_model.config._attn_implementation == "sdpa"


def test_segments_only_where_they_are_exact():
    batch = shared_batch()
    assert not takes_segments(make("Mistral", sliding_window=4).float(), batch)
    model = make("Mistral", sliding_window=8).float()
    assert takes_segments(model, {name: x[:, :7] for name, x in batch.items()}), "no row is longer than the window"
    assert not takes_segments(model, batch), "a later batch may be"


def test_branches_are_for_a_gpu(monkeypatch):
    model, batch = make("Llama").float(), shared_batch()
    assert choose_layout([model], batch) != "branches"
    monkeypatch.setattr(trial, "BRANCHES_ON_CPU", True)
    assert choose_layout([model], batch) != "branches", "the third pair shares nothing"
    sharing = {name: x[[0, 1, 3, 4]] for name, x in batch.items()}
    assert choose_layout([model], sharing) == "branches"
    dropping = make("Llama", attention_dropout=0.1).float().train()
    assert choose_layout([dropping], sharing) != "branches", "FlashAttention over many sequences has no dropout here"


def test_attention_is_given_back_after_an_error():
    model, packed = make("Llama"), pack_pairs(shared_batch(), layout="segments")
    with pytest.raises(KeyError):
        with packed_attention(packed, model): raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_gets_another_configuration_attends_by_it():
    "Configurations are looked for once a model; another one is noticed."
    model, packed = make("Llama"), pack_pairs(shared_batch(), layout="segments")
    for config in (model.config, copy.deepcopy(model.config)):
        for module in model.modules():
            if hasattr(module, "config"): module.config = config
        with packed_attention(packed, model): assert config._attn_implementation == "tokpref_packed"
        assert config._attn_implementation == "sdpa"


def test_packed_inputs_are_of_no_use_to_another_attention():
    model, packed = make("Llama"), pack_pairs(shared_batch(), layout="segments")
    with pytest.raises(RuntimeError): model(**packed_inputs(packed, model))


def test_a_table_takes_no_memory_on_the_way_to_a_device():
    "Its first three dimensions say numbers: expanded before a copy, they would be copied."
    packed = pack_pairs(shared_batch(), layout="branches").to("meta")
    assert packed_inputs(packed, make("Llama"))["attention_mask"].stride() == (0, 0, 0, 1)


def test_a_model_that_keeps_our_attention_runs_as_before():
    model, batch = make("Llama"), shared_batch()
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    wanted = model(**inputs).logits
    model.config._attn_implementation = "tokpref_packed"
    there = batch["attention_mask"].bool()
    assert_close(model(**inputs).logits[there], wanted[there])


def test_many_pairs_are_packed_in_little_time():
    "Trials do not grow with the number of pairs; by hand: rows of 4 and 4 beat one of 8 and three of 4, 2 and 2."
    assert pack_rows([4, 2, 2], hidden_size=0) == ([[0], [1, 2]], 4)
    rows, length = pack_rows([7 * i % 400 + 1 for i in range(1024)], hidden_size=576)
    assert sorted(i for row in rows for i in row) == list(range(1024)) and length >= 400


@pytest.mark.parametrize("layout", ["segments", "branches"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints_change_nothing(reentrant, layout, monkeypatch):
    monkeypatch.setattr(one_pass, "choose_layout", lambda models, batch, host: layout)
    model, ref_model, batch = make("Llama").float(), make("Llama", 1).float(), shared_batch()
    pair_loss(model, ref_model, batch, LOSSES["tdpo1"]).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.train(), model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    pair_loss(model, ref_model, batch, LOSSES["tdpo1"]).loss.backward()
    for p, b in zip(model.parameters(), wanted, strict=True): assert_close(p.grad, b, rtol=1e-5, atol=1e-6)


def test_flex_attention_takes_packed_pairs(monkeypatch):
    "Its rule through transformers, on a CPU without the compiled kernel, which has no backward pass there."
    import transformers.integrations.flex_attention as integration
    from torch.nn.attention import flex_attention as flex
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(
        integration,
        "compile_friendly_flex_attention",
        lambda q, k, v, training=False, **kw: flex.flex_attention(q, k, v, **kw),
    )
    config = dict(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model, reference = (transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval() for _ in range(2))
    ids = lambda n: torch.randint(3, 53, (n,)).tolist()
    rows = [
        {"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
        for p, c, r in ((60, 30, 20), (90, 10, 40), (20, 30, 5))
    ]
    batch = PreferenceCollator(pad_token_id=0)(rows)
    with torch.no_grad(): wanted = token_stats(model, reference, batch)
    for m in (model, reference): m.set_attn_implementation("flex_attention")
    assert packing_obstacle(model, batch) is None
    for ours, plain in zip(pair_stats(model, reference, batch, kl=True, shared_prompt=True), wanted, strict=True):
        assert_close(ours.logps, plain.logps, rtol=0, atol=1e-5)
        assert_close(ours.kl, plain.kl, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 64])
@pytest.mark.parametrize("name", ["dpo", "tdpo2", "tbpo_a"])
def test_a_batch_in_two_sweeps(name, chunk_size):
    "one_pass=False: all statistics first, chunk by chunk, whatever fits; the same loss and gradients."
    model, ref_model, batch = make("Llama"), make("Llama", 1), make_batch()
    weights = list(model.parameters())
    once = pair_loss(model, ref_model, batch, LOSSES[name])
    twice = pair_loss(model, ref_model, batch, LOSSES[name], one_pass=False, chunk_size=chunk_size)
    assert_close(twice.loss, once.loss)
    for a, b in zip(torch.autograd.grad(twice.loss, weights), torch.autograd.grad(once.loss, weights), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_loss_that_mixes_the_pairs():
    "Its gradient needs all pairs: in tiles it is refused, in two sweeps it equals autograd through plain statistics."

    def centred(chosen, rejected):
        margins = chosen.logps.sum(-1) - rejected.logps.sum(-1) + 0.3 * rejected.kl_terms.sum(-1)
        return PairLoss((margins - margins.mean()) ** 2, margins, margins)
    model, ref_model, batch = make("Llama"), make("Llama", 1), make_batch()
    weights = list(model.parameters())
    wanted = torch.autograd.grad(centred(*token_stats(model, ref_model, batch)).mean(), weights)
    ours = pair_loss(model, ref_model, batch, centred, kl=True, one_pass=False, chunk_size=3)
    for a, b in zip(torch.autograd.grad(ours.loss, weights), wanted, strict=True):
        assert_close(a, b, rtol=1e-7, atol=1e-10)
    with pytest.raises(ValueError, match="one_pass=False"):
        pair_loss(model, ref_model, batch, centred, kl=True, chunk_size=3)


def test_rows_without_gradient_are_left_out(monkeypatch):
    "TBPO reads the shared positions only: no product is taken with the others, and nothing changes."
    seen, take = [], GradientSums.add
    monkeypatch.setattr(
        GradientSums, "add", lambda self, rows, *rest: (seen.append(len(rows)), take(self, rows, *rest))[1]
    )
    model, ref_model, batch = make("Llama"), make("Llama", 1), make_batch()
    weights = list(model.parameters())
    wanted = torch.autograd.grad(LOSSES["tbpo_a"](*token_stats(model, ref_model, batch)).mean(), weights)
    in_two_steps, seen[:] = list(seen), []
    ours = torch.autograd.grad(pair_loss(model, ref_model, batch, LOSSES["tbpo_a"]).loss, weights)
    for a, b in zip(ours, wanted, strict=True): assert_close(a, b, rtol=1e-7, atol=1e-10)
    lengths = batch["completion_mask"].sum(-1).view(2, -1)
    assert sum(seen) == sum(in_two_steps) == 2 * lengths.amin(0).sum() < lengths.sum()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("budget", [1, 12, 30, 1000])
def test_passes_by_tokens_add_up(side, budget):
    "Pairs stay in order and whole, with what belongs to them; the gradients of the passes sum to that of the batch."
    model, ref_model, batch = make("Llama"), make("Llama", 1), shared_batch(side)
    pairs, weights = len(batch["input_ids"]) // 2, list(model.parameters())
    batch |= {"row": torch.arange(pairs), "weights": torch.rand(batch["input_ids"].shape, dtype=torch.float64)}
    parts = split_by_tokens(batch, budget)
    assert torch.cat([part["row"] for part in parts]).tolist() == list(range(pairs))
    assert len(parts) == {1: pairs, 1000: 1}.get(budget, len(parts)) and all(
        part["weights"].shape == part["input_ids"].shape for part in parts
    )
    wanted = torch.autograd.grad(pair_loss(model, ref_model, batch, LOSSES["tdpo2"]).loss, weights)
    sums = [0.0] * len(weights)
    for part in parts:
        loss = pair_loss(model, ref_model, part, LOSSES["tdpo2"]).loss * len(part["row"]) / pairs
        sums = [a + b for a, b in zip(sums, torch.autograd.grad(loss, weights), strict=True)]
    for a, b in zip(sums, wanted, strict=True): assert_close(a, b, rtol=1e-7, atol=1e-10)


# An accelerator is not kept waiting

VIEWS = {
    "view",
    "slice",
    "t",
    "select",
    "unsqueeze",
    "alias",
    "detach",
    "split",
    "split_with_sizes",
    "expand",
    "transpose",
    "_unsafe_view",
}


class Launches(TorchDispatchMode):
    "The operations on tensors of numbers; what is worked out on whole numbers, on the CPU, does not count."

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        found = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if name not in VIEWS and any(x.is_floating_point() for x in found): self.names.append(name)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")):
            self.names.append("waits")
        return out


def pair_features_of(pairs: int, positions: int = 48) -> one_pass.PairFeatures:
    "Made-up features of so many pairs with so many positions in all."
    torch.manual_seed(0)
    states, weight = torch.randn(positions, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    known = {"baseline": torch.randn(positions, requires_grad=True)}
    return one_pass.PairFeatures(
        Features(states, Head(weight)),
        Features(torch.randn(positions, 6), Head(torch.randn(50, 6))),
        torch.randint(50, (positions,)),
        [positions // pairs // 2] * 2 * pairs,
        known,
    )


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    for module in (in_place, gradients_of_a_chunk): monkeypatch.setattr(module, "on_cpu", lambda device: False)


@pytest.mark.parametrize("name, most", [("dpo", 80), ("tdpo2", 100)])
def test_a_step_does_not_launch_more_for_more_pairs(name, most, as_on_an_accelerator):
    counts = []
    for pairs in (2, 6):
        given = pair_features_of(pairs)
        with Launches() as launches:
            one_pass.loss_of_features(given, LOSSES[name], Wants(kl=LOSSES[name].kl)).loss.backward()
        assert "waits" not in launches.names
        counts.append(len(launches.names))
    assert counts[0] == counts[1] <= most, counts


def test_statistics_with_gradient_do_not_wait(as_on_an_accelerator):
    counts = []
    for pairs in (2, 6):
        given = pair_features_of(pairs)
        with Launches() as launches:
            chosen, rejected = given.grid().stats(
                gradients_of_a_chunk.scored_twice(given.policy, given.reference, given.targets, Wants(kl=True))
            )
            (chosen.logps.sum() + rejected.kl.sum()).backward()
        assert "waits" not in launches.names
        counts.append(len(launches.names))
    assert counts[0] == counts[1] <= 70, counts


@pytest.mark.parametrize("name", ["dpo", "tdpo2", "tbpo_a"])
@pytest.mark.parametrize("chunk_size", [5, 24, None])
def test_the_ways_of_an_accelerator_are_exact(name, chunk_size, as_on_an_accelerator):
    model, ref_model, batch = make("GPT2"), make("GPT2", 1).requires_grad_(False), shared_batch()
    weights = list(model.parameters())
    close(
        fast(name, model, ref_model, batch, weights, chunk_size=chunk_size),
        slow(name, model, ref_model, batch, weights),
        1e-9,
    )


# Models that are built in another way: what `tools/scan_models.py` looks at for all of them, on a few

ODD = {     # class: settings; how its numbers are had (words of the reason, None: by states and head); can be packed
    "LlamaForCausalLM": (dict(), None, True),
    "MllamaForCausalLM": (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, cross_attention_layers=[],
                               pad_token_id=0), None, True),
    "ModernBertDecoderForCausalLM": (dict(head_dim=None, cls_token_id=3, sep_token_id=4), "output head makes", True),
    "BertLMHeadModel": (dict(is_decoder=True), "output head makes", True),
    "RobertaForCausalLM": (dict(is_decoder=True), "output head makes", False),
    "Gemma2ForCausalLM": (dict(sliding_window=64), None, True),      # left padding in a window made nan of gradients
    "BartForCausalLM": (dict(d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32), None, False),
}
CONFIGS = {"MllamaForCausalLM": "MllamaTextConfig", "ModernBertDecoderForCausalLM": "ModernBertDecoderConfig",
           "BertLMHeadModel": "BertConfig", "RobertaForCausalLM": "RobertaConfig", "BartForCausalLM": "BartConfig"}


def odd(name: str, seed: int = 0):
    config = getattr(transformers, CONFIGS.get(name, name.replace("ForCausalLM", "Config")))
    settings = {key: value for key, value in (SMALL | ODD[name][0]).items() if value is not None}
    if "d_model" in settings:
        settings = {key: value for key, value in settings.items() if not key.startswith(("hidden", "num_", "head"))}
    torch.manual_seed(seed)
    return getattr(transformers, name)(config(**settings)).eval().double()


def rows_alone(model, ref_model, batch):
    "DPO's mean loss from plain logits, one unpadded row at a time, with nothing but its ids."
    ratios = []
    for ids, mask, scored in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
        def score(m, ids=ids[mask][None], kept=scored[mask][1:]):
            return m(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[kept].sum()
        with torch.no_grad(): base = score(ref_model)
        ratios.append(score(model) - base)
    margins = torch.stack(ratios[:len(ratios) // 2]) - torch.stack(ratios[len(ratios) // 2:])
    return -torch.nn.functional.logsigmoid(0.1 * margins).mean()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", list(ODD))
def test_models_that_count_or_score_in_another_way(name, side, caplog):
    model, ref_model, batch = odd(name), odd(name, 1), make_batch(side)
    _, reason, packs = ODD[name]
    wanted = rows_alone(model, ref_model, batch)
    for fast in (True, False):
        shared = None if fast else False
        loss = pair_loss(model, ref_model, batch, LOSSES["dpo"], one_pass=fast, shared_prompt=shared).loss
        near(loss.double(), wanted.double(), 1e-6)
        weights = [p for p in model.parameters() if p.requires_grad]
        ours, theirs = (torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (loss, wanted))
        largest = max(g.abs().max() for g in theirs if g is not None).double()
        for a, b in zip(ours, theirs, strict=True):
            if b is not None: assert ((0 if a is None else a) - b).abs().max() < 1e-6 * largest
    said = full_logits_reason(model)
    assert (said is None) == (reason is None) and (reason is None or reason in said)
    assert (packing_obstacle(model, batch) is None) == packs
    stats = token_stats(model, ref_model, batch, kl=False)
    near(LOSSES["dpo"](*stats).losses.mean().double(), wanted.double(), 1e-6)


def test_a_model_that_looks_ahead_is_refused():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="BertLMHeadModel looks ahead.*config.is_decoder = True"):
        token_stats(model, model, make_batch(), kl=False)


# Compiled models

@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_compiled_model_keeps_the_fast_ways(family, side):
    model, ref_model, batch = make(family), make(family, 1), make_batch(side)
    compiled, ref_compiled = (torch.compile(m, backend="eager") for m in (model, ref_model))
    wanted = pair_loss(model, ref_model, batch, LOSSES["tdpo2"])
    wanted.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found = pair_loss(compiled, ref_compiled, batch, LOSSES["tdpo2"])
    found.loss.backward()
    near(found.pairs.losses, wanted.pairs.losses, 1e-9)
    close([p.grad for p in model.parameters()], expected, 1e-6)
    assert engine.engine_obstacles(compiled, ref_compiled, batch, LOSSES["tdpo2"]) == {
        "one_pass": None, "shared_prompt": None}


def batch_of(lengths: list[tuple[int, int, int]]) -> dict:
    "A batch of pairs with so many tokens in prompt, chosen and rejected."
    generator = torch.Generator().manual_seed(len(lengths))
    draw = lambda n: torch.randint(3, 41, (n,), generator=generator)
    prompts = [draw(prompt) for prompt, _, _ in lengths]
    both = [(p, sizes[side]) for side in (1, 2) for p, sizes in zip(prompts, lengths, strict=True)]
    rows = [(p, torch.cat([p, draw(size)])) for p, size in both]
    fill = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
    return {
        "input_ids": fill([ids for _, ids in rows]),
        "attention_mask": fill([torch.ones_like(ids) for _, ids in rows]),
        "completion_mask": fill([(torch.arange(len(ids)) >= len(p)).long() for p, ids in rows]),
    }


@pytest.mark.parametrize("how", ["plain", "with an adapter and checkpoints"])
def test_compiled_layers_attend_in_branches(how, monkeypatch):
    "The way of a GPU: a layer is one graph, for all layers and lengths the same ones, and the numbers stay."
    monkeypatch.setattr(trial, "BRANCHES_ON_CPU", True)
    model, ref_model = make("Llama"), make("Llama", 1).requires_grad_(False)
    if how != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapter).double().train()
    weights = [p for p in model.parameters() if p.requires_grad]
    batches = [batch_of(n) for n in ([(4, 3, 2), (6, 5, 4), (3, 2, 6)], [(9, 2, 3), (5, 8, 2)], [(3, 4, 4)] * 4)]
    wanted = [fast("tdpo2", model, ref_model, batch, weights) for batch in batches]
    graphs = CompileCounterWithBackend("aot_eager")
    for m in (model, ref_model): compile_layers(m, backend=graphs, fullgraph=True)
    counts = []
    for batch, expected in zip(batches, wanted, strict=True):
        assert choose_layout([model, ref_model], batch) == "branches"
        close(fast("tdpo2", model, ref_model, batch, weights), expected, 1e-9)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1] and 0 < counts[0] <= 4, counts


# Noise on embeddings, mixtures of experts

def test_the_noise_of_neftune_is_that_of_plain_rows():
    "Its size goes with the length of a row, so pairs are not packed while it is on."
    model, batch = make("Llama").train(), make_batch()
    before = pair_loss(model, model, batch, LOSSES["dpo"], shared_prompt=True).loss
    handle = activate_neftune(model, 5.0)
    seen = []
    embeddings = model.get_input_embeddings()
    watch = embeddings.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out.detach())))
    reference = make("Llama")
    pair_loss(model, reference, batch, LOSSES["dpo"])
    ids, out = next((ids, out) for ids, out in seen if ids.shape == batch["input_ids"].shape)
    noise = (out - embeddings.weight[ids]).detach().abs()
    limit = 5.0 / (ids.shape[1] * 16) ** 0.5
    assert 0.95 * limit < noise.max() <= limit and noise.mean() == pytest.approx(limit / 2, rel=0.1)
    assert engine.engine_obstacles(model, reference, batch, LOSSES["dpo"])["shared_prompt"].endswith("length of a row")
    watch.remove()
    deactivate_neftune(model, handle)
    near(pair_loss(model, model, batch, LOSSES["dpo"], shared_prompt=True).loss, before, 1e-9)


def experts(seed: int = 0, **changes):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, **changes)
    config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config).double()


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_auxiliary_loss_of_a_mixture_of_experts_is_added(side):
    asks = dict(output_router_logits=True, router_aux_loss_coef=0.1)
    model, plain_model, ref_model, batch = experts(**asks), experts(), experts(1), make_batch(side)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    auxiliary = 0.1 * model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).aux_loss
    plain_loss = pair_loss(plain_model, ref_model, batch, LOSSES["dpo"])
    found = pair_loss(model, ref_model, batch, LOSSES["dpo"])
    assert auxiliary > 0.1
    near(found.loss, plain_loss.loss + auxiliary, 1e-6)
    near(found.pairs.losses, plain_loss.pairs.losses, 1e-6)        # the pairs' own losses are without it
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), retain_graph=True, materialize_grads=True)
                    for x in (found.loss, auxiliary))
    alone = torch.autograd.grad(plain_loss.loss, list(plain_model.parameters()))
    for a, b, c in zip(ours, theirs, alone, strict=True): near(a, b + c, 1e-6)
    assert "auxiliary" in packing_obstacle(model, batch)


def test_an_auxiliary_loss_that_a_model_does_not_give_is_refused():
    model = make("Llama")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    with pytest.raises(ValueError, match="asks for an auxiliary loss, which LlamaForCausalLM does not give"):
        pair_loss(model, model, make_batch(), LOSSES["dpo"])
    assert pair_loss(make("Llama"), model, make_batch(), LOSSES["dpo"]).loss.isfinite()     # a reference adds none


@pytest.mark.parametrize("name,noise", [("Mixtral", dict(router_jitter_noise=0.3)),
                                        ("Phimoe", dict(router_jitter_noise=0.01, input_jitter_noise=0.3))])
def test_router_noise_is_off_with_dropout(name, noise):
    "On its reference a policy has no reward, in training mode as well."
    config = getattr(transformers, f"{name}Config")(**SMALL, num_local_experts=4, num_experts_per_tok=2, **noise)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double()
    reference, batch = copy.deepcopy(model).eval(), make_batch()
    def rewards() -> float:
        return pair_loss(model.train(), reference, batch, LOSSES["dpo"]).pairs.chosen_rewards.abs().max().item()
    assert rewards() > 1e-5
    disable_dropout(model)
    assert rewards() < 1e-12
    copied = copy.deepcopy(model).train()
    near(token_stats(copied, reference, batch)[0].logps, token_stats(model, reference, batch)[0].logps, 1e-12)
