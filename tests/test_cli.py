"""The command line: settings from YAML and flags, and runs on tiny models in temporary folders."""
import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tokpref import LOSSES, cli, training
from tokpref.cli import main, read_yaml, train_settings
from tokpref.precision import Precision

PAIRS = [{"prompt": f"say {word} ", "chosen": word + "!", "rejected": other + ", never"}
         for word in ("yes", "no") for other in ("maybe", "but", "go")]
STEP = [
    "--set",
    "max_steps=1",
    "--set",
    "use_cpu=true",
    "--set",
    "report_to=none",
    "--set",
    "disable_tqdm=true",
    "--set",
    "save_strategy=no",
]


@pytest.fixture
def home(model, tokenizer, tmp_path):
    "A folder with a model in bfloat16, an adapter for it, and pairs."
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    adapter = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    adapter.save_pretrained(tmp_path / "adapter")
    for name in ("model", "adapter"): tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return tmp_path


@pytest.fixture
def run(home, capsys):
    "Runs a command on the folder's pairs; its exit code and what it said."
    def run(command, *argv):
        code = main([command, "--data", str(home / "pairs.jsonl"), *map(str, argv)])
        return code, "".join(capsys.readouterr())
    return run


@pytest.fixture
def made(monkeypatch):
    "The trainers that a command makes."
    made = []
    def make(*args, **kwargs):
        made.append(trainer_class(*args, **kwargs))
        return made[-1]
    trainer_class = training.PreferenceTrainer
    monkeypatch.setattr(training, "PreferenceTrainer", make)
    return made


def settings(*argv):
    "(what to load, fields of PreferenceConfig) of a training command."
    return train_settings(cli.make_parser().parse_args(["train", "--model", "m", "--data", "d", *argv]))


# Settings

@pytest.mark.parametrize(
    "text, value",
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e-1", -0.25),
        (".5e1", 5.0),
        ("[1e-3, x]", [1e-3, "x"]),
        ('"42"', "42"),
        ('"3e-4"', "3e-4"),
        ("nan", "nan"),
        ("infinity", "infinity"),
        ("1e", "1e"),
        ("42", 42),
        ("{a: 3e-1}", {"a": 0.3}),
    ],
)
def test_yaml_numbers(text, value):
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)


def test_a_quoted_number_is_text(tmp_path):
    (tmp_path / "run.yaml").write_text('run_name: "42"\nlearning_rate: 3e-4\n')
    assert cli.read_config(str(tmp_path / "run.yaml")) == {"run_name": "42", "learning_rate": 3e-4}


@pytest.mark.parametrize("value", ["a", "a={", "=1"])
def test_a_setting_that_cannot_be_read(value, capsys):
    assert main(["train", "--model", "m", "--data", "d", "--set", value]) == 2
    assert "--set takes name=value" in capsys.readouterr().err


def test_no_is_a_strategy(tmp_path):
    assert settings("--set", "save_strategy=no", "--set", "bf16=no")[1] == {
        "output_dir": "tokpref-output",
        "save_strategy": "no",
        "bf16": False,
    }
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\neval_strategy: no\n")
    assert (
        train_settings(cli.make_parser().parse_args(["train", str(tmp_path / "run.yaml")]))[1]["eval_strategy"] == "no"
    )


def test_a_flag_that_is_not_given_leaves_the_file_alone(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nas_messages: true\ndata_dir: harmless-base\n")
    load = train_settings(cli.make_parser().parse_args(["train", str(tmp_path / "run.yaml")]))[0]
    assert load["as_messages"] is True and load["data_dir"] == "harmless-base" and load["config_name"] is None
    assert settings("--as-messages", "--config-name", "c")[0] | {"model": None} == load | {
        "model": None,
        "data_dir": None,
        "config_name": "c",
    }


# Train

def test_models_are_trained_and_compared_in_float32(run, home, made):
    assert run("train", "--model", home / "model", "--ref", home / "model", "--output", home / "out", *STEP)[0] == 0
    assert {p.dtype for m in (made[0].model, made[0].ref_model) for p in m.parameters()} == {torch.float32}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_reference_that_is_nowhere_is_told_before_a_weight_is_read(run, home, command, monkeypatch):
    def load(*args, **kwargs): pytest.fail("weights were read")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    code, text = run(command, "--model", home / "model", "--ref", home / "nowhere")
    assert code and "nowhere" in text and "cannot load" in text
    code, text = run("evaluate", "--model", home / "model")
    assert code and "--ref is missing" in text


def test_an_adapter_is_trained_on(run, home, made):
    code, text = run("train", "--model", home / "adapter", "--output", home / "out", *STEP)
    assert code == 0 and (home / "out" / "adapter_config.json").exists(), text
    assert (
        not made[0].adapter_off
        and made[0].ref_model is not None
        and {p.dtype for p in made[0].model.parameters()} == {torch.float32}
    )


def test_held_out_pairs_are_measured_once_an_epoch_unless_asked_otherwise(run, home, made):
    pairs = (
        "train",
        "--model",
        home / "model",
        "--eval-data",
        home / "pairs.jsonl",
        "--eval-split",
        "train",
        "--output",
        home / "out",
        *STEP,
    )
    for more, when in (((), "epoch"), (("--set", "eval_steps=5"), "steps"), (("--set", "eval_strategy=no"), "no")):
        code, text = run(*pairs, *more)
        assert code == 0 and re.search(r"^eval_rewards/margins +\S+$", text, re.M), text
        assert made[-1].args.eval_strategy == when
        assert len([h for h in made[-1].state.log_history if "eval_loss" in h]) == 1, "measured once at the end"


def test_adpo_says_how_to_give_its_window(run, home):
    code, text = run("train", "--model", home / "model", "--loss", "adpo", "--output", home / "out", *STEP)
    assert code == 2 and "--set 'loss_options={window: 4}'" in text
    assert (
        run(
            "train",
            "--model",
            home / "model",
            "--loss",
            "adpo",
            "--set",
            "loss_options={window: 4}",
            "--output",
            home / "out",
            *STEP,
        )[0]
        == 0
    )


def test_two_ways_to_resume_are_one_too_many(run, home):
    code, text = run("train", "--model", home / "model", "--output", home / "out", "--resume",
                     "--set", "resume_from_checkpoint=x", *STEP)
    assert code == 2 and "--resume and resume_from_checkpoint set the same thing" in text
    code, text = run("train", "--model", home / "model", "--output", home / "out",
                     "--set", f"resume_from_checkpoint={home / 'none'}", *STEP)
    assert code == 2 and "none" in text, "a checkpoint that is named in the settings is read"


def test_names_of_trl_are_settings_too(run, home, made):
    assert settings("--set", "loss_type=ipo", "--beta", "0.2")[1] == {
        "output_dir": "tokpref-output", "loss": "ipo", "loss_options": {"average": True}, "beta": 0.2}
    code, text = run("train", "--model", home / "model", "--loss", "dpo", "--set", "loss_type=sigmoid", *STEP)
    assert code == 2 and "loss_type and loss='dpo' set the same thing" in text


def test_help_names_the_reference_of_an_adapter(capsys):
    with pytest.raises(SystemExit): main(["train", "--help"])
    assert re.search(r"--ref REF.*the model as it starts, with its adapter", " ".join(capsys.readouterr().out.split()))


def test_sums_of_losses_are_given_as_text_or_as_weights(run, home, made, tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nloss: {dpo: 1, sft: 0.1}\n")
    file = cli.make_parser().parse_args(["train", str(tmp_path / "run.yaml")])
    assert train_settings(file)[1]["loss"] == "dpo+0.1*sft" == settings("--loss", "dpo+0.1*sft")[1]["loss"]
    train = "train", "--model", home / "model", "--output", home / "out", *STEP
    assert run(*train, "--loss", "tdpo2+0.5*sft", "--set", "loss_options={tdpo2.alpha: 0.1}")[0] == 0
    assert made[-1].spec.kl and made[-1].args.options == {"tdpo2.alpha": 0.1}
    code, text = run(*train, "--loss", "dpo+0.1*sfd")
    assert code == 2 and "did you mean 'sft'?" in text


OWN_LOSS = """
from tokpref import LOSSES, LossSpec, PairLoss

def calm_loss(chosen, rejected, beta=0.1):
    result = LOSSES["dpo"](chosen, rejected, beta=beta)
    return PairLoss(0.5 * result.losses, result.chosen_rewards, result.rejected_rewards)

LOSSES["calm"] = LossSpec(calm_loss, source="here")
"""


def test_a_loss_of_ones_own_is_imported(run, home, made, tmp_path):
    (tmp_path / "json.py").write_text(OWN_LOSS)         # a name that is taken
    own = "--import", tmp_path / "json.py"
    try:
        code, text = run("train", "--model", home / "model", "--loss", "calm", "--output", home / "out", *own, *STEP)
        assert code == 0 and made[-1].args.loss == "calm", text
        assert sys.modules["json"] is json
        given = "evaluate", "--model", home / "adapter", "--split", "train", "--json", home / "numbers.json"
        losses = {}
        for loss in ("dpo", "calm"):
            assert run(*given, "--loss", loss, *own)[0] == 0
            losses[loss] = json.loads((home / "numbers.json").read_text())["loss"]
        assert losses["calm"] == pytest.approx(losses["dpo"] / 2)
    finally: LOSSES.pop("calm", None)
    for what, said in ((tmp_path / "no.py", "no such file"), ("no_such_module", "ModuleNotFoundError")):
        code, text = run("train", "--model", home / "model", "--import", what)
        assert code == 2 and f"--import {what}: " in text and said in text


def test_four_bits_want_an_adapter(run, home):
    code, text = run("train", "--model", home / "model", "--load-in-4bit", *STEP)
    assert code == 2 and "--load-in-4bit leaves no weight to train: add --lora 16" in text
    loaded = settings("--load-in-4bit", "--lora", "4", "--set", "model_init_kwargs={dtype: bfloat16}")[1]
    assert loaded["model_init_kwargs"] == {"dtype": "bfloat16", "load_in_4bit": True}


# The way in

@pytest.mark.parametrize("module", ["tokpref", "tokpref.cli"])
def test_the_package_is_a_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()[0]) == (0, "tokpref"), done.stderr


def test_only_the_first_process_speaks(run, home, monkeypatch):
    train = "train", "--model", home / "model", "--eval-split", "train", "--output", home / "out", *STEP
    assert "saved to" in run(*train)[1]
    monkeypatch.setenv("RANK", "1")
    assert run(*train) == (0, "")
    assert run(*train, "--beta", "-1") == (2, "")
    broken = "--set", "learning_rate=1e30", "--set", "max_grad_norm=0.0", "--set", "max_steps=3"
    code, text = run("train", "--model", home / "model", "--output", home / "out", *STEP, *broken)
    assert code == 1 and text.startswith("tokpref, process 1: the loss is not finite") and text.count("\n") == 1


# Evaluate and data

def test_evaluation_computes_in_the_precision_that_is_asked_for(run, home, monkeypatch):
    "Where there is no GPU only float32 is to be had; under autocast, as on a card, the numbers are near."
    given = ["evaluate", "--model", str(home / "adapter"), "--split", "train", "--json", str(home / "precise.json")]
    code, text = run(*given, "--precision", "bfloat16")
    assert code == 2 and "needs a GPU" in text
    assert run(*given)[0] == 0
    precise = json.loads((home / "precise.json").read_text())
    seen = []

    def metrics(*args, **kwargs):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return precise

    monkeypatch.setattr("tokpref.evaluation.preference_metrics", metrics)
    monkeypatch.setattr("tokpref.precision.pick_precision", lambda name: Precision(torch.bfloat16, "bf16"))
    monkeypatch.setattr("tokpref.precision.autocast", lambda mixed: torch.autocast("cpu", torch.bfloat16))
    assert run(*given, "--precision", "auto")[0] == 0 and seen == [torch.bfloat16]


def test_adpo_is_evaluated(run, home):
    given = "evaluate", "--model", home / "adapter", "--split", "train", "--loss", "adpo"
    code, text = run(*given)
    assert code == 2 and "--loss-options '{window: 4}'" in text
    losses = []
    for window in (1, 4):
        assert run(*given, "--loss-options", f"{{window: {window}}}", "--json", home / "numbers.json")[0] == 0
        losses.append(json.loads((home / "numbers.json").read_text())["loss"])
    assert losses[0] != losses[1]
    for wrong in ("4", "window"):
        code, text = run(*given, "--loss-options", wrong)
        assert code == 2 and "--loss-options takes" in text


@pytest.mark.parametrize("loss, beta", [("dpo", 0.1), ("sft", 1.0), ("sft+simpo", 2.0), ("dpo_norm+dpo", 5.0)])
def test_every_loss_is_evaluated_also_one_without_beta(run, home, loss, beta):
    "Rewards of whole responses have the beta of the loss, of a sum that of its first term with one."
    numbers = home / "numbers.json"
    given = "evaluate", "--model", home / "adapter", "--split", "train", "--json", numbers, "--loss"
    code, text = run(*given, loss)
    assert code == 0, text
    found = json.loads(numbers.read_text())["implicit/margins"]
    assert run(*given, "dpo", "--beta", 1)[0] == 0
    assert found == pytest.approx(beta * json.loads(numbers.read_text())["implicit/margins"], rel=1e-5)


def test_tbpo_q_is_evaluated_with_its_head(run, home):
    more = "--set", "baseline_learning_rate=1.0", *STEP, "--set", "max_steps=3"
    assert run("train", "--model", home / "model", "--loss", "tbpo_q", "--output", home / "out", *more)[0] == 0
    code, text = run(
        "evaluate", "--model", home / "out", "--ref", home / "model", "--split", "train", "--loss", "tbpo_q"
    )
    assert code == 0, text
    head = training.load_baseline_head(home / "out")
    assert head.layers[-1].weight.abs().max() > 0
    code, text = run(
        "evaluate", "--model", home / "model", "--ref", home / "model", "--split", "train", "--loss", "tbpo_q"
    )
    assert code == 2 and "model holds no baseline_head.safetensors" in text


def test_data_and_evaluate_cut_as_the_trainer_does(run, home):
    code, text = run("data", "--tokenizer", home / "model", "--max-prompt-length", 5)
    assert code == 0 and "prompt: 5 tokens" in text
    for limit in ("5", "2000"):
        code, text = run("evaluate", "--model", home / "adapter", "--split", "train", "--max-prompt-length", limit)
        assert (code == 0) == (limit == "5"), text
    assert (
        "truncated prompt"
        in run("evaluate", "--model", home / "adapter", "--split", "train", "--max-prompt-length", "5")[1]
    )


def test_the_data_options_reach_the_data(run, home, monkeypatch):
    seen = []
    def load(source, *rest):
        seen.append((source, *rest))
        raise ValueError("seen")
    monkeypatch.setattr("tokpref.data.load_preferences", load)
    options = "--config-name", "c", "--data-dir", "d", "--as-messages"
    for command in (
        ("data", "--tokenizer", home / "model"),
        ("evaluate", "--model", home / "adapter"),
        ("train", "--model", home / "model"),
    ):
        run(*command, *options, "--split", "train[:5]")
        assert seen.pop()[1:] == ("train[:5]", "c", "d", True)


def test_held_out_pairs_of_another_source_have_a_layout_of_their_own(run, home, monkeypatch):
    seen = []
    monkeypatch.setattr("tokpref.data.load_preferences", lambda source, *rest: seen.append(rest) or PAIRS)
    for more, layout in (((), ("c", "d", True)), (("--eval-data", "other"), (None, None, True))):
        assert (
            run(
                "train",
                "--model",
                home / "model",
                "--config-name",
                "c",
                "--data-dir",
                "d",
                "--as-messages",
                "--eval-split",
                "test",
                *more,
                "--output",
                home / "out",
                *STEP,
            )[0]
            == 0
        )
        assert seen == [("train", "c", "d", True), ("test", *layout)]
        seen.clear()


def test_arguments_of_the_chat_template(run, home, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ header }}{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ header }}{% endif %}"
    )
    tokenizer.save_pretrained(home / "model")
    code, text = run("data", "--tokenizer", home / "model", "--as-messages", "--chat-template-kwargs", "{header: '0:'}")
    assert code == 0 and "s|0|:" in text, text
