"""Comparisons end to end: they continue where they stopped, mix nothing, name their makers, measure what they claim."""

import copy
import functools
import importlib
import json
import linecache
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tokpref.data import PreferenceCollator
from tokpref.evaluation import estimate, preference_metrics, sample, sample_kl
from tokpref.experiments import letters, reviews
from tokpref.experiments.compare import (
    BASELINES,
    TASKS,
    VARIANTS,
    LossRun,
    Preparation,
    RunConfig,
    Stage,
    baselines,
    compare,
    comparison_figure,
    comparison_table,
    equal_kl_figure,
    figures,
    find_task,
    held_out_metrics,
    paired_difference,
    read_profiles,
    resolve_losses,
    sources,
    summarise,
    table,
    train,
)
from tokpref.experiments.compare import run as harness
from tokpref.experiments.compare.baselines import sft_examples
from tokpref.experiments.compare.record import weights_digest
from tokpref.experiments.compare.resolve import swept
from tokpref.experiments.tasks import toy
from tokpref.losses import LOSSES, LossSpec
from tokpref.models import load_model, load_tokenizer

QUICK = {"steps": 3, "eval_steps": 2, "pretrain_steps": 10, "pairs": 64, "eval_pairs": 16, "letters": 3}


def run_toy(out, losses=("dpo", "tdpo2"), **options):
    return compare("toy", "smoke", losses=list(losses), out=out, overrides={**QUICK, **options}, progress=False)


def test_every_label_and_profile_is_sound():
    for name in ("toy", "sentiment"):
        for profile in find_task(name).profiles:
            _, config = find_task(name).configure(profile)
            runs = resolve_losses(None, config, find_task(name).variants)
            labels = [part for label in config.losses for part in (swept(config) if label == "sweep" else [label])]
            assert set(runs) == set(labels)
            for run in runs.values():
                if run.loss in LOSSES: assert run.beta > 0
                else: assert run.loss in BASELINES
                assert run.learning_rate > 0
            assert config.steps % config.eval_steps == 0
    assert {run.loss for run in VARIANTS.values()} >= {
        "dpo",
        "ipo",
        "simpo",
        "adpo",
        "tdpo1",
        "tdpo2",
        "bpo",
        "tbpo_q",
        "tbpo_a",
    }


def test_the_first_profile_of_the_toy_is_the_demo():
    assert find_task("toy").configure()[0] == "demo" and find_task("sentiment").configure()[0] == "nano"


def test_record_is_complete_and_private(tmp_path):
    record = run_toy(tmp_path, seeds=(0, 1), losses=("dpo",))
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(record))
    assert set(record) == {
        "task",
        "profile",
        "description",
        "config",
        "seeds",
        "models",
        "data",
        "versions",
        "hardware",
        "wall_seconds",
        "problem",
        "start",
        "answers",
        "value",
        "optimum",
        "runs",
    }
    assert {"torch", "transformers", "tokpref", "python"} <= set(record["versions"]) and {
        "cpu",
        "gpu",
        "threads",
    } <= set(record["hardware"])
    for run in record["runs"]:
        assert [point["step"] for point in run["history"]] == [0, 2, 3]
        assert {"reward", "kl", "accuracy", "kl_chosen", "kl_rejected"} <= set(run["metrics"]) and run["seconds"] > 0
        assert run["beta"] == record["config"]["beta"] and run["options"] == {}
    text = (tmp_path / "comparison.json").read_text()
    for private in (socket.gethostname(), str(tmp_path), str(Path.home()) + os.sep): assert private not in text


def test_a_stopped_comparison_continues(tmp_path, monkeypatch):
    real, calls = harness.train_one, []

    def stops_at_the_second(*args, **kwargs):
        calls.append(args[3].loss)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(harness, "train_one", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt): run_toy(tmp_path)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1 and not list(tmp_path.glob("scratch*"))
    record = run_toy(tmp_path)
    assert calls == ["dpo", "tdpo2", "tdpo2"] and [run["label"] for run in record["runs"]] == ["dpo", "tdpo2"]


def test_changed_settings_are_never_mixed(tmp_path, monkeypatch):
    first = run_toy(tmp_path, ["dpo"])
    changed = run_toy(tmp_path, ["dpo"], learning_rate=1e-4)
    harder = run_toy(tmp_path, ["dpo"], void_reward=-9.0)
    assert len({run["runs"][0]["metrics"]["reward"] for run in (first, changed, harder)}) == 3
    monkeypatch.setattr(harness, "train_one", None)     # from here on nothing may be trained
    assert run_toy(tmp_path, ["dpo"])["runs"] == first["runs"]


def own_loss(folder, factor):
    "A module with a loss, written and imported (anew)."
    (folder / "loss_of_this_test.py").write_text("from tokpref import PairLoss, dpo_loss\n\n\n"
        "def loss(chosen, rejected, beta=0.1):\n    out = dpo_loss(chosen, rejected, beta)\n"
        f"    return PairLoss({factor} * out.losses, out.chosen_rewards, out.rejected_rewards)\n")
    sys.modules.pop("loss_of_this_test", None)
    importlib.invalidate_caches()
    linecache.clearcache()
    return LossSpec(importlib.import_module("loss_of_this_test").loss, "this test")


def test_an_edited_loss_is_trained_anew_and_the_others_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    real, calls = harness.train_one, []

    @functools.wraps(real)
    def counted(*args, **kwargs):
        label: Any = args[3]
        calls.append(label.loss)
        return real(*args, **kwargs)

    monkeypatch.setattr(harness, "train_one", counted)
    run = lambda **more: compare(
        "toy", "smoke", losses=["dpo", "mine"], out=tmp_path / "runs", overrides={**QUICK, "max_grad_norm": 0.0}, **more
    )
    records = []
    for factor in (1.0, 1.0, 5.0):
        monkeypatch.setitem(LOSSES, "mine", own_loss(tmp_path, factor))
        records.append(run(progress=False))
    assert (
        calls == ["dpo", "mine", "mine"]
        and records[0]["runs"] == records[1]["runs"]
        and records[2]["runs"][0] == records[0]["runs"][0]
    )
    assert records[2]["runs"][1]["metrics"] != records[0]["runs"][1]["metrics"]
    run(progress=True)
    assert "2 of 2 runs read from" in capsys.readouterr().err
    monkeypatch.setattr(sources, "versions", lambda: {"tokpref": "another"})
    run(progress=False)
    assert calls == ["dpo", "mine", "mine", "dpo", "mine"]


def modules_of(name):
    "The modules behind a run of the toy with that loss."
    spec = LOSSES[name]
    functions = (train.train_one, train.train_with_loss, find_task("toy").prepare, spec.fn)
    return set(sources.modules_behind([function.__module__ for function in functions], sources.package_root()))


def test_what_a_run_is_made_of():
    "Of the losses only its own; trainer, engine and data; the task; nothing that draws or prints."
    shared = {
        f"tokpref.{name}"
        for name in (
            "losses.types",
            "losses.dpo",
            "training.trainer",
            "engine.one_pass",
            "engine.stats",
            "models",
            "experiments.compare.train",
            "experiments.compare.measure",
            "experiments.tasks.toy",
        )
    }
    assert shared <= modules_of("dpo") and any(name.startswith("tokpref.data.") for name in modules_of("dpo"))
    assert not [
        name for name in modules_of("dpo") if name.startswith(("tokpref.plots", "tokpref.cli", "tokpref.losses.adpo"))
    ]
    assert "tokpref.losses.tdpo" not in modules_of("dpo") and "tokpref.losses.tdpo" in modules_of("tdpo2")
    dpo, behind = LOSSES["dpo"].fn, sources.code_behind
    assert behind(dpo) == behind(functools.partial(dpo, beta=2.0)) != behind(LOSSES["tdpo2"].fn) and behind(
        dpo, find_task("toy").prepare
    ) != behind(dpo)


def test_the_judges_are_part_of_what_they_judge():
    modules = sources.modules_behind([find_task("instructions").prepare.__module__], sources.package_root())
    assert any("judge" in name for name in modules)


@pytest.fixture(scope="module")
def copied_package(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy") / "tokpref"
    shutil.copytree(sources.package_root(), root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_any_file_behind_a_run_makes_it_anew(copied_package, monkeypatch):
    "Each file that is followed counts, in a copy of the package; comments, docstrings and what draws do not."
    functions = (train.train_one, find_task("instructions").prepare, LOSSES["dpo"].fn)
    code = lambda: sources.code_behind(*functions, root=copied_package)
    before = code()
    modules = sources.modules_behind([function.__module__ for function in functions], copied_package)
    assert len(modules) > 15
    # no edit below changes an import: what is followed is the same each time, and is found once
    monkeypatch.setattr(sources, "modules_behind", lambda *args: modules)
    same = sources.versions()
    monkeypatch.setattr(sources, "versions", lambda: same)
    assert code() == before
    for module in modules:
        file = sources.module_file(module, copied_package)
        text = file.read_text(encoding="utf-8")
        file.write_text(text + "\n_edited = 1\n", encoding="utf-8")
        assert code() != before, module
        file.write_text(text + "\n# a comment\n", encoding="utf-8")
        assert code() == before, module
        file.write_text(text, encoding="utf-8")
    for name in ("tokpref.plots.comparison", "tokpref.experiments.compare.table", "tokpref.losses.adpo"):
        file = sources.module_file(name, copied_package)
        file.write_text(file.read_text(encoding="utf-8") + "\n_edited = 1\n", encoding="utf-8")
        assert code() == before, name


def test_a_module_that_was_split_counts_too(copied_package):
    "Code that moves into a new file is followed there."
    behind = lambda: sources.modules_behind(["tokpref.losses.dpo"], copied_package)
    file = sources.module_file("tokpref.losses.dpo", copied_package)
    (copied_package / "losses" / "halves").mkdir()
    (copied_package / "losses" / "halves" / "__init__.py").write_text("from .inner import half as one_half\n")
    (copied_package / "losses" / "halves" / "inner.py").write_text("def half(x): return x / 2\n")
    file.write_text(
        file.read_text(encoding="utf-8") + "\n\ndef late():\n    from .halves import one_half\n    return one_half\n"
    )
    assert "tokpref.losses.halves.inner" in behind() or "tokpref.losses.halves" in behind()


EDITED = """
import sys
from pathlib import Path
from tokpref.experiments.compare import compare
root, out = Path(sys.argv[1]), Path(sys.argv[2])
kept = []
for name in ("", "experiments/compare/table.py", "engine/stats.py"):
    if name:
        file = root / name
        file.write_text(file.read_text() + "\\n_edited = 1\\n")
    compare("toy", "smoke", "dpo", out=out, progress=False,
            overrides={"steps": 2, "eval_steps": 2, "pretrain_steps": 5, "pairs": 64, "eval_pairs": 16, "letters": 3})
    kept.append(len(list((out / "runs").glob("*.json"))))
print(kept)
"""


def test_an_edited_package_repeats_the_run(copied_package, tmp_path):
    "End to end, in a process that imports the copy: an edit of the table is no new run, one of the engine is."
    done = subprocess.run(
        [sys.executable, "-c", EDITED, str(copied_package), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(copied_package.parent)},
    )
    assert done.stdout.strip() == "[1, 1, 2]", done.stderr


def test_same_seed_same_numbers(tmp_path):
    a, b = (run_toy(tmp_path / name, ["tbpo_q"]) for name in "ab")
    assert a["runs"][0]["history"] == b["runs"][0]["history"]


def test_a_broken_run_is_reported_and_not_kept(tmp_path):
    losses = {"dpo": LossRun("dpo"), "wild": LossRun("dpo", learning_rate=1e30)}
    record = compare("toy", "smoke", losses=losses, out=tmp_path, overrides=QUICK, progress=False)
    assert "error" not in record["runs"][0] and "not finite" in record["runs"][1]["error"]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1
    assert "wild: the loss is not finite" in comparison_table(record)
    assert comparison_figure(record).axes


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: compare("toys"), "did you mean 'toy'"),
        (lambda: compare("toy", "smok"), "did you mean 'smoke'"),
        (lambda: compare("toy", losses=["tdpo3"]), "did you mean 'tdpo"),
        (lambda: compare("toy", losses={"x": ("dpo", {"window": 2})}), "'window' is not used"),
        (lambda: compare("toy", overrides={"stpes": 3}), "did you mean 'steps'"),
        (lambda: compare("toy", losses=["tdpo2:alpha=-1"]), "'tdpo2:alpha=-1': alpha must be"),
        (lambda: compare("toy", losses=["dpo:beta=-1"]), "beta must be a positive number"),
        (lambda: compare("toy", losses=["dpo:learning_rate=0"]), "learning_rate must be a positive number"),
        (lambda: compare("toy", losses=["adpo:segments=0"]), "segments must be"),
        (lambda: compare("toy", losses={"x": LossRun("bpo", {"generator": "nonsense"})}), "'x': "),
        (lambda: compare("toy", losses=[]), "losses is empty"),
        (
            lambda: compare("toy", losses=["dpo-fkl:label_smoothing=0.1"]),
            "write 'dpo:f_divergence=forward_kl,label_smoothing=0.1'",
        ),
        (lambda: compare("toy", seeds=[]), "seeds is empty"),
        (lambda: compare("toy", seeds=[0, 0]), "name one twice"),
        (lambda: compare("toy", losses=["ppo:samples=3"]), "choose a divisor"),
        (lambda: compare("toy", losses=["ppo:uses=0"]), "uses must be a whole number"),
        (lambda: compare("toy", losses=["best-of-0"]), "n must be a whole number"),
        (lambda: compare("toy", losses=["sft:beta=0.3"]), "beta would be ignored"),
        (lambda: compare("toy", overrides={"steps": 0}), "steps must be a whole number of at least 1"),
        (lambda: compare("toy", overrides={"batch_size": 0}), "batch_size must be"),
        (lambda: compare("toy", overrides={"learning_rate": -1e-4}), "learning_rate must be a positive number"),
        (lambda: compare("toy", overrides={"optimizer": "rmspop"}), "did you mean 'rmsprop'"),
        (lambda: compare("toy", overrides={"schedule": "lineer"}), "did you mean 'linear'"),
        (lambda: compare("toy", overrides={"schedule": "cosine_with_min_lr"}), "can't be used"),
        (lambda: compare("toy", overrides={"tuning": {"dpoo": {"beta": 1.0}}}), "did you mean 'dpo'"),
        (lambda: compare("toy", overrides={"tuning": {"dpo": {"beat": 1.0}}}), "did you mean 'beta'"),
    ],
)
def test_slips_are_caught_before_anything_runs(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says): call()
    assert not list(tmp_path.iterdir())


def test_wrong_type_of_a_setting():
    for wrong in ({"steps": "3"}, {"steps": 2.5}, {"steps": True}, {"losses": "dpo"}):
        with pytest.raises(TypeError, match="must be"): find_task("toy").configure(overrides=wrong)
    assert find_task("toy").configure(overrides={"beta": 1, "losses": ["dpo"]})[1].losses == ("dpo",)
    assert find_task("dialogue").configure(overrides={"test_split": None})[1].test_split == ""     # --set test_split=


def test_a_labels_options_replace_those_of_its_variant():
    assert resolve_losses("adpo:segments=2", RunConfig())["adpo:segments=2"].options == {"segments": 2}
    assert resolve_losses("adpo:beta=0.3", RunConfig())["adpo:beta=0.3"].options == {"window": 1}


@pytest.mark.parametrize("label", ["../../x", "a/b", "a\nb", "\x1b[2J", "a\0b", "x" * 300, "\ud800"])
def test_a_label_is_no_path(label, tmp_path):
    shared = train.SharedStart(find_task("toy"), find_task("toy").configure("smoke")[1], tmp_path, 0, False)
    path = harness.run_path(shared, label, LossRun("dpo", {}, 0.1, 1e-3), "code")
    assert path.parent == tmp_path / "runs" and len(path.name) < 200 and re.fullmatch(r"[\w.-]+", path.name, re.ASCII)


LABELS = """
from tokpref.experiments.compare import RunConfig, VARIANTS, find_task, resolve_losses
before = dict(VARIANTS)
math = find_task("math")
assert VARIANTS == before
print(resolve_losses("adpo-m128", RunConfig(), math.variants)["adpo-m128"].options)
try: resolve_losses("adpo-m128", RunConfig())
except ValueError as e: print(str(e)[:25])
"""


def test_a_task_brings_its_labels_and_changes_those_of_nobody():
    done = subprocess.run([sys.executable, "-c", LABELS], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["{'segments': 128}", "unknown loss 'adpo-m128';"], done.stderr


def test_no_room_of_the_comparison_imports_in_a_circle():
    root = sources.package_root()
    rooms = [
        f"tokpref.experiments.compare.{path.stem}"
        for path in (root / "experiments" / "compare").glob("*.py")
        if path.stem != "__init__"
    ]
    uses = {}
    for room in rooms:
        text = sources.module_file(room, root).read_text(encoding="utf-8")
        uses[room] = {
            sources.home_of(module, name, root)
            for module, name, _ in sources.imports_of(text, room, False)
            if module.startswith("tokpref")
        } & set(rooms)
    order = []
    while free := [room for room in uses if room not in order and uses[room] <= set(order)]: order += free
    assert sorted(order) == sorted(rooms)


def test_tiny_models_compute_with_one_thread(tmp_path, monkeypatch):
    "While the start is made and while the runs are trained; afterwards as many threads as before."
    seen, task, before = [], find_task("toy"), torch.get_num_threads()
    watched = replace(task, prepare=lambda *args: seen.append(torch.get_num_threads()) or task.prepare(*args))
    monkeypatch.setitem(TASKS, "toy", watched)
    real = harness.train_one
    counted = lambda *args, **kwargs: seen.append(torch.get_num_threads()) or real(*args, **kwargs)
    monkeypatch.setattr(harness, "train_one", counted)
    torch.set_num_threads(2)
    try:
        record = run_toy(tmp_path, ["dpo"])
        assert seen == [1, 1] and record["hardware"]["threads"] == 1 and torch.get_num_threads() == 2
        with train.threads_for(10**9) as threads: assert threads == 2
    finally: torch.set_num_threads(before)


def test_profiles_are_read_with_every_name_and_type_checked(tmp_path):
    file = tmp_path / "toy.toml"
    def read(text):
        file.write_text(text, encoding="utf-8")
        return read_profiles(file, toy.ToyConfig)

    profiles = read(
        "[demo]\nletters = 4\noptimum_betas = [1, 0.5]\nsweep.dpo.beta = [0.1, 0.3]\n\n"
        '[smoke]\nlike = "demo"\nsteps = 3\n'
    )
    assert profiles["smoke"] == toy.ToyConfig(
        letters=4, optimum_betas=(1.0, 0.5), sweep={"dpo": {"beta": [0.1, 0.3]}}, steps=3
    )
    for text, kind, says in (
        ("[a]\nleters = 3", ValueError, "toy.toml, profile 'a': no setting 'leters'; did you mean 'letters'"),
        ("[a]\nletters = 3.5", TypeError, "must be int"),
        ("[a]\noptimum_betas = ['x']", TypeError, "must be tuple"),
        ("[a]\nsteps = 0", ValueError, "steps must be"),
        ("[a]\nlike = 'b'", ValueError, "no such profile"),
        ("[a]\nlike = 'b'\n[b]\nlike = 'a'", ValueError, "leads back"),
        ("", ValueError, "holds no profile"),
        ("letters = 3", ValueError, "outside a profile"),
    ):
        with pytest.raises(kind, match=says): read(text)
    file.write_text("[a]\nletters = 3", encoding="utf-8")
    with pytest.raises(ValueError, match="does not say which"): read_profiles(file, {"b": toy.ToyConfig})


def test_a_stage_is_known_by_what_it_reads_and_can_read_nothing_else(tmp_path):
    made = []
    def make(work):
        made.append(work.config.letters)
        (work.folder / "x").write_text(str(work.config.letters))
        return "made"
    stage = Stage("letters", ("letters",), make, lambda work: (work.folder / "x").read_text())
    get = lambda **changes: Preparation([stage], toy.ToyConfig(**changes), tmp_path)["letters"]
    assert [get(), get(steps=3), get(letters=4), get()] == ["5", "5", "4", "5"] and made == [5, 4]
    hungry = Stage("pairs", (), lambda work: work.config.pairs, after=("letters",))
    with pytest.raises(ValueError, match="reads the setting 'pairs' and does not list it"):
        Preparation([stage, hungry], toy.ToyConfig(), tmp_path)["pairs"]
    inherited = Stage("twice", (), lambda work: 2 * work.config.letters, after=("letters",))
    assert Preparation([stage, inherited], toy.ToyConfig(), tmp_path)["twice"] == 10
    with pytest.raises(ValueError, match="not before it"): Preparation([inherited, stage], toy.ToyConfig(), tmp_path)


def test_a_stage_that_was_stopped_is_made_again_by_the_list(tmp_path):
    def stops(work):
        (work.folder / "half").write_text("x")
        raise KeyboardInterrupt
    whole = lambda work: (work.folder / "whole").write_text("y") and "done"
    read = lambda work: [path.name for path in work.folder.iterdir()]
    with pytest.raises(KeyboardInterrupt): Preparation([Stage("a", (), stops, read)], RunConfig(), tmp_path)["a"]
    assert sorted(Preparation([Stage("a", (), whole, read)], RunConfig(), tmp_path)["a"]) == ["whole", "whole.json"]
    assert len(list(tmp_path.iterdir())) == 1


@dataclass(frozen=True)
class NamedConfig(RunConfig):
    "A task that loads a model."

    model: str = ""

    def models(self): return {"model": self.model}


def test_a_stage_that_names_a_model_is_known_by_its_weights(tmp_path):
    "Of the stages that read the name and of those that build on them; one that does not is kept."
    stages = [Stage("a", ("model",), lambda work: None), Stage("b", (), lambda work: None, after=("a",)),
              Stage("c", ("steps",), lambda work: None)]
    config = NamedConfig(model=str(tmp_path))
    place = lambda: [Preparation(stages, config, "out").place(name) for name in "abc"]
    before = place()
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    after = place()
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, True, False]
    (tmp_path / "README.md").write_text("a word on the model")
    assert place() == after


def test_a_digest_sees_the_base_of_an_adapter_and_a_tokenizer(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    seen = [weights_digest(str(adapter))]
    for name in ("model.safetensors", "tokenizer.json"):
        (base / name).write_text("x")
        seen.append(weights_digest(str(adapter)))
    assert len(set(seen)) == 3 and all(len(digest) == 8 for digest in seen)
    assert weights_digest("nobody/nothing") == ""


def test_a_comparison_has_a_record_after_every_run(tmp_path, monkeypatch):
    "So one that is stopped has written what there was, and who asks is told."
    told = []

    def each(record):
        assert json.loads((tmp_path / "comparison.json").read_text())["runs"] == json.loads(json.dumps(record["runs"]))
        told.append([(run["label"], run["seed"]) for run in record["runs"]])

    compare("toy", "smoke", ["dpo", "tdpo2"], seeds=[0, 1], out=tmp_path, overrides=QUICK, progress=False, each=each)
    runs = [("dpo", 0), ("tdpo2", 0), ("dpo", 1), ("tdpo2", 1)]
    assert told == [runs[:n] for n in (1, 2, 3, 4)]


def test_answers_are_kept_with_their_rewards_and_models_where_asked(tmp_path):
    record = run_toy(tmp_path, ["dpo", "best-of-2"], kept_answers=5, save_models=True)
    start, (dpo, best) = record["answers"], record["runs"]
    assert len(start) == len(dpo["answers"]) == 5 and best["answers"] == []
    assert set(dpo["answers"][0]) == {"prompt", "answer", "tokens", "ended", "reward"}
    assert [row["prompt"] for row in start] == [row["prompt"] for row in dpo["answers"]]
    (folder,) = (tmp_path / "models").iterdir()
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in start]
    again = sample(model, tokenizer, prompts, max_new_tokens=max(row["tokens"] for row in dpo["answers"]), batch_size=5,
                   seed=0, progress=False)
    assert [text.split() for text in again.responses] == [row["answer"].split() for row in dpo["answers"]]
    assert run_toy(tmp_path / "none", ["dpo"], kept_answers=0)["runs"][0]["answers"] == []
    assert not (tmp_path / "none" / "models").exists()


def test_table_over_seeds(tmp_path):
    record = run_toy(tmp_path, ["dpo"], seeds=(0, 1))
    rewards = torch.tensor([run["metrics"]["reward"] for run in record["runs"]], dtype=torch.float64)
    (line,) = summarise(record)
    assert (
        line["seeds"] == 2
        and abs(line["reward"] - rewards.mean()) < 1e-12
        and abs(line["reward_sd"] - rewards.std()) < 1e-12
    )
    assert "±" in comparison_table(record)


def test_exact_numbers_of_the_toy_agree_with_sampling(tmp_path):
    "Expected reward and KL by listing all responses equal those by sampling, for a policy that moved."
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    problem = toy.prepare_toy(config, tmp_path, progress=False)
    torch.manual_seed(0)
    moved = letters.toy_policy(problem.tokenizer, config)
    moved.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in problem.policy.state_dict().items()})
    exact = problem.evaluate(moved.eval())
    prompts = letters.all_prompts(config.letters)
    table = letters.outcome_rewards(letters.string_rewards(prompts, config), config.void_reward)
    texts = [
        "".join(chr(97 + c) for c in s)
        for d in range(config.max_letters + 1)
        for s in letters.all_strings(config.letters, d).tolist()
    ]
    place = {text: i for i, text in enumerate(texts)}
    samples = sample(
        moved,
        problem.tokenizer,
        [letters.to_text(p).strip() for p in prompts.tolist()],
        n=400,
        batch_size=600,
        max_new_tokens=config.max_letters + 1,
        progress=False,
    )
    rewards = []
    for i, ids, text in zip(samples.index, samples.response_ids, samples.responses, strict=True):
        response = text.replace(" ", "")
        whole = ids[-1] == problem.tokenizer.eos_token_id and response in place and len(ids) == len(response) + 1
        rewards.append(table[i, place[response]].item() if whole else config.void_reward)
    value, se, _ = estimate(torch.tensor(rewards, dtype=torch.float64))
    assert exact["kl"] > 0.02 and abs(value - exact["reward"]) < 4 * se
    numbers = sample_kl(moved, problem.policy.eval(), samples, batch_size=600, progress=False)["kl"]
    assert (
        numbers.mean() > exact["kl"] - 4 * numbers.std() / len(numbers) ** 0.5
    )  # listing lumps all void responses together


def test_toy_start_is_kept_and_read_again(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    first, second = (toy.prepare_toy(config, tmp_path, progress=False) for _ in range(2))
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True): assert torch.equal(a, b)
    assert len(list(tmp_path.glob("start-*"))) == 1 and first.train[:] == second.train[:]


def test_sentiment_smoke_end_to_end(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKPREF_DATA", raising=False)
    record = compare(
        "sentiment", "smoke", losses=["dpo"], out=tmp_path, overrides={"steps": 4, "eval_steps": 2}, progress=False
    )
    stages = {path.name.split("-")[0]: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()}
    assert set(stages) == {"tokenizer", "model", "classifier", "measure", "pairs"}
    assert record["start"]["kl"] == pytest.approx(0, abs=1e-6) and record["runs"][0]["metrics"]["kl"] > 0
    again = compare(
        "sentiment", "smoke", losses=["dpo"], out=tmp_path, overrides={"steps": 4, "eval_steps": 2}, progress=False
    )
    assert again["runs"] == record["runs"]
    assert {path.name.split("-")[0]: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()} == stages


def test_a_stage_that_stopped_half_way_is_made_again(tmp_path):
    config = find_task("sentiment").configure("smoke")[1]

    def make(work):
        (work.folder / ("whole" if again else "half")).write_text("x")
        if not again: raise KeyboardInterrupt

    stages = [
        Stage("tokenizer", ("vocab_size",), make, lambda work: sorted(path.name for path in work.folder.iterdir()))
    ]
    again = False
    with pytest.raises(KeyboardInterrupt): Preparation(stages, config, tmp_path)["tokenizer"]
    again = True
    preparation = Preparation(stages, config, tmp_path)
    assert preparation["tokenizer"] == ["whole", "whole.json"]
    assert list(tmp_path.iterdir()) == [preparation.place("tokenizer")]


def test_nothing_is_learnt_from_the_test_split(monkeypatch):
    raw = {
        "train": (["Same text.", "Own text.", "Own text."], [1, 0, 0]),
        "unsupervised": (["Same text.", "Third."], [-1, -1]),
        "test": (["Same text.", "Test only."], [1, 0]),
    }
    monkeypatch.setattr(reviews.texts, "_read_split", lambda source, split: raw[split])
    found = reviews.load_reviews("imdb")
    assert (
        found.train == ["Own text."] and found.labels == [0] and found.unlabelled == ["Third."] and found.repeated == 3
    )
    assert found.test == ["Same text.", "Test only."]


def test_missing_reviews_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKPREF_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="set TOKPREF_DATA.*profile smoke") as error:
        reviews.load_reviews("nobody/imdb")
    assert len(str(error.value).splitlines()) == 1


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(
        TASKS,
        "mine",
        replace(find_task("toy"), name="mine", profiles={"only": replace(find_task("toy").profiles["smoke"], **QUICK)}),
    )
    assert compare("mine", losses="dpo", out=tmp_path, progress=False)["profile"] == "only"
    assert isinstance(find_task("mine").profiles["only"], RunConfig)


# Labels, seeds, baselines

@pytest.mark.parametrize(
    "label, says",
    [
        ("tdpo2:alfa=0.1", "did you mean 'alpha'"),
        ("dpo:beta", "must be name=value"),
        ("ppo:clips=1", "did you mean 'clip'"),
        ("sft:n=2", "'n' is not used"),
        ("best-of-x", "unknown loss"),
    ],
)
def test_a_label_with_a_slip_is_refused(label, says):
    with pytest.raises(ValueError, match=says): resolve_losses(label, RunConfig())


def test_a_sweep_is_a_list_of_labels_and_tuning_reaches_them():
    config = RunConfig(
        sweep={"dpo": {"beta": (0.3, 1)}, "bpo": {"generator": ("kliep",)}}, tuning={"dpo": {"learning_rate": 5e-4}}
    )
    runs = resolve_losses(["tdpo2", "sweep"], config)
    assert list(runs) == ["tdpo2", "dpo:beta=0.3", "dpo:beta=1", "bpo:generator=kliep"]
    tuned = replace(config, tuning={"dpo": {"beta": 0.7, "learning_rate": 5e-4}})
    assert resolve_losses(["dpo:beta=0.3", "dpo"], tuned)["dpo:beta=0.3"].beta == 0.3, "a label goes before tuning"
    assert runs["dpo:beta=0.3"] == LossRun("dpo", {}, 0.3, 5e-4) and runs["bpo:generator=kliep"].options == {
        "generator": "kliep"
    }


def test_a_seed_draws_other_pairs_from_the_same_start(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKPREF_DATA", raising=False)
    task = find_task("sentiment")
    config = replace(
        task.profiles["smoke"],
        train_prompts=6,
        eval_prompts=4,
        eval_pair_prompts=4,
        frontier_prompts=2,
        frontier_samples=16,
        lm_tokens=20_000,
    )
    a, b, again = (task.prepare(config, tmp_path, False, seed) for seed in (0, 1, 0))
    assert (
        a.train["chosen_ids"] == again.train["chosen_ids"] != b.train["chosen_ids"]
        and a.eval[:] == b.eval[:]
        and a.prompts == b.prompts
    )
    assert all(torch.equal(x, y) for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True))
    assert len(list(tmp_path.glob("pairs-*"))) == 2 and len(list(tmp_path.iterdir())) == 6


def made_up_record(height):
    "Three losses and three seeds on straight paths; the optimum rises to `height` above the start."
    def run(label, seed, slope, end):
        history = [{"step": i, "kl": kl, "reward": 0.5 + slope * kl} for i, kl in enumerate((0.0, end / 2, end))]
        return {"label": label, "seed": seed, "history": history, "metrics": history[-1], "seconds": 1, "peak_mb": 1}
    runs = [run("dpo", seed, 0.05 + 0.01 * seed, 2.0) for seed in range(3)]
    runs += [run("ipo", seed, 0.08 + 0.01 * seed, end) for seed, end in enumerate((1.0, 1.2, 0.4))]
    runs += [run("simpo", seed, 0.005, 2.2) for seed in range(3)]
    optimum = [[kl, 0.5 + height * (kl / 2) ** 0.5] for kl in (0.1, 0.5, 1.0, 2.0, 4.0)]
    return {"task": "made-up", "profile": "none", "description": "paths", "runs": runs, "optimum": optimum,
            "start": {"reward": 0.5, "kl": 0.0}, "value": "reward", "seeds": [0, 1, 2]}


def test_a_far_optimum_stands_apart_and_covers_nothing():
    for height, apart in ((0.05, False), (2.0, True)):
        figure = comparison_figure(made_up_record(height), metric="reward")
        axes = figure.axes[0]
        assert bool(axes.child_axes) == apart and axes.get_ylim()[1] < 1.0
    figure.canvas.draw()
    (inset,) = axes.child_axes
    paths = [line for line in axes.get_lines() if line.get_label() in ("dpo", "ipo", "simpo")]
    points = [axes.transData.transform(point) for line in paths for point in zip(*line.get_data(), strict=True)]
    assert len(paths) == 3 and not any(inset.get_window_extent().contains(*point) for point in points)
    assert max(max(line.get_ydata()) for line in inset.get_lines()) > 2


def test_gains_are_read_at_one_kl_with_their_interval():
    "By hand: at KL 0.5 ipo is 0.03 x 0.5 above dpo with the two seeds that get there, so the interval has no width."
    record = made_up_record(0.2)
    bars = equal_kl_figure(record, 0.5).axes[1]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["ipo", "simpo"]
    assert bars.patches[0].get_width() == pytest.approx(0.015)
    assert "reward minus dpo's at KL 0.5" in bars.get_xlabel()
    gain, half = paired_difference(record, "ipo", "dpo", 0.3)
    drawn = equal_kl_figure(record, 0.3, against="ipo").axes[1]
    assert drawn.patches[0].get_width() == pytest.approx(-gain) and half == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="choose a smaller KL"): equal_kl_figure(record, 2.5)
    with pytest.raises(ValueError, match="no finished run is called 'ppo'"): equal_kl_figure(record, 0.5, against="ppo")


def test_all_seeds_share_the_labels_of_a_figure(tmp_path):
    record = run_toy(tmp_path, ["dpo", "dpo:beta=2.0", "best-of-2"], seeds=(0, 1))
    kl = 0.5 * min(run["history"][1]["kl"] for run in record["runs"] if run["label"] == "dpo")
    band = table.path_band(record, "dpo", [0.0, kl])
    assert band["low"][1] <= band["mean"][1] <= band["high"][1] and band["mean"][0] == pytest.approx(
        record["start"]["reward"]
    )
    assert {line.get_label() for line in comparison_figure(record).axes[0].get_lines()} >= {
        "dpo",
        "dpo:beta=2.0",
        "best-of-2",
    }
    assert (
        len(comparison_figure(record, labels=["dpo"]).axes[1].patches) == 1
        and len(figures.history_figure(record, ["dpo"]).axes) == 3
    )


def test_held_out_numbers_are_those_of_the_evaluation_page(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    shared = train.SharedStart(find_task("toy"), config, tmp_path, 0, False)
    torch.manual_seed(0)
    moved = copy.deepcopy(shared.problem.policy)
    for p in moved.parameters(): p.data += 0.05 * torch.randn_like(p)
    ours = held_out_metrics(moved, shared.reference, shared.problem, batch_size=5)
    theirs = preference_metrics(moved, shared.reference, shared.problem.eval, PreferenceCollator(0), progress=False)
    for mine, name in (("accuracy", "implicit/accuracies"), ("kl_chosen", "kl/chosen"), ("kl_rejected", "kl/rejected")):
        assert ours[mine] == pytest.approx(theirs[name], rel=1e-4)


def test_measuring_leaves_the_training_as_it_was():
    "Random numbers, the model's mode, and all else: a run that is watched is the run that is not."
    def evaluate(model):
        assert not model.training and torch.rand(3).shape == (3,)
        return {"reward": 1.0, "kl": 0.0}
    follow, model, state = train.PathCallback(evaluate, 2, {}), torch.nn.Linear(2, 2), SimpleNamespace(global_step=0)
    before = torch.get_rng_state()
    for state.global_step in (1, 2, 3): follow.on_step_end(None, state, None, model=model)
    follow.on_train_end(None, state, None, model=model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert [point["step"] for point in follow.history] == [0, 2, 3]


def test_a_run_has_its_seed_and_leaves_the_start_to_the_others(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **{**QUICK, "steps": 2, "pretrain_steps": 1, "pairs": 16})
    shared = train.SharedStart(find_task("toy"), config, tmp_path, 0, False)
    before = {name: weight.clone() for name, weight in shared.problem.policy.state_dict().items()}
    run = LossRun("dpo", {}, 0.1, 1e-2)
    assert train.run_arguments(config, run, 7, tmp_path, {}).seed == 7
    path = train.PathCallback(lambda model: {"reward": 0.0, "kl": 0.0}, 1, {})
    trained, _ = train.train_with_loss(shared.problem, shared.reference, config, run, 0, tmp_path, path)
    after = shared.problem.policy.state_dict()
    for name, weight in before.items(): torch.testing.assert_close(after[name], weight, rtol=0, atol=0)
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())


def test_policy_and_reference_are_measured_in_the_arithmetic_of_the_training(tmp_path):
    "A trained model computes under autocast unasked; next to a reference that does not, a KL would be rounding."
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    shared, seen = train.SharedStart(find_task("toy"), config, tmp_path, 0, False), []
    reward = lambda model: (
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        or {"reward": 0.0, "kl": 0.0}
    )
    for mixed, kind in ((None, None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        shared.__dict__["problem"] = replace(shared.problem, evaluate=reward, arguments={mixed: True} if mixed else {})
        shared.__dict__.pop("start", None)
        assert (
            shared.start["kl_chosen"] == 0.0
            and train.measure(shared.reference, shared.reference, shared.problem)["kl_chosen"] == 0.0
        )
        assert seen[-2:] == [kind, kind]


def test_a_policy_that_did_not_move_has_no_kl_in_mixed_precision(tmp_path, monkeypatch):
    "Trained under autocast at no learning rate: every pair is a tie, and the SeqKLs are zero and not rounding."
    task = find_task("toy")
    mixed = replace(task, prepare=lambda *args: replace(task.prepare(*args), arguments={"bf16": True, "use_cpu": True}))
    monkeypatch.setitem(TASKS, "toy", mixed)
    record = compare(
        "toy", "smoke", {"still": LossRun("dpo", learning_rate=1e-30)}, out=tmp_path, overrides=QUICK, progress=False
    )
    assert all(
        point.get(name, 0.0) == 0.0
        for point in record["runs"][0]["history"]
        for name in ("accuracy", "kl_chosen", "kl_rejected")
    )


def test_an_adapter_needs_no_second_model(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    shared = train.SharedStart(find_task("toy"), config, tmp_path, 0, False)
    shared.__dict__["problem"] = replace(shared.problem, adapter=object())
    assert (
        shared.reference is shared.problem.policy and not shared.reference.training and abs(shared.start["kl"]) < 1e-9
    )


def test_the_interval_of_many_seeds_is_students(tmp_path):
    "Eleven seeds: 2.23 standard errors, not 2."
    path = lambda end: [{"kl": 0.0, "reward": 0.0}, {"kl": 1.0, "reward": end}]
    runs = [
        {"label": label, "seed": seed, "history": path(seed * (label == "tdpo2"))}
        for label in ("dpo", "tdpo2")
        for seed in range(11)
    ]
    gain, width = table.paired_difference({"runs": runs}, "tdpo2", "dpo", 1.0)
    assert gain == 5 and width == pytest.approx(
        2.228 * 1.0, rel=2e-3
    )  # a standard error of 1: the variance of 0..10 is 11
    three = {"runs": [run for run in runs if run["seed"] < 3]}      # Student's number for two degrees of freedom
    assert table.paired_difference(three, "tdpo2", "dpo", 1.0) == pytest.approx((1, 4.303 / 3**0.5), rel=1e-3)


def test_a_share_of_the_optimum_counts_the_gain_from_the_start():
    "Half of what can be gained at a KL of 0.5, where the best is half-way between its points."
    run = {"label": "dpo", "seed": 0, "seconds": 1.0, "peak_mb": None, "history": []}
    record = {"start": {"reward": -2.0, "kl": 0.0}, "optimum": [[1.0, 2.0]],
              "runs": [{**run, "metrics": {"reward": -1.0, "kl": 0.5}}]}
    (line,) = summarise(record)
    assert line["share"] == pytest.approx(0.5)
    assert summarise({**record, "optimum": [[0.1, 2.0]]})[0]["share"] is None, "it is known to no such KL"


def test_policy_gradient_raises_the_exact_reward(tmp_path):
    "Given the reward, it climbs; with a heavy KL in the reward it stays; it uses a batch of samples as often as asked."
    overrides = {**QUICK, "letters": 4, "pretrain_steps": 60, "steps": 20, "eval_steps": 20}
    record = compare("toy", "smoke", ["ppo:beta=0.3", "ppo:beta=50"], out=tmp_path, overrides=overrides, progress=False)
    free, held = (run["metrics"] for run in record["runs"])
    assert free["reward"] > record["start"]["reward"] + 0.3 and held["kl"] < 0.2 * free["kl"]


def test_the_gain_of_a_policy_gradient_is_clipped_to_the_smaller():
    "By hand, clip 0.2: ratios 1.5, 0.5 and 1.1 of an answer that gained 2, and of one that lost 1 in two tokens."
    ratios = torch.tensor([[1.5, 0.5, 1.1]] * 2).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss = baselines.clipped_loss(ratios, torch.zeros(2, 3), mask, torch.tensor([2.0, -1.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor(-((2.4 + 1.0 + 2.2) + (-1.5 - 0.8)) / 2))


def test_gradient_of_fresh_samples_is_reinforce(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    shared = train.SharedStart(find_task("toy"), config, tmp_path, 0, False)
    trainer = ppo_trainer(shared, config, tmp_path, samples=4, uses=2)
    loss = trainer.compute_loss(trainer.model, {"prompt_ids": [list(p) for p in shared.problem.prompts[:3]]})
    loss.backward()
    rollout = trainer.rollouts[0]
    plain = copy.deepcopy(shared.problem.policy)
    stats = baselines.response_stats(plain, shared.reference, rollout["batch"])
    returns = (rollout["rewards"] - 0.3 * stats.log_ratio.sum(-1).detach()).view(3, 4)
    others = torch.stack([(returns.sum(1) - returns[:, j]) / 3 for j in range(4)], 1)
    (-(returns - others).flatten() * stats.logps.sum(-1)).mean().backward()
    for a, b in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    before = rollout["batch"]["input_ids"]
    trainer.compute_loss(trainer.model, {"prompt_ids": [[1, 2]]})
    assert trainer.rollouts[0]["batch"]["input_ids"] is before and trainer.calls == 2
    trainer.compute_loss(trainer.model, {"prompt_ids": [list(p) for p in shared.problem.prompts[:3]]})
    assert trainer.rollouts[0]["batch"]["input_ids"] is not before


def ppo_trainer(shared, config, folder, **options):
    arguments = train.run_arguments(config, LossRun("dpo", {}, 0.3, 1e-3), 0, folder, {})
    trainer = baselines.PolicyGradientTrainer(
        copy.deepcopy(shared.problem.policy), arguments, processing_class=shared.problem.tokenizer
    )
    return trainer.setup(shared.problem, shared.reference, {"clip": 0.2, **options}, 0.3)


def test_fine_tuning_learns_the_response_and_not_the_prompt():
    pair = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 1], "rejected_ids": [9, 1]}
    (row,) = sft_examples(Dataset.from_list([pair]))
    assert row == {"input_ids": [5, 6, 7, 8, 1], "attention_mask": [1] * 5, "labels": [-100, -100, -100, 8, 1]}


def test_fine_tuning_raises_the_likelihood_of_chosen_responses(tmp_path):
    record = run_toy(tmp_path, ["sft"], steps=12, eval_steps=12, pretrain_steps=5)
    losses = [entry["loss"] for entry in record["runs"][0]["log"] if "loss" in entry]
    assert record["runs"][0]["metrics"]["kl"] > 0 and losses and "accuracy" in record["runs"][0]["metrics"]


def test_baselines_train_without_dropout_like_the_losses(tmp_path):
    config = replace(find_task("toy").configure("smoke")[1], **QUICK)
    problem = find_task("toy").prepare(config, tmp_path, False, 0)
    rates = lambda model: {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    for module in problem.policy.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.1
    assert rates(baselines.policy_to_train(problem)) == {0.0} and rates(problem.policy) == {0.1}
    assert rates(
        baselines.policy_to_train(
            replace(problem, adapter=LoraConfig(r=2, lora_dropout=0.05, target_modules=["c_attn"], fan_in_fan_out=True))
        )
    ) == {0.0}


def test_best_of_n_is_the_best_of_n(tmp_path):
    record = run_toy(tmp_path, ["best-of-1", "best-of-32"])
    one, many = (run["metrics"] for run in record["runs"])
    assert one["kl"] == 0 and many["kl"] == pytest.approx(math.log(32) - 31 / 32) and many["reward"] > one["reward"] + 1


def test_a_task_without_a_reward_refuses_what_needs_one(tmp_path, monkeypatch):
    toy_task = find_task("toy")
    hidden = replace(toy_task, name="hidden", prepare=lambda *args: replace(toy_task.prepare(*args), reward=None))
    monkeypatch.setitem(TASKS, "hidden", hidden)
    for label in ("ppo", "best-of-2"):
        with pytest.raises(ValueError, match="needs a known reward"):
            compare("hidden", "smoke", label, out=tmp_path, overrides=QUICK, progress=False)
