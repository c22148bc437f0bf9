"""`make gpu`: its comparisons exist; it skips what is there, goes on after a failure, stops when the time is up."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tokpref.experiments.compare import find_task, resolve_losses
from tokpref.experiments.pretrained import made_up_pairs
from tokpref.experiments.scratch import ScratchConfig, fresh_model, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.mark.parametrize("name", gpu.COMPARISONS)
def test_comparisons_are_sound(name):
    task, profile, overrides, own_draw = gpu.COMPARISONS[name]
    _, config = find_task(task).configure(profile, overrides)
    assert config.steps % config.eval_steps == 0 and len(config.seeds) >= 3
    assert resolve_losses(None, config, find_task(task).variants)
    if gpu.COMPARISONS[name].pretrained:
        assert config.models() == {"model": gpu.MODEL} and not config.gradient_checkpointing
        assert not own_draw or config.test_split == "", "seeds hold out other pairs where there is no test split"
        return
    assert config.hidden_size % config.heads == 0 and config.hidden_size // config.heads % 2 == 0
    assert config.max_length >= config.context
    own = find_task(task).profiles[profile]
    assert (
        sum(getattr(config, key) > getattr(own, key) for key in overrides if isinstance(getattr(own, key), int)) >= 4
    ), "larger than what it scales up"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    "Every part that is started, instead of starting it; a comparison leaves a file behind."
    started = []
    def start(name, seeds, args, target, seconds):
        started.append((name, seeds))
        if name == "engine": return "failed (1)"
        target.write_text(
            json.dumps(
                {"complete": seeds == gpu.ALL, "finished_seeds": min(seeds, 3)}
                if name in gpu.COMPARISONS
                else {"broken": []}
            )
        )
        return "done"
    monkeypatch.setattr(gpu, "in_a_process", start)
    monkeypatch.setattr(gpu, "unpack_all", lambda: "")
    monkeypatch.setattr(gpu, "check_machine", lambda device: None)
    monkeypatch.setattr(gpu, "find_models", lambda: tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "results").mkdir()
    return started


def test_parts_in_order_of_value_and_after_a_failure(calls, capsys):
    assert gpu.main([]) == 1
    names = list(gpu.COMPARISONS)
    assert names[0] == "dialogue-smol" and names[-3:] == ["sentiment", "math", "instructions"]
    seeds = [(name, seeds) for seeds in (1, 2, gpu.ALL) for name in names]
    assert calls == [("tests", 1), ("engine", 1), *seeds], "the first seed of all before the second of any"
    calls.clear()
    assert gpu.main([]) == 1 and calls == [("engine", 1)], "only what failed is tried again"
    assert capsys.readouterr().out.count("there already") == 1 + 3 * len(names)


def test_without_the_model_its_comparisons_wait_and_the_others_run(calls, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_models", lambda: None)
    assert gpu.main(["--only", "dialogue-smol", "math"]) == 0
    assert calls == [("math", 1), ("math", 2), ("math", gpu.ALL)]
    assert capsys.readouterr().out.count("make model first") == 3


def test_results_of_the_repository_count(calls, tmp_path):
    (tmp_path / "results" / "engine-cuda.json").write_text("{}")
    (tmp_path / "results" / "sentiment-gpu.json").write_text(json.dumps({"complete": False, "finished_seeds": 1}))
    (tmp_path / "results" / "cuda-tests.json").write_text(json.dumps({"broken": ["test_it"]}))
    assert gpu.main(["--only", "tests", "engine", "sentiment"]) == 0
    assert calls == [("tests", 1), ("sentiment", 2), ("sentiment", gpu.ALL)]


def test_a_seed_that_was_cut_off_half_way_goes_on(calls, tmp_path):
    "Some losses of the first seed are there: it comes before the second seed of anything."
    (tmp_path / "results" / "math-smol.json").write_text(
        json.dumps({"complete": False, "seeds": [0], "finished_seeds": 0}))
    assert gpu.main(["--only", "math-smol"]) == 0
    assert calls == [("math-smol", seeds) for seeds in (1, 2, gpu.ALL)]


def test_nothing_starts_when_the_time_is_up(calls, capsys):
    assert gpu.main(["--minutes", "0.1"]) == 0 and not calls
    assert capsys.readouterr().out.count("the time is up") == 2 + 9 * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CARRIED", tmp_path)
    monkeypatch.setattr(gpu, "OUTSIDE", tmp_path / "outside")
    with pytest.raises(SystemExit, match="no GPU is to be seen"): gpu.main([])


def test_a_part_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "__file__", str(slow))
    args = type("Args", (), {"device": "cpu", "quick": False})
    assert gpu.in_a_process("math", 1, args, tmp_path / "x.json", 0.5) == "cut off; run again to go on"


def test_what_is_carried_fits_the_calls():
    sizes = {"a": 30.0, "b": 30.0, "c": 20.0, "d": 45.0, "e": 5.0}
    assert gpu.in_calls(sizes, 64) == [["a", "b"], ["c"], ["d", "e"]]
    with pytest.raises(SystemExit, match="d has 45.0 MiB"): gpu.in_calls(sizes, 40)


def test_what_one_call_carried_is_there_in_the_next(tmp_path, monkeypatch):
    "The checkout loses a folder that is not carried again; the model is made when its last part is there."
    made, parts = [], 3
    monkeypatch.setattr(gpu, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(gpu, "OUTSIDE", tmp_path / "outside")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.delenv("TOKPREF_MODELS", raising=False)
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **kwargs: made.append(command))
    for i, name in enumerate(gpu.DATA[:parts]):
        shutil.rmtree(tmp_path / "carried", ignore_errors=True)
        folder = tmp_path / "carried" / str(i + 1)
        for place in (folder / "model", folder / "data" / name): place.mkdir(parents=True)
        (folder / "model" / f"smol.{i + 1:02}-of-{parts:02}").write_bytes(bytes([i]))
        assert not made and gpu.main(["--unpack"]) == 0
    assert len(made) == 1 and made[0][-2:] == ["--out", str(tmp_path / "outside" / "models")]
    kept = Path(made[0][made[0].index("--parts") + 1])
    assert [path.read_bytes() for path in sorted(kept.iterdir())] == [b"\0", b"\1", b"\2"]
    assert all((tmp_path / "outside" / "data" / name).is_dir() for name in gpu.DATA[:parts])


def test_what_a_killed_call_copied_in_half_is_copied_again(tmp_path, monkeypatch):
    "Nothing stands under its name before it is whole: neither data nor wheels nor a part of the model."
    carried, outside = tmp_path / "carried" / "1", tmp_path / "outside"
    monkeypatch.setattr(gpu, "CARRIED", tmp_path / "carried"), monkeypatch.setattr(gpu, "OUTSIDE", outside)
    monkeypatch.setattr(gpu, "find_models", lambda: tmp_path)
    for place in (carried / "model", carried / "data" / gpu.DATA[0], carried / "peers" / "x"): place.mkdir(parents=True)
    (carried / "model" / "smol.01-of-02").write_bytes(b"whole")
    (carried / "peers" / "x" / "x.whl").write_bytes(b"")
    (carried / "data" / gpu.DATA[0] / "rows").write_text("whole")

    copy, killed = shutil.copyfile, ""
    def copyfile(source, to, **options):
        "Half of the file that the call is killed at."
        if killed in str(to) and killed:
            Path(to).write_bytes(b"ha")
            raise KeyboardInterrupt
        return copy(source, to, **options)

    def unpack(wheels, folder):
        folder.mkdir()
        if killed in str(folder) and killed: raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", copyfile), monkeypatch.setattr(gpu, "unpack", unpack)
    places = [outside / "peers" / "x", outside / "data" / gpu.DATA[0], outside / "model" / "smol.01-of-02"]
    for place, name in zip(places, ("peers", "rows", "smol.01"), strict=True):
        killed = name
        with pytest.raises(KeyboardInterrupt): gpu.main(["--unpack"])
        assert not place.exists() and list(outside.rglob(".*.part"))
    killed = ""
    assert gpu.main(["--unpack"]) == 0 and all(place.exists() for place in places)
    assert (places[1] / "rows").read_text() == "whole" and places[2].read_bytes() == b"whole"
    assert not list(outside.rglob(".*.part"))


def test_a_larger_repository_leaves_less_room_for_a_part(tmp_path, monkeypatch, capsys):
    "With a repository of 60 of 64 MiB the parts are as small as they must be, and all calls fit."
    asked = []

    def run(command, **kwargs):
        if command[0] == "git": return argparse.Namespace(stdout="big\0")
        size = int(command[command.index("--part-size") + 1])
        asked.append(size)
        folder = Path(command[command.index("--split") + 1])
        folder.mkdir(parents=True)
        for i in range(1, 4): (folder / f"smol.{i:02}-of-03").write_bytes(bytes(size))

    def download(what, folder, python):
        folder.mkdir(parents=True)
        (folder / "a.whl").write_bytes(bytes(2**19))

    (tmp_path / "source").mkdir()
    for name in gpu.DATA: (tmp_path / "source" / name).mkdir(parents=True)
    (tmp_path / "big").write_bytes(bytes(60 * 2**20))
    monkeypatch.setenv("TOKPREF_DATA", str(tmp_path / "source"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path), monkeypatch.setattr(gpu, "CARRIED", tmp_path / ".gpu")
    monkeypatch.setattr(gpu.subprocess, "run", run), monkeypatch.setattr(gpu, "download", download)
    assert gpu.main(["--carry"]) == 0
    assert asked == [3 * 2**20], "4 MiB less the wheels and what is left free"
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(".gpu/")]
    assert len(told) == 4 and "wheels, model/smol.01-of-03" in told[0] and "63.5 of 64" in told[0]
    assert not (tmp_path / ".gpu" / "all").exists()


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    "A folder laid out like the hub, with a tiny model under the name of the real one."
    texts = [row[name] for row in made_up_pairs(60, 0) for name in ("prompt", "chosen")]
    tokenizer = train_tokenizer(texts, 320)
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    config = ScratchConfig(hidden_size=16, layers=1, heads=2, context=256)
    models = tmp_path_factory.mktemp("models")
    fresh_model(tokenizer, config).save_pretrained(models / gpu.MODEL), tokenizer.save_pretrained(models / gpu.MODEL)
    return models


@pytest.mark.parametrize("name", [name for name, part in gpu.COMPARISONS.items()
                                  if part.pretrained and name != "math-smol-stories"])    # a random model solves none
def test_a_pretrained_comparison_goes_through_every_line(name, small_models, tmp_path, monkeypatch, capsys):
    "As with --device cpu --quick, in the profile itself: two seeds, and a line after each run."
    monkeypatch.setenv("TOKPREF_MODELS", str(small_models))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    target = tmp_path / "record.json"
    gpu.run_comparison(argparse.Namespace(part=name, quick=True, seeds=2), target)
    record = json.loads(target.read_text())
    assert record["complete"] and record["finished_seeds"] == 2
    assert record["profile"] == gpu.COMPARISONS[name].profile and list(record["models"]) == [gpu.MODEL]
    runs = [("dpo", 0), ("tdpo2", 0), ("dpo", 1), ("tdpo2", 1)]
    assert [(run["label"], run["seed"]) for run in record["runs"]] == runs
    told = capsys.readouterr().out
    assert all(f"{name}: {label}, seed {seed}: {record['value']} " in told for label, seed in runs)
    tuned = len(list((tmp_path / "runs" / f"gpu-quick-{name}" / "prepared").glob("s*t-*")))     # sft-, start-
    draws = 2 if gpu.COMPARISONS[name].own_draw else 1
    config: Any = find_task(record["task"]).profiles[record["profile"]]
    assert tuned == (draws if config.sft_epochs else 0)
