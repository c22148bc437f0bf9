"""What the trainer says before its first step, what it computes where precision, adapters and stored numbers meet."""

import copy
import dataclasses
import doctest
import importlib.util
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from tokpref import LOSSES, PreferenceConfig, PreferenceTrainer, metrics, prepare
from tokpref.engine import pair_loss
from tokpref.losses import BaselineHead
from tokpref.losses.types import LossSpec, PairLoss
from tokpref.models import disable_dropout, layers_of, lora
from tokpref.training import load_baseline_head, model_card, trl
from tokpref.training.card import hub_name
from tokpref.training.config import check_even, check_streams
from tokpref.training.reference import mix_into
from tokpref.training.setup import add_to_optimizer, given_already, make_baseline_head, not_finite, without_last

PAIRS = [{"prompt": f"say {word} ", "chosen": word + "!", "rejected": other + ", never"}
         for word in ("yes", "no") for other in ("maybe", "but", "go")]


@pytest.fixture
def make(model, tokenizer, tmp_path):
    "A trainer on a copy of the tiny model and six pairs; what belongs to the trainer itself goes by `trainer=`."
    def make(trainer=None, **settings):
        common = dict(
            output_dir=str(tmp_path / "out"),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            max_steps=1,
            per_device_train_batch_size=6,
            per_device_eval_batch_size=6,
        )
        options = dict(model=copy.deepcopy(model), train_dataset=PAIRS, processing_class=tokenizer) | (trainer or {})
        return PreferenceTrainer(args=PreferenceConfig(**{**common, **settings}), **options)
    return make


def shifted(model: nn.Module, by: float = 0.1) -> nn.Module:
    "A copy whose weights are a little different."
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters(): p.add_(by * torch.randn_like(p))
    return other


def adapted(model: nn.Module) -> PeftModel:
    "A copy with an adapter that is not zero."
    config = LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return get_peft_model(copy.deepcopy(model), config)


# Loading

def test_what_is_no_language_model_is_named(make, model, tokenizer):
    config = model.config
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for wrong, words in ((GPT2Model(config), "a GPT2Model has no output head over the vocabulary"),
                         (GPT2ForSequenceClassification(config), "has no output head over the vocabulary"),
                         (t5, "reads the prompt with an encoder"), (nn.Linear(2, 2), "is no language model")):
        with pytest.raises(TypeError, match=f"policy: .*{words}.*AutoModelForCausalLM"): make(dict(model=wrong))
        with pytest.raises(TypeError, match=f"reference: .*{words}"): make(dict(ref_model=wrong))
    with pytest.raises(TypeError, match="pass the tokenizer inside it, processor.tokenizer"):
        make(dict(processing_class=SimpleNamespace(tokenizer=tokenizer)))


def test_a_setting_that_tears_pairs_apart_is_refused(make):
    with pytest.raises(ValueError, match="dispatch_batches=True would tear pairs apart between processes"):
        make(accelerator_config={"dispatch_batches": True})
    assert make().accelerator.dispatch_batches is False     # also of a stream, where accelerate would choose True


def test_a_batch_that_was_cut_along_its_rows_is_found_out(make, model):
    trainer = make()
    batch = next(iter(trainer.get_train_dataloader()))
    torn = {name: value[:6] for name, value in batch.items()}       # as accelerate gives it to the first process
    with pytest.raises(ValueError, match="6 rows of ids for 6 pairs: .*tore pairs apart"):
        pair_loss(model, model, torn, LOSSES["dpo"])


def test_batches_that_processes_would_wait_for_are_refused(make):
    make(accelerator_config={"even_batches": False})        # one process waits for nobody
    with pytest.raises(ValueError, match="even_batches=False would leave a process without its last batch"):
        check_even(False, 2)


@pytest.mark.parametrize("last, again", [(-1, (0, 0)), (0, (0, 0)), (1, (1, 2)), (2, (0, 2)), (3, (0, 1))])
def test_pairs_that_fill_up_a_batch_are_known(last, again):
    "Two processes of two pairs each, as accelerate fills them up, and how many of the four are new."
    assert tuple(given_already(last, pairs=2, process=process) for process in (0, 1)) == again


def test_the_last_pairs_of_a_batch_are_taken_out(make):
    trainer = make()
    batch = next(iter(trainer.get_train_dataloader()))
    kept = without_last(batch, 2)
    for name, values in batch.items():
        new = [0, 1, 2, 3, 6, 7, 8, 9] if len(values) == 12 else [0, 1, 2, 3]
        assert_close(kept[name], values[new])


def test_streams_are_not_evaluated_by_several_processes(make):
    stream = prepare(PAIRS, make().processing_class)[0].to_iterable_dataset()
    check_streams({"a": stream}, 1)
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length' would be ignored: a stream"):
        make(dict(train_dataset=stream), group_by_length=True)
    for data in (stream, {"b": stream}):
        with pytest.raises(ValueError, match="2 processes would count some pairs of a stream twice"):
            check_streams(data, 2)


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow", "pandas"])
def test_a_format_of_prepared_rows_changes_nothing(make, tokenizer, form):
    rows = prepare(PAIRS, tokenizer)[0]
    plain, other = (make(dict(train_dataset=data)) for data in (rows, rows.with_format(form)))
    for name, value in next(iter(plain.get_train_dataloader())).items():
        assert_close(next(iter(other.get_train_dataloader()))[name].sum(0), value.sum(0))     # in whatever order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_by_name_is_loaded_in_float32(make, model, tmp_path, dtype):
    for part in ("policy", "reference"): copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / part)
    trainer = make(dict(model=str(tmp_path / "policy"), ref_model=str(tmp_path / "reference")))
    assert {p.dtype for m in (trainer.model, trainer.ref_model) for p in m.parameters()} == {torch.float32}
    trainer.train()


def test_an_adapter_by_name_can_be_trained(make, model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    adapter = adapted(model)
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    trainer = make(dict(model=str(tmp_path / "adapter")))
    assert isinstance(trainer.model, PeftModel) and isinstance(trainer.ref_model, PeftModel)
    before = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert any(
        (a != b).any() for a, b in zip(before, (p for p in trainer.model.parameters() if p.requires_grad), strict=True)
    )


def test_a_model_without_trainable_weights_is_refused(make, model):
    with pytest.raises(
        ValueError,
        match="no weight of the model is trainable: load the adapter with is_trainable=True, or pass peft_config",
    ):
        make(dict(model=copy.deepcopy(model).requires_grad_(False)))
    make(
        dict(
            model=copy.deepcopy(model).requires_grad_(False),
            peft_config=LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        )
    )


def test_a_model_by_name_is_loaded_as_asked(make, model, tokenizer, tmp_path, monkeypatch):
    for part in ("policy", "reference"): model.save_pretrained(tmp_path / part)
    names = dict(model=str(tmp_path / "policy"), ref_model=str(tmp_path / "reference"))
    trainer = make(names, model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    for part in (trainer.model, trainer.ref_model):
        assert part.dtype == torch.bfloat16 and part.config._attn_implementation == "eager"
    assert make(names, model_init_kwargs='{"dtype": "float64"}').model.dtype == torch.float64
    with pytest.raises(ValueError, match="model_init_kwargs would be ignored: no model is given by name"):
        make(model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="dtype must be float32, .*got 'int8'"):
        make(names, model_init_kwargs={"dtype": "int8"})
    with pytest.raises(FileNotFoundError, match="cannot load .*no_such"):
        make(names, model_init_kwargs={"attn_implementation": "no_such"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, find=importlib.util.find_spec: None
                        if name == "bitsandbytes" else find(name))
    with pytest.raises(ValueError, match="bitsandbytes is not installed: .*quantization"):
        make(names, model_init_kwargs={"load_in_4bit": True})


def test_quantised_weights_need_an_adapter(make, model):
    quantised = copy.deepcopy(model)
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="quantised weights can't be trained: add an adapter"):
        make(dict(model=quantised))


def test_an_adapter_on_weights_of_four_bits_is_trained_on_the_fast_ways(make, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    trainer = make(dict(model=str(tmp_path / "llama"), peft_config=lora(4)), model_init_kwargs={"load_in_4bit": True},
                   logging_steps=1)
    trainer.train()
    assert trainer.engine == {"one_pass": True, "shared_prompt": True}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_baseline_head_beside_sharded_weights_is_refused(model):
    sharded = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=object()), device=torch.device("cpu"), num_processes=2)
    with pytest.raises(ValueError, match="a baseline head can't be trained beside sharded weights: .*tbpo_a"):
        make_baseline_head(model, 8, sharded)


def test_deepspeed_is_refused_in_a_sentence(make, monkeypatch):
    with pytest.raises(ValueError, match="DeepSpeed is not supported: .*FSDP2"): make(deepspeed="zero3.json")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is not supported: .*FSDP2"): make()


def test_weights_too_coarse_for_their_updates_are_told(make, model, caplog):
    with caplog.at_level(logging.WARNING, "tokpref.training"):
        make()
        assert not caplog.messages
        make(dict(model=copy.deepcopy(model).bfloat16()))
    assert ["trained weights are bfloat16, in which small updates are lost" in said for said in caplog.messages] == [
        True
    ]


def test_dropout_is_off_wherever_a_model_keeps_it():
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
            dropout=0.5,
            attention_dropout=0.5,
            layerdrop=0.5,
        )
    )
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.5, attention_dropout=0.5)
    )
    other = nn.ModuleList([nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.LSTM(2, 2, 2, dropout=0.5)])
    ids = torch.arange(12)[None]
    for model in (opt, bloom):
        disable_dropout(model.train())
        assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    disable_dropout(other)
    assert other[0].p == other[1].p == other[2].dropout == 0


# The reference

@pytest.mark.parametrize("cached", [False, True])
def test_precomputed_log_probs_have_the_precision_of_the_run(make, tmp_path, cached):
    cache = dict(ref_cache=str(tmp_path / "cache")) if cached else {}
    for bf16 in (False, True):
        trainer = make(dict(eval_dataset=PAIRS), loss="dpo", beta=1.0, bf16=bf16, precompute_ref_logps=True, **cache)
        assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    if cached: assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_precomputed_reference_is_the_one_that_was_given(make, model):
    given = dict(model=adapted(model), ref_model=shifted(model), eval_dataset=PAIRS)
    live, stored = (
        make({**given, "model": copy.deepcopy(given["model"])}, precompute_ref_logps=on).evaluate()
        for on in (False, True)
    )
    for name in ("eval_loss", "eval_rewards/chosen", "eval_rewards/rejected"):
        assert stored[name] == pytest.approx(live[name], abs=1e-5)
    assert "eval_kl/chosen" in live and "eval_kl/chosen" not in stored


def test_a_cache_tells_references_apart_that_differ_in_their_adapter(make, model, tmp_path):
    first, second = adapted(model), adapted(model)
    numbers = lambda ref_model, **cache: make(
        dict(ref_model=ref_model), precompute_ref_logps=True, **cache
    ).train_dataset["chosen_ref_logps"][0]
    cache = dict(ref_cache=str(tmp_path / "cache"))
    assert numbers(first, **cache) == numbers(first) != numbers(second) == numbers(second, **cache)
    assert numbers(None, **cache) == numbers(None) and len(list((tmp_path / "cache").iterdir())) == 3
    for policy in (adapted(model), adapted(model)):  # switched off they are one reference, which is scored once
        assert make(
            dict(model=policy), reference_without_adapter=True, precompute_ref_logps=True, **cache
        ).train_dataset["chosen_ref_logps"][0] == numbers(None)
    assert len(list((tmp_path / "cache").iterdir())) <= 4


def test_rows_without_the_numbers_of_a_reference_that_is_gone_are_refused(make, model):
    for policy in (model, adapted(model)):
        trainer = make(dict(model=policy, ref_model=shifted(model)), precompute_ref_logps=True)
        with pytest.raises(ValueError, match="precompute_ref_logps has let go of the reference: .*eval_dataset"):
            trainer.evaluate(PAIRS)
    base = dict(reference_without_adapter=True, precompute_ref_logps=True)
    assert make(dict(model=adapted(model)), **base).evaluate(PAIRS)["eval_kl/chosen"] > 0


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_an_adapter_that_was_trained_before_is_part_of_the_reference(make, model, caplog, loss):
    "As TRL: the loss starts at ln 2, every margin at 0. The copy shares the base's weights and does not train along."
    policy = adapted(model)
    with caplog.at_level(logging.WARNING, "tokpref.training"):
        trainer = make(dict(model=policy, eval_dataset=PAIRS), loss=loss, learning_rate=1e-2, max_steps=3)
    assert any("its adapter copied and frozen" in said for said in caplog.messages)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-6) and before["eval_kl/chosen"] < 1e-6
    start = {name: p.detach().clone() for name, p in trainer.ref_model.named_parameters()}
    for name, weight in policy.named_parameters():
        assert (weight is dict(trainer.ref_model.named_parameters())[name]) == ("lora" not in name), name
    trainer.train()
    assert trainer.evaluate()["eval_kl/chosen"] > 1e-6
    assert_close(dict(trainer.ref_model.named_parameters()), start, rtol=0, atol=0)


def test_the_base_of_an_adapter_is_a_reference_by_choice(make, model):
    policy = adapted(model)
    chosen = make(dict(model=copy.deepcopy(policy), eval_dataset=PAIRS), reference_without_adapter=True).evaluate()
    explicit = make(dict(model=copy.deepcopy(policy), ref_model=copy.deepcopy(model), eval_dataset=PAIRS)).evaluate()
    assert chosen["eval_loss"] == pytest.approx(explicit["eval_loss"], abs=1e-6) != pytest.approx(0.693147, abs=1e-6)
    for options in (dict(model=copy.deepcopy(policy), ref_model=model), dict(model=model)):
        with pytest.raises(ValueError, match="reference_without_adapter would be ignored"):
            make(options, reference_without_adapter=True)
    new = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    assert make(dict(model=get_peft_model(copy.deepcopy(model), new))).ref_model is None, "a new adapter costs nothing"


@pytest.mark.parametrize("settings", [dict(loss="simpo"), dict(loss="dpo", precompute_ref_logps=True)])
def test_entropy_is_measured_without_a_reference(make, settings):
    result = make(dict(eval_dataset=PAIRS), **settings).evaluate()
    assert result["eval_entropy"] > 0 and "eval_kl/chosen" not in result
    assert "eval_entropy" not in make(dict(eval_dataset=PAIRS), eval_kl=False, **settings).evaluate()


def test_a_reference_follows_the_policy(make, model):
    steady = dict(max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, beta=1.0)
    losses = lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    new = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    for policy in (model, get_peft_model(copy.deepcopy(model), new), adapted(model)):
        fixed = make(dict(model=copy.deepcopy(policy)), **steady)
        moved = make(dict(model=copy.deepcopy(policy)), sync_ref_model=True, ref_model_mixup_alpha=1.0,
                     ref_model_sync_steps=2, **steady)
        for trainer in (fixed, moved): trainer.train()
        assert losses(moved)[:2] == pytest.approx(losses(fixed)[:2], abs=1e-6)
        assert losses(moved)[2] == pytest.approx(0.693147, abs=1e-5) != pytest.approx(losses(fixed)[2], abs=1e-5)
        assert_close([*moved.ref_model.parameters()], [*moved.model.parameters()], rtol=0, atol=0)


def test_a_share_of_the_policy_is_mixed_in(model):
    reference, policy = shifted(model), shifted(model)
    wanted = [0.3 * ours + 0.7 * theirs for ours, theirs in
              zip(policy.parameters(), reference.parameters(), strict=True)]
    mix_into(reference, policy, 0.3)
    assert_close([*reference.parameters()], wanted)


@pytest.mark.parametrize("settings, said", [
    (dict(ref_model_sync_steps=4), "ref_model_sync_steps would be ignored: set sync_ref_model=True"),
    (dict(sync_ref_model=True, loss="simpo"), "sync_ref_model would be ignored: 'simpo' has no reference"),
    (dict(sync_ref_model=True, precompute_ref_logps=True), "sync_ref_model moves the reference"),
    (dict(sync_ref_model=True, ref_model_mixup_alpha=1.5), "ref_model_mixup_alpha must be in"),
    (dict(sync_ref_model=True, ref_model_sync_steps=0), "ref_model_sync_steps must be at least 1"),
])
def test_a_reference_that_cannot_follow_is_refused_by_the_settings(make, settings, said):
    with pytest.raises(ValueError, match=said): make(**settings)


def test_a_reference_that_cannot_follow_is_refused(make, model):
    sync = dict(sync_ref_model=True)
    with pytest.raises(ValueError, match="can't mix two adapters"): make(dict(model=adapted(model)), **sync)
    with pytest.raises(ValueError, match="needs a reference with the policy's own weights"):
        make(dict(model=adapted(model), ref_model=copy.deepcopy(model)), ref_model_mixup_alpha=1.0, **sync)
    with pytest.raises(ValueError, match="reference_without_adapter would be ignored: sync_ref_model"):
        make(dict(model=adapted(model)), reference_without_adapter=True, **sync)
    make(**sync, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="with sync_ref_model can't be resumed"):
        make(**sync, max_steps=2).train(resume_from_checkpoint=True)


# Data

def test_sequences_longer_than_the_model_are_refused(make, model, tokenizer, tmp_path):
    long = [*PAIRS, {"prompt": "say " * 40, "chosen": "yes", "rejected": "no"}]
    wrong = "row 6 has 16. tokens, but the model has 128 positions: set max_length to at most 128"
    with pytest.raises(ValueError, match=f"train: {wrong}"): make(dict(train_dataset=long))
    with pytest.raises(ValueError, match=f"eval/long: {wrong}"): make(dict(eval_dataset={"long": long}))
    with pytest.raises(ValueError, match=f"train: {wrong}"): make(dict(train_dataset=prepare(long, tokenizer)[0]))
    with pytest.raises(ValueError, match=wrong): make().evaluate(long)
    make(dict(train_dataset=long, eval_dataset=long), max_length=128).train()


def test_rows_that_are_lost_or_cut_are_told(make, caplog):
    bad = [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": ""}]
    with caplog.at_level(logging.WARNING, "tokpref.training"): make(dict(train_dataset=bad), max_length=12)
    said = " ".join(caplog.messages)
    assert "train: 2 of 8 pairs dropped" in said and "cut" in said and "trainer.reports['train']" in said
    for more, expected in (({}, []), ({"id": 1, "score": 3.0}, ["train: columns that are not read: score"])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tokpref.training"):
            make(dict(train_dataset=[pair | more for pair in PAIRS]))
        assert caplog.messages == expected


def test_pairs_of_like_length_can_share_a_batch(make):
    "Less padding than in batches put together by chance; a row counts its prompt and its longer response."
    rows = [{"prompt": "say ", "chosen": "y" * n, "rejected": "no"} for n in range(1, 41)]
    padding = {}
    for strategy in ("random", "group_by_length"):
        trainer = make(dict(train_dataset=rows, eval_dataset=rows[:8]), train_sampling_strategy=strategy,
                       per_device_train_batch_size=4, per_device_eval_batch_size=4)
        batches = [batch["attention_mask"][:4] for batch in trainer.get_train_dataloader()]
        padding[strategy] = sum(int((mask == 0).sum()) for mask in batches)
    assert trainer.train_dataset["length"][:] == [len("say ") + max(n, 2) + 1 for n in range(1, 41)]
    assert padding["group_by_length"] < 0.8 * padding["random"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_datasets_are_taken_in_every_form(make, model, tokenizer):
    rows = prepare(PAIRS, tokenizer)[0]
    trainer = make(dict(train_dataset=list(rows), eval_dataset=PAIRS))
    expected = trainer.evaluate()["eval_loss"]
    for data in (PAIRS, Dataset.from_list(PAIRS), rows, list(rows)):
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected)
        assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected)
    assert trainer.evaluate(DatasetDict(a=rows))["eval_a_loss"] == pytest.approx(expected)
    make(dict(train_dataset=list(rows)), precompute_ref_logps=True).train()
    with pytest.raises(TypeError, match=r"train_dataset holds several datasets \(train, test\): choose one"):
        make(dict(train_dataset=DatasetDict(train=rows, test=rows)))


def test_arguments_of_the_chat_template_reach_it(make, tokenizer):
    talk = lambda text, role="assistant": [{"role": role, "content": text}]
    rows = [
        {"prompt": talk(p["prompt"], "user"), "chosen": talk(p["chosen"]), "rejected": talk(p["rejected"])}
        for p in PAIRS
    ]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ header }}{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ header }}{% endif %}"
    )
    for given in ({"header": "so: "}, '{"header": "so: "}'):
        trainer = make(dict(train_dataset=rows, processing_class=tokenizer), chat_template_kwargs=given)
        assert tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]).replace(" ", "") == "sayyesso:"
    with pytest.raises(ValueError, match="chat_template_kwargs .* JSON"): make(chat_template_kwargs="enable_thinking")


# What is logged

def test_a_log_says_where_the_loss_pulls(make):
    for loss, beta, tokens in (("dpo", 0.5, 1.0), ("hinge", 0.5, 1.0), ("tbpo_a", 0.5, None)):
        trainer = make(loss=loss, beta=beta, max_steps=2, logging_steps=2)
        trainer.train()
        entry, = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert entry["entropy"] > 0
        if tokens is None: assert 0 < entry["learning/tokens"] < 1       # past the shorter response nothing pulls
        else: assert entry["learning/tokens"] == tokens
        if loss == "hinge": assert entry["learning/pull"] == pytest.approx(beta)
        if loss == "dpo": assert 0 < entry["learning/pull"] <= beta / 2 + 1e-6
    trainer = make(learning_signal=False, logging_steps=1)
    trainer.train()
    assert not {"entropy", "learning/pull"} & set(trainer.state.log_history[0])


def test_the_learning_signal_changes_no_weight(make):
    runs = []
    for on in (True, False):
        trainer = make(learning_signal=on, loss="tdpo2", logging_steps=1, max_steps=2)
        trainer.train()
        runs.append([*trainer.model.parameters()])
    assert_close(*runs, rtol=0, atol=0)


def _surprising(chosen, rejected, beta=0.1):
    result = LOSSES["dpo"](chosen, rejected, beta=beta)
    surety = (-chosen.per_token(chosen.need("entropy")).sum(-1) / chosen.lengths).exp()
    far = chosen.per_token(chosen.need("reverse_kl")).sum(-1)
    return PairLoss(surety * result.losses + far, result.chosen_rewards, result.rejected_rewards, {"surety": surety})


@pytest.mark.parametrize("one_pass", [True, False])
def test_training_and_evaluation_give_a_loss_the_same(make, model, monkeypatch, one_pass):
    monkeypatch.setitem(LOSSES, "mine", LossSpec(_surprising, source="here", entropy=True, reverse_kl=True))
    trainer = make(dict(ref_model=shifted(model), eval_dataset=PAIRS), loss="mine", logging_steps=1, one_pass=one_pass,
                   learning_signal=False, eval_kl=False, per_device_train_batch_size=len(PAIRS))
    before = trainer.evaluate()
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name in ("loss", "surety", "rewards/margins"):
        assert first[name] == pytest.approx(before[f"eval_{name}"], rel=1e-5)


def test_a_sum_of_losses_is_trained_and_logged(make, model):
    given = dict(ref_model=shifted(model), eval_dataset=PAIRS)
    parts = {loss: make(given, loss=loss).evaluate()["eval_loss"] for loss in ("dpo", "sft")}
    trainer = make(given, loss="dpo+0.1*sft", beta=0.1, logging_steps=1)
    result = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(parts["dpo"] + 0.1 * parts["sft"], rel=1e-5)
    assert result["eval_loss/sft"] == pytest.approx(parts["sft"], rel=1e-5)
    trainer.train()
    assert any({"loss/dpo", "loss/sft"} <= set(entry) for entry in trainer.state.log_history)
    assert trainer.engine == {"one_pass": True, "shared_prompt": True}
    assert "dpo+0.1*sft" in model_card(trainer)


# Arguments

@pytest.mark.parametrize("settings, said", [
    (dict(label_smoothing_factor=0.1), "label_smoothing_factor would be ignored: .*loss_options"),
    (dict(baseline_width=8), "baseline_width would be ignored: 'dpo' has no baseline"),
    (dict(baseline_learning_rate=0.1), "baseline_learning_rate would be ignored: 'dpo' has no baseline"),
    (dict(beta=0.1, loss_options={"beta": 0.2}), "beta is given twice"),
    (dict(remove_unused_columns=True), "remove_unused_columns=True would remove .*leave it out"),
    (dict(loss_options="window=4"), "loss_options .* JSON"),
    (dict(loss_options=[1]), "loss_options"),
    (dict(chunk_size=8, workspace=1000), "workspace=1000 would be ignored: chunk_size=8 decides"),
    (dict(chunk_size=0), "chunk_size=0 has no room"),
    (dict(eval_accumulation_steps=2), "eval_accumulation_steps would be ignored: evaluation keeps no predictions"),
    (dict(label_names=["labels"]), "label_names would be ignored: evaluation keeps no predictions"),
    (dict(include_for_metrics=["loss"]), "include_for_metrics would be ignored: evaluation keeps no predictions"),
])
def test_a_setting_without_effect_is_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said): PreferenceConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("settings, said", [
    (dict(learning_rate="fast"), "learning_rate must be a number, got 'fast'"),
    (dict(max_length=None), "max_length must be a whole number, got None"),
    (dict(max_length=0), "max_length must be from 1 to 2147483647, got 0"),
    (dict(max_steps=2.5), "max_steps must be a whole number, got 2.5"),
    (dict(max_steps=True), "max_steps must be a whole number, got True"),
    (dict(bf16="maybe"), "bf16 must be true or false, got 'maybe'"),
    (dict(token_budget="all"), "token_budget must be a whole number or None, got 'all'"),
    (dict(loss=3), "loss must be text, got 3"),
    (dict(beta=[0.1]), "beta must be a number or None"),
    (dict(rpo_alpha=1.0), "rpo_alpha is a setting of TRL's that is not here: .*loss='dpo.1.0.sft'"),
    (dict(report_to="neptune"), "report_to: neptune is not installed here"),
])
def test_a_setting_of_the_wrong_kind_is_named(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said): PreferenceConfig(output_dir=str(tmp_path), **settings)


def test_numbers_are_taken_as_they_are_written(tmp_path):
    config = PreferenceConfig(output_dir=tmp_path, ref_cache=tmp_path, precompute_ref_logps=True)
    assert config.output_dir == config.ref_cache == str(tmp_path)
    config = PreferenceConfig(output_dir=str(tmp_path), max_steps=1e3, learning_rate="3e-4", beta=1, token_budget="64")
    assert [type(value) for value in (config.max_steps, config.learning_rate, config.token_budget)] == [int, float, int]
    assert (config.max_steps, config.learning_rate, config.beta, config.token_budget) == (1000, 3e-4, 1, 64)
    assert PreferenceConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("theirs, ours", [
    (dict(loss_type="sigmoid"), dict(loss="dpo")),
    (dict(loss_type=["robust"], label_smoothing=0.2), dict(loss="robust", loss_options={"flip_rate": 0.2})),
    (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]), dict(loss="dpo+0.2*sft")),
    (dict(loss_type=["ipo", "sft"]), dict(loss="ipo+sft", loss_options={"ipo.average": True})),
    (dict(loss_type="sigmoid_norm", beta=2.0), dict(loss="dpo_norm", beta=2.0)),
    (dict(loss={"dpo": 1, "sft": 0.1}), dict(loss="dpo+0.1*sft")),
    (dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
     dict(loss_options={"f_divergence": "alpha", "alpha": 0.3})),
    (dict(trust_remote_code=True), dict(model_init_kwargs={"trust_remote_code": True})),
    (dict(loss_type="ipo", beta=0.3), dict(loss="ipo", beta=0.3, loss_options={"average": True})),
    (dict(precompute_ref_log_probs=True), dict(precompute_ref_logps=True)),
])
def test_names_of_trl_are_taken_where_they_mean_the_same(tmp_path, theirs, ours):
    named, plain = (PreferenceConfig(output_dir=str(tmp_path), **settings) for settings in (theirs, ours))
    for name in ("loss", "options", "precompute_ref_logps", "model_init_kwargs"):
        assert getattr(named, name) == getattr(plain, name)


@pytest.mark.parametrize("settings, said", [
    (dict(loss_type="sigmoid", loss="dpo"), "loss_type and loss='dpo' set the same thing: leave one out"),
    (dict(precompute_ref_log_probs=True, precompute_ref_logps=False), "precompute_ref_log_probs and .* leave one out"),
    (dict(loss_type="robust", label_smoothing=0.1, loss_options={"flip_rate": 0.1}), "leave one out"),
    (dict(label_smoothing=0.1), "label_smoothing is ambiguous: .*'flip_rate': 0.1.*conservative DPO"),
    (dict(loss_type="sigmoid", label_smoothing=0.1), "label_smoothing is ambiguous"),
    (dict(loss_weights=[1.0]), "loss_weights would be ignored"),
    (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "loss_weights=.1.0. must be a list with a weight for"),
    (dict(loss_type=["sigmoid", "sigmoid"]), "loss_type has 'sigmoid' twice"),
    (dict(loss_type="hinge", f_divergence_type="js_divergence"), "option 'f_divergence' is not used by this loss"),
    (dict(f_alpha_divergence_coef=0.3), "f_alpha_divergence_coef would be ignored"),
    (dict(loss={"dpo": 0.0}), "the weight of 'dpo' must be a positive number"),
    (dict(loss_type="ipo", loss_options={"average": False}), "loss_type='ipo' and average=False set the same thing"),
    (dict(loss_type="exo_pair"), "'exo_pair' is a loss of TRL's that is not here; .* sigmoid, hinge, .*dpo"),
    (dict(loss_type=["sigmoid", "aot"]), "is a loss of TRL's that is not here"),
    (dict(loss_type="tdpo2"), "is no name of TRL's: say loss='tdpo2'"),
    (dict(loss_type="ipo", label_smoothing=0.1), "label_smoothing"),
])
def test_names_of_trl_that_mean_something_else_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said): PreferenceConfig(output_dir=str(tmp_path), **settings)


# The fields of DPOConfig in TRL 1.16 that are not those of TrainingArguments or its own base
DPO_CONFIG = """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length
    truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
    loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
    activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token
""".split()
DPO_LOSSES = """
    sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft
    sigmoid_norm
""".split()


def test_the_table_of_trl_names_every_setting_once(tmp_path):
    assert sorted([*trl.TRL_SAME, *trl.TRL_RENAMED, *trl.TRL_MISSING]) == sorted(DPO_CONFIG)
    assert sorted([*trl.TRL_LOSSES, *trl.TRL_LOSSES_MISSING]) == sorted(DPO_LOSSES)
    ours = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert set(trl.TRL_SAME) <= ours and not {*trl.TRL_RENAMED, *trl.TRL_MISSING, *trl.TRL_OLDER} & ours
    for name in (*trl.TRL_MISSING, *trl.TRL_OLDER):
        with pytest.raises(ValueError, match=f"{name} is a setting of TRL's that is not here"):
            PreferenceConfig(output_dir=str(tmp_path), **{name: 1})
        for nothing in (None, False): PreferenceConfig(output_dir=str(tmp_path), **{name: nothing})
    for name, (loss, options) in trl.TRL_LOSSES.items():
        config = PreferenceConfig(output_dir=str(tmp_path), loss_type=name)
        assert (config.loss, config.options) == (loss, options)


@pytest.mark.parametrize("name, hint", [
    ("learning_rte", "learning_rate"), ("evaluation_strategy", "eval_strategy"), ("lossoptions", "loss_options"),
    ("label_smoothing_facto", None), ("deepspead", None), ("label_nams", None)])
def test_a_name_of_no_setting_gets_the_nearest_that_is_one(tmp_path, name, hint):
    with pytest.raises(ValueError, match=f"unknown setting '{name}'") as error:
        PreferenceConfig(output_dir=str(tmp_path), **{name: 1})
    found = re.findall(r"did you mean '(\w+)'", str(error.value))
    if hint: assert found == [hint]
    for other in found: assert other not in ("label_smoothing_factor", "deepspeed", "label_names")


def test_arguments_that_are_settings_are_told_where_they_belong(make, tokenizer):
    for name, instead in (("tokenizer", "processing_class=tokenizer"), ("beta", r"PreferenceConfig\(..., beta="),
                          ("quantization_config", "model_init_kwargs={'quantization_config'")):
        with pytest.raises(TypeError, match=f"the trainer takes no argument '{name}': say .*{instead}"):
            make({name: tokenizer})


def test_log_probs_that_trl_precomputed_are_refused(make):
    sums = [pair | {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for pair in PAIRS]
    said = "train: ref_chosen_logps and ref_rejected_logps hold one number a response, .*token by token: remove"
    for data in (sums, Dataset.from_list(sums)):
        with pytest.raises(ValueError, match=said): make(dict(train_dataset=data))


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_a_function_that_would_never_be_called_is_refused(make, name):
    with pytest.raises(ValueError, match=f"{name} would never be called"): make({name: lambda *_: {}})


def test_arguments_of_another_kind_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="args must be a PreferenceConfig, got TrainingArguments"):
        PreferenceTrainer(model, TrainingArguments(output_dir=str(tmp_path)), PAIRS, processing_class=tokenizer)


def test_one_process_with_two_gpus_is_refused(make, monkeypatch):
    monkeypatch.setattr(PreferenceConfig, "n_gpu", 2)
    with pytest.raises(
        ValueError,
        match="one process sees 2 GPUs: start with torchrun --nproc-per-node 2, or set CUDA_VISIBLE_DEVICES=0",
    ):
        make()


def _centred(chosen, rejected, beta=0.1):
    margin = chosen.log_ratio.sum(-1) - rejected.log_ratio.sum(-1)
    return PairLoss(-beta * (margin - margin.mean()).square(), margin.detach(), -margin.detach())


def test_a_token_budget_is_refused_only_where_it_changes_the_loss(make, monkeypatch, model):
    monkeypatch.setitem(LOSSES, "centred", LossSpec(_centred, source="here"))
    with pytest.raises(
        ValueError, match="token_budget would change the loss: 'centred' of a pair depends on the other pairs"
    ):
        make(loss="centred", one_pass=False, token_budget=64)
    for name in LOSSES:
        if name != "centred": make(loss=name, loss_options={"window": 2} if name == "adpo" else None, token_budget=64)
    head = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    untied = type(model)(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False}))
    make(dict(model=untied, peft_config=head), token_budget=32).train()


# Gradients

@pytest.mark.parametrize(
    "more", [{}, dict(token_budget=24), dict(per_device_train_batch_size=1, gradient_accumulation_steps=3)]
)
def test_every_pair_of_a_step_weighs_the_same(make, more):
    "Three pairs as 2 + 1 give the gradients of three pairs in one batch, and the same loss in the log."
    def step(**settings):
        trainer = make(
            dict(train_dataset=PAIRS[:3]),
            optim="sgd",
            learning_rate=1e-3,
            max_grad_norm=0.0,
            warmup_steps=0,
            lr_scheduler_type="constant",
            max_steps=2,
            logging_steps=1,
            loss="ipo",
            **settings,
        )
        before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        trainer.train()
        after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return after - before, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected, losses = step(per_device_train_batch_size=3)
    change, logged = step(**{**dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), **more})
    assert_close(change, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert logged == pytest.approx(losses, rel=1e-4)


# What is random

@pytest.mark.parametrize(
    "settings, with_adapter", [(dict(loss="dpo"), True), (dict(loss="tbpo_q"), False), (dict(loss="tbpo_q"), True)]
)
def test_all_that_is_random_follows_the_seed(make, settings, with_adapter):
    adapter = (
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM") if with_adapter else None
    )
    runs = []
    for i, seed in enumerate((7, 7, 8)):
        torch.manual_seed(i)        # whatever was drawn before
        trainer = make(dict(peft_config=adapter), seed=seed, max_steps=2, per_device_train_batch_size=2, **settings)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        parts = [
            *start.values(),
            *trainer.model.parameters(),
            *(trainer.baseline_head.parameters() if trainer.baseline_head else ()),
        ]
        runs.append(torch.cat([p.detach().flatten() for p in parts]))
    assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert (runs[0] != runs[2]).any()


# After training

def test_the_examples_of_metrics_are_right():
    result = doctest.testmod(metrics)
    assert result.attempted >= 8 and result.failed == 0


def test_the_card_goes_to_the_hub(make, monkeypatch):
    sent = []
    def upload(*_, folder_path, **__):
        sent.append((Path(folder_path) / "README.md").read_text())
        return SimpleNamespace(result=lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)     # of older versions
    trainer = make()
    trainer.hub_model_id = "me/mine"
    trainer.train()
    trainer.push_to_hub(license="mit", tags="brief", dataset="me/pairs")
    for line in ("# Trained with dpo on preferences", "license: mit", "datasets: me/pairs",
                 "tags: [tokpref, preference-optimization, dpo, brief]"): assert line in sent[0].splitlines(), sent[0]
    assert "unknown dataset" not in sent[0]
    with pytest.raises(ValueError, match="dataset_args would be ignored"): trainer.push_to_hub(dataset_args="x")


def test_the_card_names_no_folder(make, model):
    for name, shown in (("/gone/by/now", ""), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"), ("gpt2", "gpt2"), ("", "")):
        model.config._name_or_path = name
        assert hub_name(model) == shown
        assert ("base_model" in model_card(make(dict(model=model)))) == bool(shown)


def test_the_card_says_how_far_training_went(make):
    trainer = make(max_steps=3, num_train_epochs=7.0, per_device_train_batch_size=2)
    trainer.train()
    card = model_card(trainer)
    assert "| steps | 3 |" in card and "| epochs | 1 |" in card


def test_the_card_has_the_options_in_force(make, monkeypatch):
    card = model_card(make(loss="dpo+simpo", beta=0.3, loss_options={"simpo.beta": 2.5}))
    assert "| dpo.beta | 0.3 |" in card and "| simpo.beta | 2.5 |" in card and "| beta |" not in card
    def plain(chosen, rejected): return LOSSES["sft"](chosen, rejected)
    monkeypatch.setitem(LOSSES, "plain", LossSpec(plain, source="here"))       # options are beta, if nothing is said
    assert "| beta |" not in model_card(make(loss="plain"))


def test_compiled_layers_train_as_before_with_all_fast_ways(make):
    plain, compiled = make(max_steps=3), make(max_steps=3, torch_compile=True, torch_compile_backend="eager")
    for trainer in (plain, compiled): trainer.train()
    assert compiled.engine == {"one_pass": True, "shared_prompt": True}
    assert type(compiled.model_wrapped).__name__ != "OptimizedModule", "the whole model is not compiled once more"
    assert all(layer._compiled_call_impl is not None for layer in layers_of(compiled.model))
    for ours, theirs in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_broken_run_names_a_checkpoint_from_before_it_broke(make, tmp_path):
    step = dict(learning_rate=1e30, max_grad_norm=0.0, max_steps=3)
    with pytest.raises(FloatingPointError, match="no checkpoint has been saved yet"): make(**step).train()
    with pytest.raises(FloatingPointError, match="no checkpoint is older than the last update: start again"):
        make(save_strategy="steps", save_steps=1, **step).train()
    (tmp_path / "out" / "checkpoint-best").mkdir()
    trainer = make()
    for now, said in ((1, "no checkpoint is older"), (2, "go on from checkpoint-1$"), (9, "go on from checkpoint-1$")):
        assert re.search(said, not_finite(now, [0], trainer.args.output_dir, 1e-3))
    trainer.unseen.append((torch.tensor([1.0, float("inf"), 2.0, float("nan")]), torch.tensor([7, 9, 4, 0])))
    with pytest.raises(FloatingPointError, match=r"dataset rows \[9, 0\]"): trainer.check_finite()


def test_gradients_of_a_baseline_head_do_not_add_up_over_steps():
    "Those of transformers zero the policy's only. Here every step's gradient is 1 in each weight."
    head, policy = BaselineHead(3, 0), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    add_to_optimizer(optimizer, head, 0.5)
    before = head.layers.weight.detach().clone()
    for _ in range(3):
        head.layers(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert_close(head.layers.weight.detach(), before - 3 * 0.5)


@pytest.mark.parametrize("width", [0, 8])
def test_a_saved_baseline_head_is_read_back(make, tmp_path, width):
    trainer = make(loss="tbpo_q", baseline_width=width, max_steps=2, baseline_learning_rate=0.1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert_close(load_baseline_head(tmp_path / "saved").state_dict(), trainer.baseline_head.state_dict())
    with pytest.raises(FileNotFoundError, match="baseline_head.safetensors"): load_baseline_head(tmp_path)
    other = make(loss="tbpo_q", baseline_width=width)
    other._load_from_checkpoint(str(tmp_path / "saved"))        # as a run that goes on does
    assert_close(other.baseline_head.state_dict(), trainer.baseline_head.state_dict())


def test_each_row_of_what_others_ran_into_is_a_test():
    here = Path(__file__).parent
    page = (here.parent / "nbs/library/training/03_trainer.ipynb").read_text(encoding="utf-8")
    names = set(re.findall(r"`(test_\w+)`", page))
    there = set(re.findall(r"def (test_\w+)\(", "".join(p.read_text(encoding="utf-8") for p in here.glob("test_*.py"))))
    assert len(names) >= 18 and names <= there
