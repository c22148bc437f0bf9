"""The same numbers on a GPU as on a CPU: engine, packing, adapters, trainer, sampling, against full logits in float64.

Skipped without a GPU. TOKPREF_TEST_DEVICE=cpu runs the same checks on a CPU, to test the tests.
"""
import copy
import functools
import os

import pytest
import test_engine as plain_engine
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from tokpref import (
    LOSSES,
    BaselineHead,
    PreferenceConfig,
    PreferenceTrainer,
    pair_loss,
    preference_metrics,
    sample,
    sample_kl,
    token_stats,
)
from tokpref.data import PreferenceCollator, prepare
from tokpref.engine import one_pass, trial
from tokpref.experiments.judges import RewardJudge
from tokpref.models import compile_layers

DEVICE = torch.device(os.environ.get("TOKPREF_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")
WAYS = {"one pass": dict(shared_prompt=True), "one pass, small tiles": dict(shared_prompt=True, chunk_size=4),
        "prompts apart": dict(shared_prompt=False), "two steps": dict(shared_prompt=True, one_pass=False)}


@pytest.fixture(autouse=True)
def full_precision():
    "float32 products in float32, not in TF32."
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def there(model, dtype=torch.float32): return copy.deepcopy(model).to(DEVICE, dtype)


def moved(batch): return {name: x.to(DEVICE) for name, x in batch.items()}


def same(found, wanted, tolerance):
    "Loss and gradients, each gradient to the size of its largest entry."
    assert_close(found[0].cpu().double(), wanted[0].double(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert_close(
            ours.cpu().double(), theirs.double(), rtol=tolerance, atol=tolerance * max(1e-3, theirs.abs().max().item())
        )


# The engine

@pytest.mark.parametrize("family", plain_engine.MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_in_float32(family, way):
    policy, reference = (plain_engine.make(family, seed) for seed in (0, 1))
    reference.requires_grad_(False)
    batch, weights = plain_engine.shared_batch(), list(policy.parameters())
    model, ref_model = there(policy), there(reference)
    for name in ("dpo", "tdpo1", "tbpo_a"):
        wanted = plain_engine.slow(name, policy, reference, batch, weights)
        same(
            plain_engine.fast(name, model, ref_model, moved(batch), list(model.parameters()), **WAYS[way]), wanted, 1e-4
        )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_loss_in_float32(name, side):
    policy, reference, batch = (
        plain_engine.make("Llama"),
        plain_engine.make("Llama", 1).requires_grad_(False),
        plain_engine.shared_batch(side),
    )
    head = BaselineHead(16, 8)
    torch.nn.init.normal_(head.layers[-1].weight)
    here, gpu = copy.deepcopy(head).double(), copy.deepcopy(head).to(DEVICE)
    baseline = (lambda hidden: here.layers(hidden).squeeze(-1)) if LOSSES[name].baseline else None
    wanted = plain_engine.slow(
        name,
        policy,
        reference,
        batch,
        list(policy.parameters()) + (list(here.parameters()) if baseline else []),
        baseline,
    )
    model = there(policy)
    weights = list(model.parameters()) + (list(gpu.parameters()) if baseline else [])
    same(
        plain_engine.fast(name, model, there(reference), moved(batch), weights, gpu if baseline else None), wanted, 1e-4
    )


def distance(found, wanted):
    "Relative error of loss and of all gradients together."
    flat = lambda parts: torch.cat([part.detach().cpu().double().flatten() for part in parts])
    ours, theirs = flat(found[1]), flat(wanted[1])
    return abs(found[0].item() - wanted[0].item()), ((ours - theirs).norm() / theirs.norm()).item()


def under_autocast(name, model, ref_model, batch, weights):
    "Full logits of padded rows, everything that transformers computes under autocast, then the loss in float32."
    with torch.autocast(DEVICE.type, torch.bfloat16):
        stats = []
        for m in (model, ref_model):
            logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            stats.append(logits.log_softmax(-1))
    keep = batch["completion_mask"][:, 1:].bool()
    logp, logq = stats[0], stats[1].detach()
    y = batch["input_ids"][:, 1:, None]
    values = (
        logp.gather(-1, y)[..., 0] * keep,
        logq.gather(-1, y)[..., 0] * keep,
        keep,
        (logq.exp() * (logq - logp)).sum(-1) * keep,
    )
    half = len(keep) // 2
    sides = [
        plain_engine.TokenStats(*(value[part] for value in values)) for part in (slice(0, half), slice(half, None))
    ]
    return plain_engine.mean_and_gradients(LOSSES[name](*sides).losses.mean(), weights)


@pytest.mark.parametrize("name", ["dpo", "tdpo2", "tbpo_a"])
def test_bfloat16_loses_no_more_than_full_logits_do(name):
    policy, reference = (plain_engine.make("Llama", seed) for seed in (0, 1))
    batch = plain_engine.shared_batch()
    wanted = plain_engine.slow(name, policy, reference.requires_grad_(False), batch, list(policy.parameters()))
    model, ref_model = there(policy), there(reference)
    weights = list(model.parameters())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours = plain_engine.fast(name, model, ref_model, moved(batch), weights)
    assert ours[0].dtype == torch.float32 and {g.dtype for g in ours[1]} == {torch.float32}
    ours, theirs = (
        distance(ours, wanted),
        distance(under_autocast(name, model, ref_model, moved(batch), weights), wanted),
    )
    assert ours[0] <= 2 * theirs[0] + 0.01 and ours[1] <= 1.5 * theirs[1] + 0.01, (ours, theirs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_models_in_low_precision(dtype, tolerance):
    policy, reference, batch = plain_engine.make("Llama"), plain_engine.make("Llama", 1), plain_engine.shared_batch()
    exact = token_stats(policy, reference, batch)
    for found, wanted in zip(
        token_stats(there(policy, dtype), there(reference, dtype), moved(batch)), exact, strict=True
    ):
        assert found.logps.dtype == torch.float32
        for field in ("logps", "ref_logps", "kl"):
            assert_close(getattr(found, field).cpu().double(), getattr(wanted, field), rtol=tolerance, atol=tolerance)


# Sizes at which tiles, packing and memory matter

def big(seed):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32_000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
    ).to(DEVICE)


def big_batch(pairs=4, prompt=40, longest=160):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 32_000, (n,), generator=generator)
    prompts, lengths = (
        [draw(prompt + i) for i in range(pairs)],
        torch.randint(8, longest, (2 * pairs,), generator=generator).tolist(),
    )
    rows = [torch.cat([prompts[i % pairs], draw(n)]) for i, n in enumerate(lengths)]
    pad = lambda values: torch.nn.utils.rnn.pad_sequence(values, batch_first=True).to(DEVICE)
    ends = [torch.arange(len(row)) >= len(prompts[i % pairs]) for i, row in enumerate(rows)]
    return {
        "input_ids": pad(rows),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "completion_mask": pad([end.long() for end in ends]),
    }


def test_packed_in_tiles_and_apart_are_one_number():
    model, ref_model, batch = big(0), big(1).requires_grad_(False), big_batch()
    weights = list(model.parameters())
    wanted = plain_engine.fast("tdpo2", model, ref_model, batch, weights, shared_prompt=False, one_pass=False)
    for changes in (
        dict(shared_prompt=True),
        dict(shared_prompt=True, chunk_size=50),
        dict(shared_prompt=False, workspace=2**24),
    ):
        same(plain_engine.fast("tdpo2", model, ref_model, batch, weights, **changes), tuple(
            x.detach().cpu() if torch.is_tensor(x) else [g.cpu() for g in x] for x in wanted), 1e-4)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts the GPU's memory")
def test_the_engine_never_holds_the_scores_of_a_batch():
    model, ref_model, batch = big(0), big(1).requires_grad_(False), big_batch(8, 40, 400)
    tokens = int(batch["completion_mask"].sum())
    def peak(**changes):
        torch.cuda.synchronize(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pair_loss(model, ref_model, batch, LOSSES["tdpo2"], **changes).loss.backward()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before
    peak(workspace=2**24)
    assert peak(workspace=2**24) < 4 * tokens * 32_000, "less than one float32 matrix of all scores"


# Adapters

@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tbpo_a"])
def test_an_adapter_and_its_absence(name):
    base = plain_engine.make("Llama")
    torch.manual_seed(5)
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).double()
    batch, trained = plain_engine.shared_batch(), [p for p in adapted.parameters() if p.requires_grad]
    wanted = plain_engine.slow(name, adapted, base, batch, trained)
    model = there(adapted)
    same(
        plain_engine.fast(name, model, None, moved(batch), [p for p in model.parameters() if p.requires_grad]),
        wanted,
        1e-4,
    )


# The trainer

PAIRS = [
    {"prompt": f"say {word} ", "chosen": word + "!", "rejected": other + ", never"}
    for word in ("yes", "no", "so", "ah")
    for other in ("maybe", "but", "go")
]


def trained(model, tokenizer, folder, resume=None, **changes):
    "A trainer after its steps."
    options = dict(
        beta=0.5,
        learning_rate=1e-2,
        optim="sgd",
        max_steps=4,
        per_device_train_batch_size=4,
        seed=0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=DEVICE.type == "cpu",
        **({"baseline_width": 8} if changes.get("loss") == "tbpo_q" else {}),
    )
    trainer = PreferenceTrainer(
        copy.deepcopy(model),
        PreferenceConfig(output_dir=str(folder), **{**options, **changes}),
        PAIRS,
        PAIRS[:5],
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    assert next(trainer.model.parameters()).device.type == DEVICE.type
    return trainer


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_takes_a_step(name, mixed, model, tokenizer, tmp_path):
    options = {"window": 2} if name == "adpo" else None
    trainer = trained(model, tokenizer, tmp_path, loss=name, loss_options=options, max_steps=1, bf16=mixed)
    moves = [
        (a.cpu() - b).abs().max().item() for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True)
    ]
    assert max(moves) > 0 and all(p.isfinite().all() for p in trainer.model.parameters())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["tdpo2", "tbpo_q"])
def test_a_resumed_run_ends_like_one_that_was_not_stopped(name, model, tokenizer, tmp_path):
    whole = trained(model, tokenizer, tmp_path / "whole", loss=name, optim="adamw_torch", learning_rate=1e-3)
    trained(
        model,
        tokenizer,
        tmp_path / "parts",
        loss=name,
        optim="adamw_torch",
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
    )
    again = trained(
        model,
        tokenizer,
        tmp_path / "parts",
        str(tmp_path / "parts" / "checkpoint-2"),
        loss=name,
        optim="adamw_torch",
        learning_rate=1e-3,
    )
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    if name == "tbpo_q":
        for a, b in zip(again.baseline_head.parameters(), whole.baseline_head.parameters(), strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_is_the_gradient_that_the_cpu_finds(model, tokenizer, tmp_path):
    "One step of plain SGD on all pairs, without clipping, against the gradient of the same loss in float64 on the CPU."
    found = trained(
        model, tokenizer, tmp_path, loss="tdpo2", max_steps=1, per_device_train_batch_size=len(PAIRS), max_grad_norm=0.0
    )
    policy, reference = copy.deepcopy(model).double(), copy.deepcopy(model).double().requires_grad_(False)
    batch = PreferenceCollator(tokenizer.pad_token_id)([dict(row) for row in prepare(PAIRS, tokenizer)[0]])
    pair_loss(policy, reference, batch, functools.partial(LOSSES["tdpo2"], beta=0.5)).loss.backward()
    for ours, theirs in zip(found.model.parameters(), policy.parameters(), strict=True):
        assert_close(ours.detach().cpu().double(), (theirs - 1e-2 * theirs.grad).detach(), rtol=1e-4, atol=1e-5)


# Measuring

def test_metrics_are_those_of_the_cpu(model, tokenizer):
    torch.manual_seed(2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p += 0.02 * torch.randn_like(p)
    rows, collator = prepare(PAIRS, tokenizer)[0], PreferenceCollator(tokenizer.pad_token_id)
    here = preference_metrics(other, model, rows, collator, batch_size=5, progress=False)
    found = preference_metrics(there(other), there(model), rows, collator, batch_size=5, progress=False)
    for name, value in here.items():
        if isinstance(value, float): assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_samples_are_the_models_own(model, tokenizer):
    policy = there(model)
    drawn = sample(policy, tokenizer, ["say yes", "no"], n=3, max_new_tokens=8, progress=False)
    again = sample(policy, tokenizer, ["say yes", "no"], n=3, max_new_tokens=8, progress=False)
    assert drawn.response_ids == again.response_ids and len(drawn) == 6
    numbers = sample_kl(policy, copy.deepcopy(policy), drawn, progress=False)
    assert numbers["kl"].abs().max() < 1e-4 and (numbers["entropy"] > 0).all()


def test_a_reward_model_judges_alike(tokenizer, tmp_path):
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    scorer = transformers.GPT2ForSequenceClassification(config)
    scorer.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    there_, back = (
        RewardJudge(str(tmp_path), max_length=64)(["say"], *pair)[0]
        for pair in ((["yes"], ["no no"]), (["no no"], ["yes"]))
    )
    assert there_ + back == pytest.approx(1, abs=1e-6)


# The way of a GPU

def sharing_batch():
    "Two pairs that share their beginnings."
    return {name: x[[0, 1, 3, 4]] for name, x in plain_engine.shared_batch().items()}


def wide(seed: int):
    "A random Llama with heads of 16, which FlashAttention takes."
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["dpo", "tdpo2", "tbpo_a"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_branches(dtype, tolerance, name, checkpointing, monkeypatch):
    "Attention in branches and the kernels, in half precision, against full logits in float64."
    monkeypatch.setattr(trial, "BRANCHES_ON_CPU", DEVICE.type == "cpu")
    policy, reference, batch = wide(0), wide(1).requires_grad_(False), sharing_batch()
    wanted = plain_engine.slow(name, policy, reference, batch, list(policy.parameters()))
    model, ref_model = there(policy, dtype), there(reference, dtype)
    assert trial.choose_layout([model, ref_model], moved(batch)) == "branches"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = plain_engine.fast(name, model, ref_model, moved(batch), list(model.parameters()), shared_prompt=True)
    loss, gradients = distance(found, wanted)
    assert loss < tolerance and gradients < tolerance, (loss, gradients)


def test_compiled_layers_change_nothing():
    policy, reference, batch = wide(0), wide(1).requires_grad_(False), sharing_batch()
    wanted = plain_engine.slow("tdpo2", policy, reference, batch, list(policy.parameters()))
    model, ref_model = there(policy, torch.bfloat16), there(reference, torch.bfloat16)
    for m in (model, ref_model): compile_layers(m, backend="inductor" if DEVICE.type == "cuda" else "eager")
    for _ in range(2):
        model.zero_grad()
        found = plain_engine.fast("tdpo2", model, ref_model, moved(batch), list(model.parameters()), shared_prompt=True)
        loss, gradients = distance(found, wanted)
        assert loss < 0.05 and gradients < 0.05, (loss, gradients)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is nothing to wait for")
@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_a_step_waits_only_for_its_plan(name, monkeypatch):
    model, ref_model = there(wide(0), torch.bfloat16), there(wide(1), torch.bfloat16).requires_grad_(False)
    batch, plan = moved(sharing_batch()), one_pass.plan
    def step(): pair_loss(model, ref_model, batch, LOSSES[name]).loss.backward()
    step()
    def waiting_plan(*args):
        torch.cuda.set_sync_debug_mode("default")
        try: return plan(*args)
        finally: torch.cuda.set_sync_debug_mode("error")
    monkeypatch.setattr(one_pass, "plan", waiting_plan)
    try: step()
    finally: torch.cuda.set_sync_debug_mode("default")
