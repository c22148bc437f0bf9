"""Two processes equal one: the same pairs a step, the same weights at the end, TBPO-Q's head included."""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import start_processes
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parent))
import fsdp_worker  # noqa: E402
import shards_worker  # noqa: E402
import train_worker  # noqa: E402

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_of(rank: int, processes: int, port: int, work: Callable, arguments: tuple) -> None:
    "What one process does; several form a group, as torchrun's do."
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                          LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_worker.forget_processes()
    work(*arguments)


def launch(work: Callable, *arguments, processes: int) -> None:
    "Run `work(*arguments)` as so many processes. A fork has all imports; CUDA does not bear one."
    method = "spawn" if torch.cuda.is_available() or not hasattr(os, "fork") else "fork"
    start_processes(one_of, (processes, free_port(), work, arguments), processes, start_method=method)


def train(out: Path, processes: int) -> dict:
    "Weights and evaluation of each run after a few steps of four pairs, by so many processes."
    launch(train_worker.main, str(out), 4 // processes, processes=processes)
    return torch.load(out, weights_only=True)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_equal_one(tmp_path):
    one, two = train(tmp_path / "one.pt", 1), train(tmp_path / "two.pt", 2)
    for run in one:
        assert one[run].keys() == two[run].keys()
        for name, value in one[run].items():
            where = f"{run}, {name}"
            assert_close(
                two[run][name], value, rtol=1e-4, atol=1e-5, msg=lambda message, where=where: f"{where}: {message}"
            )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fsdp2_has_the_gradients_of_whole_models_without_full_logits(tmp_path):
    launch(shards_worker.main, str(tmp_path / "report.json"), processes=2)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report.pop("full logits") is None
    assert len(report) == 6
    for name, difference in report.items():
        assert difference < (0.05 if name.startswith("bfloat16") else 1e-5), name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_fsdp2_trains_as_one_process_does(tmp_path):
    "Losses, gradients, margins and saved weights of runs whose policy and reference are in shards, fast ways on."
    runs = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        launch(fsdp_worker.main, str(out), processes=processes)
        runs.append(json.loads(out.read_text(encoding="utf-8")))
    for name, whole in runs[0].items():
        shards = runs[1][name]
        assert shards["sharded"] == [True, True] and whole["sharded"] == [False, False]
        assert shards["engine"] == whole["engine"] == {"one_pass": True, "shared_prompt": True}
        assert shards["full_logits"] == [None, None]
        for weight, norm in whole["saved"].items():
            assert shards["saved"][weight] == pytest.approx(norm, rel=1e-4), name
        assert_close(torch.tensor(shards["log"]), torch.tensor(whole["log"]), rtol=1e-4, atol=1e-5)
        assert shards["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-3, abs=1e-5)
    assert runs[1]["resumed"]["log"][-1] == pytest.approx(runs[1]["dpo"]["log"][-1], rel=1e-5)
    assert runs[1]["resumed"]["saved"] == pytest.approx(runs[1]["dpo"]["saved"], rel=1e-5)
