"""A catalogue of malformed settings and data: each is refused in one sentence that says what, where and how to mend it.

Nothing here may load a model's weights: whatever is wrong is found before. The last test prints the table of counts.
"""
import collections
import datetime
import gzip
import json
import logging
import math
import os
import re
import shutil

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

from tokpref import LOSSES, cli
from tokpref.data import PreferenceCollator, load_preferences, prepare
from tokpref.engine.one_pass import pair_loss
from tokpref.engine.stats import token_stats
from tokpref.experiments import judges
from tokpref.experiments.compare import RunConfig, compare
from tokpref.experiments.compare import run as comparison
from tokpref.experiments.compare.profiles import read_profiles
from tokpref.losses.batches import random_stats
from tokpref.losses.types import TokenStats
from tokpref.training import PreferenceConfig, PreferenceTrainer

NAN, INF = math.nan, math.inf
HUGE = 10**400
PAIRS = [{"prompt": f"{i} say ", "chosen": "yes", "rejected": "no"} for i in range(4)]
MEND = re.compile(
    r" must |: [\w']|; did you mean|\(known|give |leave |use |pass |set |takes |needs |no file|is not |only |holds "
    r"|can't |are ")
refused: collections.Counter = collections.Counter()


AUTO = transformers.AutoModelForCausalLM.from_pretrained


class Loaded(BaseException):
    "Something asked for a model's weights; no `except Exception` may hide it."


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with the configuration and the tokenizer of a model, without weights, and with four good pairs."
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("home")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?'-:0"
    vocab = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {letter: i for i, letter in enumerate(letters[:61], start=3)}
    bare = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    whole.save_pretrained(folder / "m")
    transformers.GPT2Config(vocab_size=64, bos_token_id=None, eos_token_id=1).save_pretrained(folder / "m")
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return folder


@pytest.fixture(autouse=True)
def nothing_is_loaded(home, monkeypatch):
    "Weights are never loaded, no comparison begins, and relative paths start in a folder of these tests."
    def load(*args, **kwargs): raise Loaded
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(comparison, "_all_seeds", load)
    monkeypatch.chdir(home)
    logging.getLogger("datasets").setLevel(logging.ERROR)


def sentence(kind, call):
    "What `call` is refused with: one line, not too long, with a mend. Counted under `kind`."
    try: call()
    except (ValueError, TypeError, OSError, KeyError) as error: said = str(error)
    except Loaded: pytest.fail("accepted: it went on to load a model")
    else: pytest.fail("accepted")
    assert "\n" not in said.strip(), f"several lines: {said}"
    assert 10 < len(said) < 900 and "Traceback" not in said, said
    assert MEND.search(said), f"no mend: {said}"
    refused[kind] += 1
    return said


def names(cases):
    "Short names of cases for a report of pytest, the same in every process."
    plain = [re.sub(r" at 0x[0-9a-f]+", "", str(case)) for case in cases]
    return [case[:60].encode("ascii", "replace").decode() for case in plain]


# The settings of a run: those of transformers first, then those of the package

SETTINGS = [
    dict(seed=-1), dict(seed=2**40), dict(seed="x"), dict(seed=1.5), dict(data_seed=-1), dict(dataset_num_proc=0),
    dict(dataset_num_proc=-2), dict(per_device_train_batch_size=0), dict(per_device_train_batch_size=-3),
    dict(per_device_eval_batch_size=0), dict(weight_decay=NAN), dict(weight_decay=-1.0), dict(weight_decay=INF),
    dict(learning_rate=NAN), dict(learning_rate=-1e-4), dict(learning_rate=INF), dict(learning_rate=b"1"),
    dict(learning_rate=1e300), dict(weight_decay=1e300), dict(adam_epsilon=1e39), dict(max_grad_norm=1e300),
    dict(num_train_epochs=1e300), dict(logging_steps=1e300), dict(max_length=10**20), dict(beta=1e300),
    dict(beta=1e-300), dict(loss="tdpo2", loss_options={"alpha": 1e300}),
    dict(loss="simpo", loss_options={"gamma": 1e39}), dict(loss="tbpo_q", baseline_learning_rate=1e300),
    dict(num_train_epochs=NAN), dict(num_train_epochs=-1), dict(num_train_epochs=0), dict(num_train_epochs=INF),
    dict(max_steps=-5), dict(max_steps=0), dict(max_steps=HUGE), dict(gradient_accumulation_steps=0),
    dict(gradient_accumulation_steps=-1), dict(adam_beta1=1.5), dict(adam_beta1=-0.1), dict(adam_beta2=NAN),
    dict(adam_beta2=1.0), dict(adam_epsilon=-1e-8), dict(adam_epsilon=NAN), dict(max_grad_norm=-1),
    dict(max_grad_norm=NAN), dict(warmup_steps=-1), dict(warmup_steps=NAN), dict(logging_steps=0),
    dict(logging_steps=-1), dict(logging_steps=NAN), dict(logging_steps=2.5), dict(save_steps=0), dict(save_steps=NAN),
    dict(eval_steps=0, eval_strategy="steps"), dict(eval_steps=NAN, eval_strategy="steps"), dict(eval_steps=5),
    dict(save_total_limit=0), dict(save_total_limit=-1), dict(eval_delay=-1), dict(eval_delay=NAN),
    dict(lr_scheduler_type="wavy"), dict(lr_scheduler_type=3), dict(lr_scheduler_kwargs="{"),
    dict(lr_scheduler_kwargs=[1]), dict(lr_scheduler_kwargs={3: 1}), dict(optim="adamm"), dict(optim=None),
    dict(optim_args="x"), dict(optim_target_modules=3), dict(eval_strategy="sometimes"), dict(save_strategy="often"),
    dict(logging_strategy=7), dict(hub_strategy="x"), dict(dataloader_num_workers=-1),
    dict(dataloader_prefetch_factor=2), dict(dataloader_prefetch_factor=0, dataloader_num_workers=1),
    dict(dataloader_multiprocessing_context="thread"), dict(train_sampling_strategy="alphabetic"),
    dict(log_level="loud"), dict(neftune_noise_alpha=NAN), dict(neftune_noise_alpha=-1.0),
    dict(torch_empty_cache_steps=0), dict(bf16=1), dict(fp16="yes"), dict(bf16=True, fp16=True), dict(output_dir=""),
    dict(output_dir=3), dict(output_dir=b"x"), dict(output_dir="a\0b"), dict(output_dir="/dev/null/x"),
    dict(output_dir="good.jsonl"), dict(run_name=3), dict(run_name="a\0b"), dict(accelerator_config="none.json"),
    dict(accelerator_config="good.jsonl"), dict(accelerator_config={"nope": 1}), dict(accelerator_config=[1]),
    dict(fsdp="sometimes"), dict(fsdp_config="none.json"), dict(deepspeed="x.json"), dict(debug="all"),
    dict(gradient_checkpointing_kwargs="{"), dict(gradient_checkpointing_kwargs=[1]), dict(report_to=["wandb", 3]),
    dict(report_to="nowhere"), dict(report_to=3), dict(metric_for_best_model=3), dict(load_best_model_at_end=True),
    dict(hub_model_id="../x"), dict(ddp_backend="pigeon"), dict(ddp_timeout=-1), dict(ddp_timeout=0),
    dict(ddp_bucket_cap_mb=-1), dict(resume_from_checkpoint=3), dict(resume_from_checkpoint="none"),
    dict(parallelism_config={"tp_size": 2}), dict(hub_token=3), dict(include_num_input_tokens_seen="perhaps"),
    dict(output_dir="a\ud800"), dict(run_name="\udfff"), dict(hub_model_id="a\ud800"), dict(warmup_steps=10**30),
    dict(dataset_num_proc=10**9), dict(dataloader_num_workers=10**6),
    *[dict(lr_scheduler_type="cosine", lr_scheduler_kwargs=more) for more in (
        {"num_cycles": "x"}, {"num_cycles": NAN}, {"cycles": 2}, {"num_cycles": None}, '{"nope": 1}')],
    dict(lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": "x"}), dict(lr_scheduler_kwargs={"lr_end": 1}),
    dict(learnin_rate=1), dict(warmup_ratio="x"), dict(label_smoothing_factor=0.1), dict(remove_unused_columns=True),
    # what is particular to preferences
    dict(loss=""), dict(loss=None), dict(loss=3), dict(loss=b"dpo"), dict(loss=["dpo"]), dict(loss="dpoo"),
    dict(loss="dpo+"), dict(loss="dpo+dpo"), dict(loss="0*dpo"), dict(loss="-1*dpo"), dict(loss="nan*dpo"),
    dict(loss="1e999*dpo"), dict(loss="dpo*0.5"), dict(loss={"dpo": NAN}), dict(loss={}), dict(loss={"dpo": "x"}),
    dict(loss={3: 1.0}), dict(loss="dpo+0.1*nope"), dict(loss="adpo"), dict(loss="../dpo"), dict(loss="d" * 5000),
    *[dict(beta=beta) for beta in (0, -1, NAN, INF, -INF, "x", "", b"0.1", True, False, [], [0.1], {}, {"a": 1}, 1j,
                                   "nan", "inf", "-1", "1e999", HUGE, object())],
    *[dict(loss_options=options) for options in (
        {"bta": 1}, {"label_smoothing": NAN}, {"label_smoothing": 0.7}, {"label_smoothing": None},
        {"label_smoothing": "x"}, {"f_divergence": 3}, {"f_divergence": []}, {"f_divergence": "alpha", "alpha": NAN},
        {"f_divergence": "alpha", "alpha": True}, {3: 1}, '{"label_smoothing": NaN}', "[1]", "{", b"{}",
        '{"label_smoothing": 0.1, "label_smoothing": 0.2}', {"beta": NAN}, {"beta": True}, {"beta": None})],
    dict(beta=0.1, loss_options={"beta": 0.1}),
    *[dict(loss="adpo", loss_options=options) for options in (
        {"window": 0}, {"window": 1.5}, {"window": True}, {"window": 2, "segments": 2}, {"window": "4"},
        {"window": NAN}, {"window": 10**30}, {"segments": 10**30})],
    dict(loss="tdpo2", loss_options={"alpha": -1}), dict(loss="tdpo2", loss_options={"alpha": True}),
    dict(loss="tdpo2", loss_options={"version": 1}), dict(loss="bpo", loss_options={"generator": "x"}),
    dict(loss="bpo", loss_options={"lam": -1}), dict(loss="bpo", loss_options={"lam": NAN}),
    dict(loss="bpo", loss_options={"lam": True}), dict(loss="bpo", loss_options={"scale": 0}),
    dict(loss="bpo", loss_options={"generator": "kliep", "lam": 2}), dict(loss="tbpo_q", baseline_width=-1),
    dict(loss="tbpo_q", loss_options={"baseline_clip": 0}), dict(loss="tbpo_q", loss_options={"baseline_clip": NAN}),
    dict(loss="tbpo_a", loss_options={"baseline_clip": 3}), dict(loss="simpo", loss_options={"gamma": -1}),
    dict(loss="simpo", loss_options={"gamma": None}), dict(loss="ipo", loss_options={"average": "no"}),
    dict(loss="ipo", loss_options={"average": NAN}), dict(loss="robust", loss_options={"flip_rate": 0.5}),
    dict(loss="dpop", loss_options={"penalty": INF}), dict(loss="cpo", loss_options={"alpha": -1}),
    dict(loss="sft", beta=0.1), dict(loss="tbpo_q", baseline_learning_rate=NAN),
    dict(loss="tbpo_q", baseline_learning_rate=-1.0), dict(max_length=0), dict(max_length=-1), dict(max_length=3),
    dict(max_length=10**30), dict(max_length=NAN), dict(max_length=1.5), dict(max_length=True), dict(max_length=None),
    dict(max_prompt_length=0), dict(max_prompt_length=-1), dict(max_prompt_length=1023), dict(max_prompt_length=NAN),
    dict(chat_template_kwargs="x"), dict(chat_template_kwargs=[1]), dict(chat_template_kwargs={3: 1}),
    dict(model_init_kwargs="x"), dict(model_init_kwargs={"dtype": "float33"}), dict(model_init_kwargs={"dtype": 3}),
    dict(model_init_kwargs={"trust_remote_code": "false"}), dict(model_init_kwargs={"load_in_4bit": 1}),
    dict(model_init_kwargs={"load_in_4bit": True, "load_in_8bit": True}), dict(chunk_size=0), dict(chunk_size=NAN),
    dict(token_budget=-1), dict(workspace=0), dict(ref_cache=""), dict(ref_cache="x"),
    dict(precompute_ref_logps=True, ref_cache="/dev/null/x"), dict(precompute_ref_logps="x"),
    dict(sync_ref_model=True, ref_model_mixup_alpha=0), dict(sync_ref_model=True, ref_model_mixup_alpha=NAN),
    dict(sync_ref_model=True, ref_model_sync_steps=0), dict(shared_prompt=None), dict(one_pass=2),
    dict(disable_dropout=None), dict(loss_type="nope"), dict(loss_weights=[1.0]), dict(rpo_alpha=1.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=names(SETTINGS))
def test_settings(settings):
    plain = dict(output_dir="out", use_cpu=True, report_to="none")
    said = sentence("settings of a run", lambda: PreferenceConfig(**{**plain, **settings}))
    assert len(said) < 500 or "known" in said


# The command line, in this process

TRAIN = ["train", "--model", "m", "--data", "good.jsonl"]
EVALUATE = ["evaluate", "--model", "m", "--ref", "m", "--data", "good.jsonl"]
SET_OF_TRAIN = [
    "a", "=1", "", "=", "a={", "nope=1", "a=b=c", "seed=-1", "beta=x", "beta=.nan", "beta=-.inf", "weight_decay=.nan",
    "loss_options={window: }", "loss_options=[1]", "loss_options={label_smoothing: 0.1, label_smoothing: 0.2}",
    "max_steps=!!python/object/apply:os.system ['true']", "max_steps=&a [*a]", "learning_rate=1e999",
    "learning_rate=fast", "model_init_kwargs={trust_remote_code: 'yes'}", "output_dir=/dev/null/x", "lora=0", "lora=x",
    "lora=1.5", "lora=true", "model=[a]", "model=true", "data=3", "split=[1]", "split=''", "as_messages=perhaps",
    "ref=7", "eval_split={a: 1}", "loss=null", "max_length=2", "max_prompt_length=5000", "report_to=nowhere",
    "run_name=2020-01-01", "run_name=\ud800", "config_name=3", "eval_data=3", "data_dir=[x]", "beta=" + "[" * 3000,
    "max_steps=1:30", "lora=10000000000", "split=train[5:2]",
]
@pytest.mark.parametrize("data, more", [
    ([], {}), ([3], {}), ("pairs", {}), ([{"prompt": "p", "chosen": "c"}], {}),
    (PAIRS[:1], {"eval_dataset": {"a": [3]}}), ([{"prompt": "p", "chosen": "c", "rejected": 1}], {}),
    (PAIRS, {"chat_template_kwargs": {"enable_thinking": False}}), (PAIRS, {"ref_model": "nowhere"})], ids=str)
def test_what_is_wrong_with_data_or_reference_is_told_before_a_model_is_loaded(home, data, more, tokenizer):
    given = {name: more[name] for name in ("eval_dataset", "ref_model") if name in more}
    settings = {name: value for name, value in more.items() if name not in given}
    config = PreferenceConfig(str(home / "out"), report_to="none", use_cpu=True, **settings)
    sentence("data of a run", lambda: PreferenceTrainer(
        str(home / "m"), config, data, processing_class=tokenizer, **given))


SET_OF_COMPARE = [
    "steps=0", "steps=-1", "steps=x", "steps=1.5", "steps=true", "steps=.nan", f"steps={10**30}", "batch_size=0",
    "beta=.nan", "beta=0", "learning_rate=.inf", "nope=1", "a", "losses=[]", "losses=3", "losses=[dpoo]", "seeds=[]",
    "losses=[dpo, dpo]", "seeds=[-1]", "seeds=[0, 0]", "seeds=3", "schedule=wavy", "optimizer=sgdd", "max_grad_norm=-1",
    "max_grad_norm=.nan", "warmup_steps=-1", "max_length=0", "tuning={dpo: {nope: 1}}", "tuning={nope: {beta: 1}}",
    "tuning={dpo: {beta: .nan}}", "tuning={dpo: 3}", "tuning=3", "sweep={dpo: {beta: 3}}", "sweep={dpo: 3}",
    "letters=0", "letters=-1", "pairs=0", "kept_answers=-1", "eval_steps=0", "save_models=2", "pretrain_steps=-1",
    "data_seed=-1", "letter_reward=.nan", "pretrain_learning_rate=0", "steps=1,", "beta={a: 1, a: 2}",
    "eval_pairs=-1", "eval_steps=-1", "pairs=1e30", "letters=1e9", "optimizer=3", "schedule=null", "losses={dpo: 1}",
    "losses=[null]", "seeds=[0.5]", "seeds=[99999999999999999999999]", "seeds=[true]", "save_models=null",
    "sweep={dpo: {beta: [.nan]}}", "sweep={dpo: {beta: []}}", "sweep=[dpo]", "sweep={nope: {beta: [1]}}",
    "tuning={dpo: {beta: [1]}}", "tuning={3: {beta: 1}}", "tuning=[dpo]", "steps=1e999", "batch_size=1.5",
    "learning_rate=-1", "learning_rate=true", "max_length=true", "beta=[0.1]", "steps=2020-01-01", "losses=dpo",
    "data_seed=1.5", "kept_answers=x", "letter_reward=.inf", "config=3", "task=toy", "seeds={0: 1}", "progress=false",
    "learning_rate=1e300", "beta=1e300", "beta=1e-300", "max_grad_norm=1e300", "letter_reward=1e300",
]
COMMANDS = [
    *[[*TRAIN, "--set", text] for text in SET_OF_TRAIN], *[["compare", "--set", text] for text in SET_OF_COMPARE],
    [*TRAIN, "--beta", "nan"], [*TRAIN, "--beta", "0"],
    [*TRAIN, "--beta", "x"], [*TRAIN, "--lora", "0"], [*TRAIN, "--lora", "x"], [*TRAIN, "--loss", ""],
    [*TRAIN, "--loss", "dpoo"], [*TRAIN, "--loss", "adpo"], [*TRAIN, "--split", ""], [*TRAIN, "--split", "trainn"],
    [*TRAIN, "--split", "train[:x]"], [*TRAIN, "--split", "train[0:0]"], [*TRAIN, "--split", "train[:"],
    [*TRAIN, "--split", "../x"], [*TRAIN, "--config-name", "x"], [*TRAIN, "--data-dir", "../.."],
    [*TRAIN, "--import", "none.py"], [*TRAIN, "--import", "no.such.module"], [*TRAIN, "--import", ""],
    [*TRAIN, "--import", "."], [*TRAIN, "--resume"], [*TRAIN, "--resume", "--set", "resume_from_checkpoint=x"],
    [*TRAIN, "--load-in-4bit"], [*TRAIN, "--output", ""], [*TRAIN, "--output", "good.jsonl"],
    [*TRAIN, "--eval-data", "none.jsonl"], [*TRAIN, "--eval-split", "nope"], [*TRAIN, "--ref", ""], ["train"],
    ["train", "--model", "m"], ["train", "--data", "good.jsonl"], ["train", "--model", "m", "--data", "../none.csv"],
    ["train", "none.yaml"], ["train", "."], ["train", "good.jsonl"], ["evaluate"],
    ["evaluate", "--model", "m", "--ref", "m"], [*EVALUATE, "--loss", "nope"], [*EVALUATE, "--beta", "nan"],
    [*EVALUATE, "--batch-size", "0"], [*EVALUATE, "--batch-size", "x"], [*EVALUATE, "--loss-options", "{"],
    [*EVALUATE, "--loss-options", "[1]"], [*EVALUATE, "--loss-options", "{a: 1, a: 2}"],
    [*EVALUATE, "--loss-options", "{bta: 1}"], [*EVALUATE, "--loss", "adpo"], [*EVALUATE, "--max-length", "2"],
    [*EVALUATE, "--max-prompt-length", "9999"], [*EVALUATE, "--json", "/dev/null/x"], [*EVALUATE, "--json", "."],
    [*EVALUATE, "--split", "nope"], [*EVALUATE, "--chat-template-kwargs", "{"],
    [*EVALUATE, "--chat-template-kwargs", "{a: 1}"], ["data"], ["data", "--data", "good.jsonl"],
    ["data", "--data", "good.jsonl", "--tokenizer", "m", "--show", "-1"],
    ["data", "--data", "good.jsonl", "--tokenizer", "m", "--max-length", "0"],
    ["data", "--data", "none.jsonl", "--tokenizer", "m"], ["data", "--list", "--data", "x"], [], ["nope"],
    ["predict", "--nope"], ["compare", "--task", "nope"], ["compare", "--profile", "nope"],
    *[["compare", "--losses", label] for label in (
        "dpoo", "dpo:", "dpo:beta", "dpo:beta=nan", "dpo:beta=-1", "dpo:beta=true", "dpo:beta=1,beta=2", "dpo:nope=1",
        ":beta=1", "", "best-of-0", "best-of-x", "best-of-99999999999", "ppo:epochs=0", "sft:beta=1", "../../x",
        "dpo:learning_rate=0", "dpo:learning_rate=Infinity")],
    ["compare", "--losses", "dpo", "dpo"], ["compare", "--seeds", "-1"], ["compare", "--seeds", "0", "0"],
    ["compare", "--seeds", "x"], ["compare", "--seeds", str(10**20)], ["compare", "--out", "/dev/null/x"],
    ["compare", "--out", "good.jsonl"], ["compare", "--out", ""],
]


def command(argv, capsys):
    "What a command says before it ends with code 2; usage, which argparse writes before its one line, left out."
    capsys.readouterr()
    try: code = cli.main(argv)
    except SystemExit as stop: code = stop.code
    out, said = capsys.readouterr()
    said = re.sub(r"^usage: .*\n(\s+.*\n)*", "", said).strip()
    assert code == 2 and said.startswith("tokpref"), (code, said)
    def again(): raise ValueError(said)
    return again


@pytest.mark.parametrize("argv", COMMANDS, ids=names(COMMANDS))
def test_commands(argv, capsys): sentence("command line", command(argv, capsys))


BOMB = b"a0: &a0 [x]\n" + b"".join(      # aliases in few bytes that are a hundred million values when written out
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]\n".encode() for i in range(9))
CONFIGS = {
    "empty": b"", "list": b"- a\n- b\n", "broken": b"a: [1\n", "tab": b"a:\n\t- b", "twice": b"model: m\nmodel: n\n",
    "nested": b"model: m\ndata: d\nloss_options: {a: 1, a: 2}\n", "latin": "model: café\n".encode("latin-1"),
    "utf16": "model: m\n".encode("utf-16"), "bom": b"\xef\xbb\xbfmodel: m\ndata: none.jsonl\n",
    "bytes": bytes(range(256)), "python": b"model: !!python/name:os.system\n", "number": b"3: 4\n",
    "null": b"model:\ndata:\n", "section": b"train: {model: m}\n", "two": b"a: 1\n---\nb: 2\n",
    "deep": b"a: " + b"[" * 3000,
    "anchors": b"a: &a [x,x,x]\nb: &b [*a,*a,*a]\n", "itself": b"loss_options: &a\n  a: *a\n",
    "misspelt": b"modle: m\n",
    "json": b'{"model": "m", "data": "d", }}', "date": b"model: 2020-01-01\ndata: good.jsonl\n",
    "key": b"? [a, b]\n: 1\n", "output": b"model: m\ndata: good.jsonl\noutput: [x]\n", "merge": b"<<: 3\n",
    "zero": b'model: "a\\0b"\ndata: good.jsonl\n', "code": b"import os\nos.system('true')\n",
    "bomb": BOMB + b"loss_options: {window: *a9}\nmodel: m\ndata: d\n",
    "bomb of names": BOMB + b"model: *a9\ndata: d\n",
    "digits": b"model: m\ndata: good.jsonl\nmax_steps: " + b"9" * 5000,
    "hex": b"model: m\ndata: good.jsonl\nseed: 0x" + b"f" * 9000,
    "infinite": b"model: m\ndata: good.jsonl\nbeta: .inf\n", "set": b"model: m\ndata: !!set {a, b}\n",
    "binary": b"model: m\ndata: !!binary aGk=\n", "tag": b"model: !mine m\ndata: good.jsonl\n",
    "pairs": b"model: m\ndata: good.jsonl\nloss_options: !!pairs [a: 1, a: 2]\n",
    "percent": b"%YAML 9.9\n---\nmodel: m\n",
    "directions": "model: m\ndata: '\u202egood.jsonl'\n".encode(), "alias": b"model: *nobody\n",
    "toml": b"[run]\nbeta = 1\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_settings(name, home, capsys):
    (home / f"{name}.yaml").write_bytes(CONFIGS[name])
    sentence("files of settings", command(["train", str(home / f"{name}.yaml")], capsys))


SCRIPTS = {"syntax": "def (", "ends": "import sys; sys.exit(3)", "raises": "raise RuntimeError('a\\nb')"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_that_are_run_first(name, home, capsys):
    (home / f"{name}.py").write_text(SCRIPTS[name])
    sentence("command line", command([*TRAIN, "--import", str(home / f"{name}.py")], capsys))


# Data: files, then rows

LINE = json.dumps(PAIRS[0]).encode()
FILES = {
    "empty.jsonl": b"", "blank.jsonl": b"\n\n", "open.jsonl": b'{"a": ', "list.jsonl": b"[1, 2]\n",
    "text.jsonl": b"hello\n",
    "latin.jsonl": '{"prompt": "é", "chosen": "é", "rejected": "b"}'.encode("latin-1"),
    "utf16.jsonl": LINE.decode().encode("utf-16"), "bytes.jsonl": bytes(range(256)),
    "cut.jsonl": LINE + b"\n" + LINE[:20],
    "mixed.jsonl": LINE + b'\n{"prompt": 3, "chosen": "a", "rejected": "b"}', "cut.parquet": b"PAR1" + b"\0" * 30,
    "none.parquet": b"", "text.parquet": b"hello", "cut.jsonl.gz": gzip.compress(LINE)[:20], "not.jsonl.gz": LINE,
    "empty.csv": b"", "head.csv": b"prompt,chosen,rejected\n", "short.csv": b"prompt,chosen,rejected\na,b\n",
    "long.csv": b"prompt,chosen,rejected\na,b,c,d\n", "semi.csv": b"prompt;chosen;rejected\na;b;c\n",
    "latin.csv": "prompt,chosen,rejected\né,a,b\n".encode("latin-1"), "file.txt": LINE, "file": LINE,
    "file.pkl": b"\x80\x04N.",
    "twice.csv": b"prompt,chosen,chosen\na,b,c\n", "open.csv": b'prompt,chosen,rejected\na,b,"c\n',
    "utf16.csv": "prompt,chosen,rejected\na,b,c\n".encode("utf-16"),
    "spaces.csv": b"prompt, chosen, rejected\na,b,c\n", "nameless.csv": b"prompt,,rejected\na,b,c\n",
    "twice.jsonl": b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n',
    "deep.jsonl": b'{"prompt": ' + b"[" * 5000, "zero.jsonl": LINE + b"\n\0\0\0\n",
    "nan.jsonl": LINE.replace(b'"yes"', b"NaN"),
    "half.jsonl": b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}\n', "comma.jsonl": LINE[:-1] + b",}\n",
    "two.jsonl": LINE + LINE + b"x", "single.jsonl": LINE.replace(b'"', b"'"), "number.jsonl": b"1\n2\n",
    "null.jsonl": b"null\n", "other.jsonl": LINE + b'\n{"prompt": "a", "chosen": ["b"], "rejected": "c"}\n',
    "cut.json": b'[{"prompt": "a"', "empty.json": b"", "null.json": b"null", "end.parquet": b"\0" * 30 + b"PAR1",
    "bomb.json.gz": gzip.compress(b"0" * 1000) + b"tail", "file.yaml": b"a: 1", "file.xlsx": b"PK",
    "object.json": b'{"a": {"b": 1}', "text.json": b'"hello"',
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_data(name, home, tokenizer):
    path = home / "data" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(FILES[name])
    def read(): prepare(load_preferences(str(path)), tokenizer)
    sentence("files of data", read)


def table(name, columns):
    "A file of columns that are no text."
    import pyarrow.parquet
    path = f"data/{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


TABLES = {
    "numbers": {"prompt": [1], "chosen": [2], "rejected": [3]},
    "bytes": {"prompt": ["a"], "chosen": [b"b"], "rejected": [b"c"]},
    "structs": {"prompt": ["a"], "chosen": [{"x": 1}], "rejected": [{"x": 2}]},
    "no rows": {"prompt": [], "chosen": [], "rejected": []},
    "no columns": {}, "lists": {"prompt": ["a"], "chosen": [[1.5]], "rejected": [[2.5]]},
    "truths": {"prompt": ["a"], "chosen": [True], "rejected": [False]},
    "nulls": {"prompt": [None], "chosen": [None], "rejected": [None]},
    "days": {"prompt": ["a"], "chosen": [datetime.date(2020, 1, 1)], "rejected": [datetime.date(2020, 1, 2)]},
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_parquet(name, home, tokenizer):
    (home / "data").mkdir(exist_ok=True)
    sentence("files of data", lambda: prepare(load_preferences(table(name, TABLES[name])), tokenizer))


NO_FILES = ["loop.jsonl", "folder.jsonl", "broken.csv", "pipe.jsonl", "x" * 300 + ".jsonl"]


@pytest.mark.parametrize("name", NO_FILES, ids=names(NO_FILES))
def test_files_that_are_none(name, home, tokenizer):
    path = home / "none" / name
    path.parent.mkdir(exist_ok=True)
    if name == "loop.jsonl": path.symlink_to(path)
    if name == "folder.jsonl": path.mkdir()
    if name == "broken.csv": path.symlink_to(home / "nowhere.csv")
    if name == "pipe.jsonl": os.mkfifo(path)
    sentence("sources of data", lambda: prepare(load_preferences(str(path)), tokenizer))


SOURCES = [
    ("none.jsonl", "train"), ("../none.csv", "train"), ("/nowhere/at/all", "train"), ("a/b/c/d", "train"), ("hhh",
    "train"),
    ("gsm8k", "train"), ("good.jsonl", "nope"), ("good.jsonl", "train[:x]"), ("good.jsonl", "train[:0]"),
    ("good.jsonl", "../train"), ("good.jsonl", ""), ("", "train"), ("\0", "train"), (".", "train"), ("m", "train"),
]


@pytest.mark.parametrize("source, split", SOURCES)
def test_sources(source, split): sentence("sources of data", lambda: load_preferences(source, split))


def test_a_file_that_may_not_be_read(home, monkeypatch):
    from pathlib import Path
    path = home / "closed.csv"
    path.write_bytes(b"prompt,chosen,rejected\na,b,c\n")
    def refuse(*args, **kwargs): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "open", refuse)
    sentence("sources of data", lambda: load_preferences(str(path)))


def chat(*turns): return [{"role": role, "content": content} for role, content in turns]


YES = chat(("assistant", "yes"))
ROWS = [
    [], {}, None, 3, "text", b"bytes", [3], ["text"], [[]], [None], [{}], [{"prompt": "a"}], [{"chosen": "a"}],
    [{"prompt": "a", "chosen": "b"}], [{"Chosen": "a", "Rejected": "b"}], [{"chosen": 3, "rejected": 4}],
    [{"chosen": b"a", "rejected": b"b"}], [{"chosen": {"a": 1}, "rejected": {"a": 2}}],
    [{"chosen": [1, 2], "rejected": [3]}], [{"chosen": [["a"]], "rejected": [["b"]]}],
    [{"chosen": "a", "rejected": YES}], [{"prompt": YES, "chosen": "a", "rejected": "b"}],
    [{"prompt": "q", "chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}],
    [{"prompt": "q", "chosen": [{"role": 3, "content": "a"}], "rejected": [{"role": 3, "content": "b"}]}],
    [{"prompt": "q", "chosen": chat(("assistant", 3)), "rejected": chat(("assistant", 4))}],
    [{"prompt": "q", "chosen": chat(("assistant", ["a"])), "rejected": chat(("assistant", ["b"]))}],
    [{"prompt": None, "chosen": None, "rejected": None}], [{"prompt": "a", "chosen": "", "rejected": ""}],
    [{"prompt": "a", "chosen": "b", "rejected": "b"}], [{"prompt": "", "chosen": "b", "rejected": "c"}],
    [{"prompt": "a", "chosen": "b\ud800", "rejected": "c"}], [{"prompt": "\udfff", "chosen": "b", "rejected": "c"}],
    [PAIRS[0], {"prompt": 3, "chosen": "b", "rejected": "c"}], [PAIRS[0], "text"],
    [{**PAIRS[0], "chosen_weights": [1.0]}], [{**PAIRS[0], "chosen_weights": [1.0], "rejected_weights": [1.0]}],
    [{**PAIRS[0], "chosen_weights": [NAN] * 4, "rejected_weights": [1.0] * 3}],
    [{**PAIRS[0], "chosen_weights": "x", "rejected_weights": "y"}],
    [{**PAIRS[0], "chosen_weights": [[1.0]] * 4, "rejected_weights": [[1.0]] * 3}],
    [{"prompt": chat(("user", "q")), "chosen": YES, "rejected": chat(("assistant", "no"))}],
    [{"prompt": NAN, "chosen": "a", "rejected": "b"}], [{"prompt": True, "chosen": "a", "rejected": "b"}],
    DatasetDict(train=Dataset.from_list(PAIRS)), Dataset.from_list([]),
    IterableDataset.from_generator(lambda: iter(PAIRS)),
    Dataset.from_dict({"prompt": ["a"], "chosen": [1.0], "rejected": [2.0]}),
    Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": [b"c"]},
                      features=Features(prompt=Value("string"), chosen=Value("string"), rejected=Value("binary"))),
]


@pytest.mark.parametrize("rows", ROWS, ids=names(ROWS))
def test_rows(rows, tokenizer): sentence("rows of data", lambda: prepare(rows, tokenizer))


LIMITS = [dict(max_length=0), dict(max_length=-1), dict(max_length=3), dict(max_length=1.5), dict(max_length="x"),
          dict(max_length=NAN), dict(max_length=True), dict(max_length=None), dict(max_prompt_length=0),
          dict(max_prompt_length=1023), dict(max_prompt_length="x"), dict(max_prompt_length=1.5), dict(num_proc=0),
          dict(num_proc=-1), dict(num_proc="x"), dict(num_proc=1.5), dict(on_bad_row="skip"), dict(examples=-1),
          dict(examples="x"), dict(chat_template_kwargs={"a": 1}), dict(chat_template_kwargs="x"),
          dict(tokenizer=None), dict(tokenizer="m"), dict(tokenizer=3)]


@pytest.mark.parametrize("limits", LIMITS, ids=names(LIMITS))
def test_limits_of_preparation(limits, tokenizer):
    sentence("rows of data", lambda: prepare(PAIRS, **{"tokenizer": tokenizer, **limits}))


# Losses and what they read

STATS = random_stats([3, 5], seed=0)


def changed(**fields):
    "The statistics with some of their fields replaced."
    return TokenStats(**{**vars(STATS), **fields})


OPTIONS_OF_LOSSES = [
    *[(loss, dict(beta=beta)) for loss in ("dpo", "ipo", "tdpo2", "bpo", "tbpo_a", "simpo", "orpo")
      for beta in (0, -1, NAN, "x", None, True, HUGE, [0.1], torch.tensor(0.1))],
    ("dpo", dict(nope=1)), ("dpo", dict(label_smoothing="x")), ("dpo", dict(f_divergence=b"js")),
    ("dpo", dict(alpha=0.3)), ("dpo", dict(f_divergence="alpha", alpha=1)), ("adpo", {}), ("adpo", dict(window=-1)),
    ("adpo", dict(segments=[2])), ("bpo", dict(generator=None)), ("bpo", dict(lam="1")), ("tbpo_q",
    dict(baseline_clip=-1)),
    ("cpo", dict(alpha=NAN)), ("robust", dict(flip_rate=True)), ("dpop", dict(penalty="x")), ("sft", dict(beta=1.0)),
    ("dpo+0.1*sft", dict(nope=1)), ("dpo+0.1*sft", {"sft.beta": 1.0}),
]


@pytest.mark.parametrize("loss, options", OPTIONS_OF_LOSSES, ids=names(OPTIONS_OF_LOSSES))
def test_options_of_losses(loss, options): sentence("losses", lambda: LOSSES[loss](STATS, STATS, **options))


STATISTICS = [
    ("dpo", lambda: changed(ref_logps=None)), ("tdpo2", lambda: changed(kl=None)), ("tbpo_q",
    lambda: changed(baseline=None)),
    ("dpo", lambda: changed(mask=STATS.mask.long())), ("dpo", lambda: changed(mask=STATS.mask[:1])),
    ("dpo", lambda: changed(kl=STATS.kl[:, :2])), ("dpo", lambda: changed(logps=STATS.logps[0])),
    ("simpo", lambda: changed(weights=STATS.kl)), ("simpo", lambda: changed(mask=torch.zeros_like(STATS.mask))),
    ("adpo", lambda: changed(mask=torch.zeros_like(STATS.mask))), ("dpo", lambda: random_stats([3], seed=0)),
]


@pytest.mark.parametrize("loss, made", STATISTICS, ids=names(range(len(STATISTICS))))
def test_statistics(loss, made):
    options = {"window": 1} if loss == "adpo" else {}
    sentence("losses", lambda: LOSSES[loss](made(), STATS, **options))


def batch(**changes):
    "A batch of one pair with some of its parts replaced; a part that is None is left out."
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1]}
    whole = {**PreferenceCollator(pad_token_id=0)([row]), **changes}
    return {name: value for name, value in whole.items() if value is not None}


LONG = torch.zeros(3, 5, dtype=torch.long)
BATCHES = [
    {}, None, dict(batch(), input_ids=None), batch(input_ids=LONG), batch(attention_mask=None),
    batch(completion_mask=None),
    batch(completion_mask=torch.zeros(2, 5, dtype=torch.long)), batch(completion_mask=torch.ones(2, 5,
    dtype=torch.long)),
    batch(attention_mask=torch.zeros(2, 5, dtype=torch.long)), batch(attention_mask=torch.ones(2, 4, dtype=torch.long)),
    batch(input_ids=torch.ones(2, 5)), batch(input_ids=torch.zeros(5, dtype=torch.long)), batch(row=torch.zeros(3)),
    batch(ref_logps=torch.zeros(2, 1)), batch(weights=torch.zeros(2, 2)), batch(input_ids=torch.zeros(2, 0,
    dtype=torch.long)),
]


@pytest.mark.parametrize("given", BATCHES, ids=names(range(len(BATCHES))))
@pytest.mark.parametrize("engine", ["token_stats", "pair_loss"])
def test_batches(given, engine, model):
    reference = None if given and "ref_logps" in given else model      # whose reference is the policy itself
    if engine == "token_stats": sentence("batches", lambda: token_stats(model, reference, given, kl=False))
    else: sentence("batches", lambda: pair_loss(model, reference, given, LOSSES["dpo"]))


COLLATED = [[], [{}], [{"prompt_ids": [1]}], [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3],
    "chosen_weights": [1.0]}],
            [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "chosen_weights": [],
            "rejected_weights": [1.0]}],
            [{"prompt_ids": 1, "chosen_ids": [2], "rejected_ids": [3]}], ["row"]]


@pytest.mark.parametrize("rows", COLLATED, ids=names(range(len(COLLATED))))
def test_rows_to_collate(rows): sentence("batches", lambda: PreferenceCollator(pad_token_id=0)(rows))


@pytest.mark.parametrize("settings", [dict(pad_token_id=None), dict(pad_token_id=0, padding_side="up"),
                                      dict(pad_token_id=0, pad_to_multiple_of=0)])
def test_settings_of_the_collator(settings): sentence("batches", lambda: PreferenceCollator(**settings))


# The trainer's arguments

ARGUMENTS = [
    dict(args=3), dict(args={"loss": "dpo"}), dict(args=transformers.TrainingArguments("out", report_to="none")),
    dict(train_dataset={"train": PAIRS}), dict(compute_metrics=print), dict(compute_loss_func=print), dict(model=None),
    dict(model=3), dict(model=torch.nn.Linear(2, 2)), dict(ref_model=3), dict(processing_class=None),
    dict(settings=dict(loss="tdpo2", precompute_ref_logps=True)), dict(settings=dict(loss="simpo",
    precompute_ref_logps=True)),
    dict(settings=dict(model_init_kwargs={"dtype": "float32"})), dict(train_dataset=[]), dict(train_dataset=3),
    dict(train_dataset="good.jsonl"), dict(train_dataset=[{"prompt": "a"}]), dict(beta=0.1), dict(tokenizer=3),
]


@pytest.mark.parametrize("changes", ARGUMENTS, ids=names(ARGUMENTS))
def test_arguments_of_the_trainer(changes, model, tokenizer):
    changes = dict(changes)
    config = PreferenceConfig("out", use_cpu=True, report_to="none", **changes.pop("settings", {}))
    given = {"model": model, "args": config, "train_dataset": PAIRS, "processing_class": tokenizer, **changes}
    sentence("arguments of the trainer", lambda: PreferenceTrainer(**given))


# Comparisons, their profiles, and judges

PROFILES = {
    "empty": "", "broken": "[a", "twice": "[a]\n[a]\n", "outside": "steps = 3\n", "unknown": "[a]\nstep = 3\n",
    "kind": "[a]\nsteps = 'x'\n", "range": "[a]\nsteps = 0\n", "like": "[a]\nlike = 'b'\n",
    "itself": "[a]\nlike = 'a'\n",
    "circle": "[a]\nlike = 'b'\n[b]\nlike = 'a'\n", "nan": "[a]\nbeta = nan\n", "losses": "[a]\nlosses = []\n",
    "seeds": "[a]\nseeds = [0, 0]\n", "huge": f"[a]\nsteps = {10**30}\n", "date": "[a]\nbeta = 2020-01-01\n",
    "double": "[a]\nsteps = 3\nsteps = 4\n", "tuning": "[a]\ntuning = {dpo = 3}\n", "like3": "[a]\nlike = 3\n",
}


@pytest.mark.parametrize("name", PROFILES)
def test_profiles(name, home):
    (home / f"{name}.toml").write_text(PROFILES[name])
    sentence("profiles", lambda: read_profiles(str(home / f"{name}.toml"), RunConfig))


@pytest.mark.parametrize("content", [b"\xff\xfe", "[a]\ntext = 'é'\n".encode("latin-1"),
    b"\xef\xbb\xbf[a]\nsteps = 0\n"])
def test_bytes_of_profiles(content, home):
    (home / "bytes.toml").write_bytes(content)
    sentence("profiles", lambda: read_profiles(str(home / "bytes.toml"), RunConfig))


def test_no_file_of_profiles(home): sentence("profiles", lambda: read_profiles(str(home / "nowhere.toml"), RunConfig))


COMPARISONS = [
    dict(task=3), dict(task="../toy"), dict(task=None), dict(profile=3), dict(losses=3), dict(losses=[3]),
    dict(losses=[]),
    dict(losses={"a": ("dpoo", {})}), dict(losses={"a": 3}), dict(losses={"a": ("dpo", {"beta": "x"})}),
    dict(losses={}),
    dict(seeds=3), dict(seeds=[]), dict(seeds=[1.5]), dict(seeds=["0"]), dict(seeds=[True]), dict(out=3),
    dict(out="/dev/null"),
    dict(overrides={"nope": 1}), dict(overrides={3: 1}), dict(overrides=[("steps", 3)]),
    dict(overrides={"steps": b"3"}),
]


@pytest.mark.parametrize("changes", COMPARISONS, ids=names(COMPARISONS))
def test_comparisons(changes):
    given = {"task": "toy", "profile": "smoke", "out": "runs", "progress": False, **changes}
    sentence("comparisons", lambda: compare(**given))


@pytest.mark.parametrize("word", ["", "nope", "recorded:", "recorded:none.jsonl", "reward:", "x@y", "@http://a",
    "m@http://",
                                  "m@ftp://host", "m m@http://host", 3, None, "recorded:good.jsonl", "longer:3"])
def test_words_for_judges(word, home):
    sentence("judges", lambda: judges.open_judge(word, home / "judges", progress=False))


JUDGES = [dict(template="{prompt}"), dict(template=""), dict(template=3), dict(concurrency=0), dict(tries=0),
    dict(timeout=0),
          dict(timeout=NAN), dict(pause=-1.0), dict(url="ftp://host"), dict(url=""), dict(model=""), dict(options=[1]),
          dict(template="{prompt}{first}{second}{third}"), dict(template="{prompt}{first}{second}{"),
          dict(template="{prompt}{first}{second.__class__}"), dict(template="{prompt}{first}{second}{prompt[0]}"),
          dict(template="{prompt}{first}{second}{}"), dict(url="http://"), dict(url="http://host:port"),
          dict(url="http://[::1"), dict(url="http://a b/v1"), dict(url="http://me:word@host/v1"),
          dict(url="http://host/v1?key=x"), dict(key="sk-not-a-name"), dict(key=""), dict(options={3: 1}),
          dict(options={"temperature": NAN}), dict(options={"stop": b"x"}), dict(options={"messages": []}),
          dict(options={"stream": True}), dict(longest_wait=-1), dict(longest_wait=NAN), dict(tries=True)]


@pytest.mark.parametrize("settings", JUDGES, ids=names(JUDGES))
def test_settings_of_a_judge(settings):
    sentence("judges", lambda: judges.EndpointJudge(**{"model": "m", "url": "http://localhost:1/v1", **settings}))


RECORDS = [dict(path="."), dict(path=""), dict(path=3), dict(batch_size=0), dict(batch_size=True), dict(batch_size=1.5)]


@pytest.mark.parametrize("settings", RECORDS, ids=names(RECORDS))
def test_settings_of_a_record_of_verdicts(settings):
    sentence("judges", lambda: judges.CachedJudge(**{"judge": print, "path": "v.jsonl", **settings}))


REWARDS = [dict(model=""), dict(model=3), dict(max_length=0), dict(max_length="x"), dict(batch_size=0), dict(label=-1),
           dict(label="good"), dict(label=True)]


@pytest.mark.parametrize("settings", REWARDS, ids=names(REWARDS))
def test_settings_of_a_reward_model(settings):
    sentence("judges", lambda: judges.RewardJudge(**{"model": "m", **settings}))


COUNTS = [dict(difference=NAN), dict(rate=1.5), dict(rate=0), dict(level=1), dict(level=0), dict(power=1),
          dict(power="x"), dict(policies=0)]


@pytest.mark.parametrize("settings", COUNTS, ids=names(COUNTS))
def test_how_many_comparisons(settings):
    sentence("judges", lambda: judges.comparisons_needed(**{"difference": 0.1, **settings}))


@pytest.mark.parametrize("settings", [dict(level=2), dict(level=NAN), dict(draws=0), dict(draws=1.5)], ids=str)
def test_intervals(settings):
    sentence("judges", lambda: judges.bootstrap_interval(max, [1.0, 2.0], **settings))


# Folders of models and adapters: what stands in their files

GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
MODELS = {
    "cut": {"config.json": b'{"model_type": "gp'}, "list": {"config.json": b"[1]"}, "empty": {"config.json": b""},
    "text": {"config.json": b'"gpt2"'}, "latin": {"config.json": '{"model_type": "é"}'.encode("latin-1")},
    "no kind": {"config.json": b"{}"}, "kind": {"config.json": b'{"model_type": "gpt9"}'},
    "number": {"config.json": b'{"model_type": 3}'}, "gone": {"config.json": None},
    "size": {"config.json": json.dumps({**GPT2, "n_layer": "many"}).encode()},
    "remote": {"config.json": json.dumps({"model_type": "mine", "auto_map": {
        "AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}).encode(), "code.py": b"raise SystemExit"},
    "tokenizer cut": {"tokenizer.json": b'{"version": "1.0", "mod'}, "tokenizer list": {"tokenizer.json": b"[]"},
    "tokenizer empty": {"tokenizer.json": b""}, "tokenizer gone": {"tokenizer.json": None},
    "tokenizer kind": {"tokenizer_config.json": b'{"tokenizer_class": "Nobody"}', "tokenizer.json": None},
    "tokenizer bytes": {"tokenizer_config.json": b"\xff\xfe{"},
    "tokenizer settings": {"tokenizer_config.json": b"[1, 2]"},
}
ADAPTERS = {
    "cut": b'{"peft_type": "LO', "list": b"[1]", "empty": b"{}", "text": b'"LORA"', "kind": b'{"peft_type": "NONE"}',
    "no base": b'{"peft_type": "LORA"}', "base": b'{"peft_type": "LORA", "base_model_name_or_path": "nowhere/at-all"}',
    "number": b'{"peft_type": "LORA", "base_model_name_or_path": 3}',
    "itself": b'{"peft_type": "LORA", "base_model_name_or_path": "adapters/itself"}',
    "circle": b'{"peft_type": "LORA", "base_model_name_or_path": "adapters/other"}',
    "other": b'{"peft_type": "LORA", "base_model_name_or_path": "adapters/circle"}',
}
USES = {"train": ["train", "--model", "{}", "--data", "good.jsonl"],
        "data": ["data", "--tokenizer", "{}", "--data", "good.jsonl"]}


@pytest.mark.parametrize("name", MODELS)
def test_folders_of_models(name, home, capsys, monkeypatch):
    def load(*args, **kwargs): raise Loaded
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", AUTO)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)
    folder = home / "models" / name.replace(" ", "-")
    shutil.copytree(home / "m", folder)
    for file, content in MODELS[name].items():
        if content is None: (folder / file).unlink()
        else: (folder / file).write_bytes(content)
    use = USES["data" if "tokenizer" in name else "train"]
    said = sentence("models", command([part.format(folder) for part in use], capsys))
    assert "models" in said, "it names the folder"


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("use", USES)
def test_folders_of_adapters(use, name, home, capsys):
    for other, content in ADAPTERS.items():
        (home / "adapters" / other).mkdir(parents=True, exist_ok=True)
        (home / "adapters" / other / "adapter_config.json").write_bytes(content)
    sentence("models", command([part.format(f"adapters/{name}") for part in USES[use]], capsys))


@pytest.mark.parametrize("name", ["good.jsonl", "m/config.json", "", " ", "a/b/c", "../m/../..", "a\nb", "x" * 300,
                                  "https://host/model", "m\0"], ids=names(range(10)))
@pytest.mark.parametrize("use", USES)
def test_names_of_models(use, name, capsys):
    sentence("models", command([part.format(name) for part in USES[use]], capsys))


# What the environment says

@pytest.mark.parametrize("name, value", [("RANK", "first"), ("RANK", ""), ("RANK", "-1"), ("TOKPREF_DATA", "/nowhere"),
                                         ("TOKPREF_DATA", "good.jsonl"), ("TOKPREF_MODELS", "/nowhere"),
                                         ("TOKPREF_MODELS", "good.jsonl")])
def test_the_environment(name, value, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    tokenizer = "m" if name == "TOKPREF_DATA" else "nobody/none"
    said = sentence("command line", command(["data", "--data", "hh", "--tokenizer", tokenizer], capsys))
    assert name in said


def test_the_catalogue_is_long_and_counted(capsys):
    "Runs last. The table is printed past pytest's capture, so that every run shows it."
    total = sum(refused.values())
    with capsys.disabled():
        print("\n\nmalformed input, each refused in one sentence")
        for kind, count in refused.most_common(): print(f"  {kind:<26}{count:>5}")
        print(f"  {'in all':<26}{total:>5}")
    if len(refused) >= 14: assert total >= 1000      # all kinds: the whole file ran
