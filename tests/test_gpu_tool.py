"""`make gpu`: its comparisons exist; it skips what is there, goes on after a failure, stops when the time is up."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tokpref.experiments.compare import find_task, resolve_losses

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.mark.parametrize("name", gpu.COMPARISONS)
def test_comparisons_are_sound(name):
    task, profile, overrides = gpu.COMPARISONS[name]
    _, config = find_task(task).configure(profile, overrides)
    assert config.steps % config.eval_steps == 0 and config.max_length >= config.context and len(config.seeds) >= 3
    assert config.hidden_size % config.heads == 0 and config.hidden_size // config.heads % 2 == 0
    assert resolve_losses(None, config, find_task(task).variants)
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
                {"complete": seeds == gpu.ALL, "seeds": [0, 1, 2][:seeds]}
                if name in gpu.COMPARISONS
                else {"broken": []}
            )
        )
        return "done"
    monkeypatch.setattr(gpu, "in_a_process", start)
    monkeypatch.setattr(gpu, "install", lambda device: None)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "results").mkdir()
    return started


def test_parts_in_order_of_value_and_after_a_failure(calls, capsys):
    assert gpu.main([]) == 1
    assert calls == [
        ("tests", 1),
        ("engine", 1),
        ("sentiment", 1),
        ("math", 1),
        ("instructions", 1),
        ("sentiment", gpu.ALL),
        ("math", gpu.ALL),
        ("instructions", gpu.ALL),
    ]
    calls.clear()
    assert gpu.main([]) == 1 and calls == [("engine", 1)], "only what failed is tried again"
    assert capsys.readouterr().out.count("there already") == 7


def test_results_of_the_repository_count(calls, tmp_path):
    (tmp_path / "results" / "engine-cuda.json").write_text("{}")
    (tmp_path / "results" / "sentiment-gpu.json").write_text(json.dumps({"complete": False, "seeds": [0]}))
    (tmp_path / "results" / "cuda-tests.json").write_text(json.dumps({"broken": ["test_it"]}))
    assert gpu.main(["--only", "tests", "engine", "sentiment"]) == 0 and calls == [("tests", 1), ("sentiment", gpu.ALL)]


def test_nothing_starts_when_the_time_is_up(calls, capsys):
    assert gpu.main(["--minutes", "0.1"]) == 0 and not calls and capsys.readouterr().out.count("the time is up") == 8


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
