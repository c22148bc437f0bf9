"""Kills, full disks, two writers, damaged files, large data: nothing is lost, and nothing that is broken is trusted.

A short version runs with the other tests; `make test-faults` (TOKPREF_FAULTS=1) kills thirty times and uses large data.
"""

import contextlib
import copy
import errno
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
import tracemalloc
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from tokpref import LOSSES, PreferenceConfig, PreferenceTrainer, prepare
from tokpref.data import PreferenceCollator
from tokpref.engine.one_pass import group_pairs, pair_loss, pair_stats
from tokpref.engine.packing import pack_rows
from tokpref.engine.reference import cached_ref_logps
from tokpref.experiments.compare import compare
from tokpref.experiments.judges import CachedJudge, EndpointJudge
from tokpref.files import SEAL, damage, last_checkpoint, one_at_a_time, seal, whole_file, whole_folder, write_whole

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SLOW = os.environ.get("TOKPREF_FAULTS") == "1"
KILLS = 30 if SLOW else 3
QUICK = {"steps": 3, "eval_steps": 2, "pretrain_steps": 10, "pairs": 64, "eval_pairs": 16, "letters": 3}
PAIRS = [{"prompt": f"say {word} ", "chosen": word + "!", "rejected": other + ", never"}
         for word in ("yes", "no") for other in ("maybe", "but", "go")]


def in_child(work, folder, kill_after=None):
    "Run `work(folder)` in a process of its own; its exit code, or -9 if it was killed first."
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            torch.set_num_threads(1)
            work(folder)
            code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_whole(folder):
    "No file under its own name is half-written; what a process was busy with has another name."
    for path in folder.rglob("*"):
        busy = any(part.endswith((".part", ".lock")) for part in path.relative_to(folder).parts)
        unfinished = any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts)
        if not path.is_file() or busy or unfinished: continue
        if path.suffix == ".json": json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file: assert list(file.keys())
    for sealed in folder.rglob(SEAL):       # an old checkpoint may be half removed: its seal tells, and it is left out
        if not sealed.parent.name.startswith("checkpoint-"): assert damage(sealed.parent) == ""


def killed_and_finished(work, result, tmp_path, kills=KILLS):
    """Kill `work` at random moments, and go on to the same results; how many kills hit.

    `make test-faults` goes on after each kill, in a folder of its own. The short version kills in one folder, one time
    after another, and then goes on.
    """
    whole = tmp_path / "whole"
    whole.mkdir()
    began = time.monotonic()
    assert in_child(work, whole) == 0
    lasts, hit, expected, rng = time.monotonic() - began, 0, result(whole), random.Random(0)
    tried = 0
    while tried < kills or SLOW and hit < kills and tried < 2 * kills:      # one that came too late is drawn again
        i, tried = tried, tried + 1
        folder = tmp_path / (f"killed{i}" if SLOW else "killed")
        folder.mkdir(exist_ok=True)
        hit += in_child(work, folder, kill_after=rng.uniform(0, lasts if SLOW else 0.7 * lasts)) == -signal.SIGKILL
        assert_whole(folder)
        if not SLOW and i + 1 < kills: continue
        assert in_child(work, folder) == 0
        assert_whole(folder)
        assert not list(folder.rglob(".*.part")), "what a killed process left behind is removed"
        assert result(folder) == expected
    print(f"{work.__name__}: {hit} of {tried} kills hit; an uninterrupted run takes {lasts:.1f} s")
    return hit


# Kills

def compare_toy(folder):
    compare("toy", "smoke", losses=["dpo", "tdpo2"], out=folder, overrides=QUICK, progress=False)


def without_times(record):
    return [{name: run[name] for name in ("label", "seed", "metrics", "history", "log", "answers")}
            for run in record["runs"]]


def test_a_comparison_that_is_killed_goes_on_to_the_same_end(tmp_path):
    killed_and_finished(
        compare_toy, lambda folder: without_times(json.loads((folder / "comparison.json").read_text())), tmp_path)


def test_training_that_is_killed_goes_on_to_the_same_end(tmp_path, model, tokenizer):
    def train(folder):
        settings: Any = dict(
            output_dir=str(folder / "out"), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=6,
            save_steps=1, save_total_limit=2, per_device_train_batch_size=2, learning_rate=1e-2)
        trainer = PreferenceTrainer(
            copy.deepcopy(model), PreferenceConfig(**settings), Dataset.from_list(PAIRS), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()
        trainer.save_state()

    def weights(folder):
        with safe_open(folder / "out" / "model.safetensors", "pt") as file:
            return {name: file.get_tensor(name).tolist() for name in file.keys()}

    killed_and_finished(train, weights, tmp_path)


def test_a_cache_of_log_probs_that_is_killed_is_made_again(tmp_path, model, tokenizer):
    rows, _ = prepare(PAIRS * 20, tokenizer, examples=0)
    score = lambda folder: cached_ref_logps(rows, model, PreferenceCollator(0), folder, batch_size=4)
    score.__name__ = "cached_ref_logps"
    killed_and_finished(score, lambda folder: score(folder)["chosen_ref_logps"][:], tmp_path)


def slow_judge(prompts, first, second):
    time.sleep(0.01)
    return [len(x) % 2 for x in prompts]


def test_a_record_of_verdicts_that_is_killed_keeps_what_it_has(tmp_path):
    prompts = [f"{i} " + "ü" * (i % 7) for i in range(60)]
    ask = lambda folder: CachedJudge(slow_judge, folder / "v.jsonl", "j", batch_size=2, progress=False)(
        prompts, ["a"] * 60, ["b"] * 60)
    ask.__name__ = "CachedJudge"
    judged = lambda folder: CachedJudge(None, folder / "v.jsonl", "j")(prompts, ["a"] * 60, ["b"] * 60)
    assert killed_and_finished(ask, judged, tmp_path, max(KILLS, 5))


# Damage

def spoil(path, how):
    "Cut, empty, overwrite or remove a file."
    old = path.read_bytes()
    if how == "gone": path.unlink()
    else: path.write_bytes({"cut": old[:len(old) // 2], "empty": b"", "noise": b"\0" * len(old)}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "gone"] if SLOW else ["noise"])
def test_a_damaged_file_of_a_comparison_is_made_again_with_a_word(tmp_path, caplog, how):
    compare_toy(tmp_path)
    expected = without_times(json.loads((tmp_path / "comparison.json").read_text()))
    (start,) = (tmp_path / "prepared").glob("start-*")
    spoil(start / "model.safetensors", how)
    for path in [*(tmp_path / "runs").glob("*.json"), tmp_path / "comparison.json"]: spoil(path, how)
    compare_toy(tmp_path)
    assert without_times(json.loads((tmp_path / "comparison.json").read_text())) == expected
    assert "it is made again" in caplog.text and damage(start) == ""


@pytest.mark.parametrize("how", ["cut", "empty", "noise"])
def test_damaged_log_probs_are_computed_again_with_a_word(tmp_path, model, tokenizer, caplog, how):
    rows, _ = prepare(PAIRS, tokenizer, examples=0)
    score = lambda: cached_ref_logps(rows, model, PreferenceCollator(0), tmp_path)["rejected_ref_logps"][:]
    expected = score()
    (path,) = tmp_path.iterdir()
    spoil(path, how)
    assert score() == expected and "does not read" in caplog.text
    caplog.clear()
    assert score() == expected and not caplog.text


def test_numbers_that_were_changed_in_a_cache_are_not_trusted(tmp_path, model, tokenizer, caplog):
    rows, _ = prepare(PAIRS, tokenizer, examples=0)
    expected = cached_ref_logps(rows, model, PreferenceCollator(0), tmp_path)["chosen_ref_logps"][:]
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 64      # a number at the end; the header stays
    path.write_bytes(bytes(data))
    again = cached_ref_logps(rows, model, PreferenceCollator(0), tmp_path)["chosen_ref_logps"][:]
    assert again == expected and "its sum is another" in caplog.text


@pytest.mark.parametrize("line", ["5", "{}", '{"judge": "j"', "\x00\x01", '{"judge": "j", "prompt": "p", "first": "a", '
                                  '"second": "b", "verdict": "yes"}', '{"judge": "j", "prompt": "p", "first": "a", '
                                  '"second": "b", "verdict": 7}'])
def test_a_line_that_is_no_verdict_is_asked_again(tmp_path, caplog, line):
    (tmp_path / "v.jsonl").write_text(line + "\n")
    judge = CachedJudge(lambda *_: [0.25], tmp_path / "v.jsonl", "j", progress=False)
    assert judge(["p"], ["a"], ["b"]) == [0.25] and "broken line is skipped" in caplog.text


# A disk that is full or closed

@contextlib.contextmanager
def small_disk(most):
    "Inside, no file may grow beyond `most` bytes, as on a disk that is full; bars go nowhere."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with contextlib.redirect_stderr(io.StringIO()): yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_and_what_was_there_stays(tmp_path, model, tokenizer):
    path = tmp_path / "record.json"
    write_whole(path, "old")
    with small_disk(1000), pytest.raises(OSError, match="record.json could not be written, a file may not grow"):
        write_whole(path, "x" * 5000)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1

    ask = CachedJudge(lambda prompts, *_: [0.5] * len(prompts), tmp_path / "v.jsonl", "j", progress=False)
    ask(["p"], ["a"], ["b"])
    before = (tmp_path / "v.jsonl").read_bytes()
    with small_disk(1000), pytest.raises(OSError, match="v.jsonl could not be written"): ask(["q" * 5000], ["a"], ["b"])
    assert (tmp_path / "v.jsonl").read_bytes() == before

    rows, _ = prepare(PAIRS * 20, tokenizer, examples=0)
    with small_disk(1000), pytest.raises(OSError, match="ref-logps.* could not be written"):
        cached_ref_logps(rows, model, PreferenceCollator(0), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_in_training_keeps_the_checkpoint_before(tmp_path, model, tokenizer):
    def trainer(**more):
        settings: Any = dict(output_dir=str(tmp_path / "out"), report_to="none", disable_tqdm=True, use_cpu=True,
                             save_steps=1, per_device_train_batch_size=2)
        return PreferenceTrainer(copy.deepcopy(model), PreferenceConfig(**{**settings, **more}),
                                 Dataset.from_list(PAIRS), processing_class=tokenizer)
    trainer(max_steps=1).train()
    more = trainer(max_steps=2)
    with small_disk(100_000), pytest.raises(OSError, match="checkpoint-2.* could not be written"):
        more.train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-1")
    with small_disk(50_000_000): trainer(max_steps=2).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")


def test_a_folder_that_is_closed_is_one_sentence(tmp_path, monkeypatch):
    write_whole(tmp_path / "record.json", "old")
    def closed(*args): raise PermissionError(13, "Permission denied", str(tmp_path / "record.json"))
    monkeypatch.setattr("tokpref.files.os.replace", closed)     # tests may run as root, who may write anywhere
    with pytest.raises(OSError, match="record.json could not be written, writing is not allowed there: mend that"):
        write_whole(tmp_path / "record.json", "new")
    assert (tmp_path / "record.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def open_folder():
    "A folder that another user may look into."
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_anybody(work):
    "`work`, with the rights of a user who is not root."
    def change(folder):
        if os.geteuid() == 0: os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
        work(folder)
    return change


def says(call, *words):
    "`call` fails with an `OSError` of one line that has all these words."
    with pytest.raises(OSError) as caught: call()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_a_folder_without_rights_is_one_sentence(open_folder):
    write_whole(open_folder / "record.json", "old")
    open_folder.chmod(0o555)
    why = "could not be written, writing is not allowed there: mend that or choose another folder"

    def write(folder):
        def judge(name): CachedJudge(lambda *_: [0.5], folder / name, "j", progress=False)(["p"], ["a"], ["b"])
        for name in ("record.json", "new", "deep/er/x"): says(partial(write_whole, folder / name, "new"), name, why)
        for name in ("model", "deep/er/model"): says(whole_folder(folder / name).__enter__, name, why)
        for name in ("v.jsonl", "deep/v.jsonl"): says(partial(judge, name), name, why)
        says(one_at_a_time(folder / "deep" / "x").__enter__, "x", why)
    assert in_child(as_anybody(write), open_folder) == 0
    assert [path.name for path in open_folder.iterdir()] == ["record.json"]
    assert (open_folder / "record.json").read_text() == "old"


def test_what_may_not_be_read_is_made_again_or_named(open_folder):
    with whole_folder(open_folder / "model") as part: (part / "weights").write_text("a")
    for path in (open_folder / "model" / "weights", open_folder / "v.jsonl"): path.touch(), path.chmod(0)

    def read(folder):
        assert damage(folder / "model") == "weights does not read (Permission denied)"
        judge = CachedJudge(lambda *_: [0.5], folder / "v.jsonl", "j", progress=False)
        says(lambda: judge(["p"], ["a"], ["b"]), "v.jsonl or its lock can't be read", "name another file")
    assert in_child(as_anybody(read), open_folder) == 0


@pytest.fixture
def small_drive(tmp_path):
    "A disk of its own, of one megabyte."
    place = tmp_path / "drive"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode: pytest.skip("no mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_full_or_closed_keeps_what_was_finished(small_drive, model, tokenizer):
    "A real one, where a process may mount it."
    def train(steps):
        settings: Any = dict(output_dir=str(small_drive / "out"), report_to="none", disable_tqdm=True, use_cpu=True,
                             save_steps=1, per_device_train_batch_size=2, max_steps=steps)
        PreferenceTrainer(copy.deepcopy(model), PreferenceConfig(**settings), Dataset.from_list(PAIRS),
                          processing_class=tokenizer).train(resume_from_checkpoint=True)
    full, record = "could not be written, the disk is full", small_drive / "record.json"
    write_whole(record, "old")
    train(1)
    room = shutil.disk_usage(small_drive).free
    (small_drive / "fill").write_bytes(bytes(room - 200_000))
    says(lambda: train(2), "checkpoint-2", full)
    assert sorted(path.name for path in (small_drive / "out").iterdir()) == ["checkpoint-1"], "half of one is gone"
    says(lambda: write_whole(record, "x" * 300_000), "record.json", full)
    asked: list = []
    judge = CachedJudge(lambda *pair: asked.append(pair) or [0.5], small_drive / "v.jsonl", "j", 1, progress=False)
    says(lambda: judge([f"{i}" + "q" * 60_000 for i in range(9)], ["a"] * 9, ["b"] * 9), "v.jsonl", full)
    assert len((small_drive / "v.jsonl").read_text().splitlines()) == len(asked) - 1 > 0, "what was paid for"
    gc.collect()        # errors hold files open
    subprocess.run(["mount", "-o", "remount,ro", str(small_drive)], check=True)
    says(lambda: write_whole(record, "new"), "record.json", "the disk is read-only")
    with pytest.raises(ValueError, match="out'.* read-only: name another"): train(2)
    assert record.read_text() == "old"
    subprocess.run(["mount", "-o", "remount,rw", str(small_drive)], check=True)
    for name in ("fill", "v.jsonl"): (small_drive / name).unlink()
    train(2)
    assert last_checkpoint(small_drive / "out") == str(small_drive / "out" / "checkpoint-2")


def test_an_input_that_may_not_be_read_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError, match="secret"), whole_folder(tmp_path / "model"):
        raise PermissionError(13, "Permission denied", "/elsewhere/secret")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_was_cut_is_left_out_with_a_word(tmp_path):
    for step in (2, 10):
        with whole_folder(tmp_path / f"checkpoint-{step}") as part:
            (part / "trainer_state.json").write_text("{}")
            (part / "optimizer.pt").write_bytes(bytes(100))
    said = []
    assert last_checkpoint(tmp_path, said.append) == str(tmp_path / "checkpoint-10") and not said
    spoil(tmp_path / "checkpoint-10" / "optimizer.pt", "cut")
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path, said.append) == str(tmp_path / "checkpoint-2")
    assert [line.split()[0] for line in said] == ["checkpoint-12", "checkpoint-10"]


def test_a_seal_that_was_killed_is_made_again(tmp_path):
    folder = tmp_path / "checkpoint-2"
    with whole_folder(folder) as part: (part / "weights").write_text("a")
    (folder / SEAL).unlink()
    def killed(_):
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)     # when all but the name is there
        seal(folder)
    assert in_child(killed, tmp_path) == -signal.SIGKILL and list(folder.glob(".*.part"))
    seal(folder)
    assert damage(folder) == "" and sorted(path.name for path in folder.iterdir()) == sorted(["weights", SEAL])


# Two processes

def test_two_comparisons_in_one_folder_end_alike(tmp_path):
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                compare_toy(tmp_path)
                code = 0
            finally: os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert len(record["runs"]) == 2 and len(list((tmp_path / "runs").iterdir())) == 2
    assert len(list((tmp_path / "prepared").iterdir())) == 1


def test_two_trainings_do_not_mix_in_one_folder(tmp_path, model, tokenizer):
    def train(**more):
        settings: Any = dict(output_dir=str(tmp_path / "out"), report_to="none", disable_tqdm=True, use_cpu=True,
                             max_steps=1, per_device_train_batch_size=2, **more)
        PreferenceTrainer(copy.deepcopy(model), PreferenceConfig(**settings), Dataset.from_list(PAIRS),
                          processing_class=tokenizer).train()

    def other(folder):
        with pytest.raises(ValueError, match="out': another process trains into it: choose another folder"): train()
        train(save_strategy="no")       # writes nothing
    with one_at_a_time(tmp_path / "out" / "training"): assert in_child(other, tmp_path) == 0
    train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"], "and no lock is left"


def test_the_lock_of_a_killed_process_is_open(tmp_path):
    def hold(folder):
        with one_at_a_time(folder / "x"): os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold, tmp_path) == -signal.SIGKILL and (tmp_path / ".x.lock").exists()
    with one_at_a_time(tmp_path / "x", lambda line: pytest.fail(line)): pass
    assert not list(tmp_path.iterdir())


def test_one_process_at_a_time_is_inside(tmp_path):
    "Each reads a number and writes the next: none is lost, though the lock's file is removed each time."
    def count(folder):
        for _ in range(10):
            with one_at_a_time(folder / "x"):
                number = int((folder / "number").read_text())
                time.sleep(0.001)
                (folder / "number").write_text(str(number + 1))

    (tmp_path / "number").write_text("0")
    children = [threading.Thread(target=in_child, args=(count, tmp_path)) for _ in range(3)]
    for child in children: child.start()
    for child in children: child.join()
    assert (tmp_path / "number").read_text() == "30" and [path.name for path in tmp_path.iterdir()] == ["number"]


def test_where_no_lock_can_be_had_the_work_is_done(tmp_path, monkeypatch):
    def no_lock(*_, **__): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("filelock.FileLock.acquire", no_lock)
    with one_at_a_time(tmp_path / "x"): (tmp_path / "x").write_text("done")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_many_writers_of_one_file_leave_a_whole_one(tmp_path):
    def write(folder):
        for i in range(20):
            with whole_file(folder / "x.json") as part: part.write_text(json.dumps([os.getpid(), i] * 2000))

    children = [threading.Thread(target=in_child, args=(write, tmp_path)) for _ in range(3)]
    for child in children: child.start()
    while any(child.is_alive() for child in children):
        if (tmp_path / "x.json").exists(): assert len(json.loads((tmp_path / "x.json").read_text())) == 4000
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_many_writers_of_one_folder_leave_a_whole_one(tmp_path):
    ended = []

    def write(folder):
        for i in range(20):
            with whole_folder(folder / "x") as part:
                for name in "ab": (part / name).write_text(f"{os.getpid()} {i}")

    children = [threading.Thread(target=lambda: ended.append(in_child(write, tmp_path))) for _ in range(3)]
    for child in children: child.start()
    for child in children: child.join()
    assert ended == [0, 0, 0] and [path.name for path in tmp_path.iterdir()] == ["x"]
    assert damage(tmp_path / "x") == "" and (tmp_path / "x" / "a").read_text() == (tmp_path / "x" / "b").read_text()


def test_a_folder_that_cannot_be_put_in_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "x") as part: (part / "a").write_text("old")
    rename = Path.rename

    def closed(self, target):
        if self.name == "new" and target.name == "x": raise PermissionError(13, "Permission denied", str(target))
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", closed)
    with pytest.raises(OSError, match="x could not be written"), whole_folder(tmp_path / "x", tmp_path / "new") as part:
        (part / "a").write_text("new")
    assert (tmp_path / "x" / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["x"]


# Load

class Handler(BaseHTTPRequestHandler):
    "A tenth of the first requests fail: 429 with Retry-After, 503, a line that breaks, no answer in time; some always."

    server: Any

    def log_message(self, *args): pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = int(body["messages"][0]["content"].split("|")[0])
        with self.server.lock:
            self.server.asked[number] += 1
            first = self.server.asked[number] == 1
        if number % 100 == 50: return self.send_error(500)
        if first and number % 10 == 0:
            if number % 30 == 0:
                self.send_response(429)
                self.send_header("Retry-After", "1")
                return self.end_headers()
            if number % 30 == 10: return self.send_error(503)
            if number % 100 == 20: time.sleep(2.5)      # longer than the judge waits
            return self.connection.close()
        self.send_response(200)
        self.end_headers()
        reply = {"choices": [{"message": {"content": "AB"[number % 2]}}]}
        self.wfile.write(json.dumps(reply).encode())


def test_a_judge_whose_server_stumbles_keeps_what_it_got_and_counts_the_rest(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    rests = []
    monkeypatch.setattr("tokpref.experiments.judges.endpoint.Pace.rest", lambda self, seconds: rests.append(seconds))
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.lock = Counter(), threading.Lock()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    calls = 1000 if SLOW else 200
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    judge = EndpointJudge("tiny", url, "{prompt}|{first}|{second}", pause=0.001, tries=3, timeout=2)
    prompts = [str(i) for i in range(calls)]
    cached = CachedJudge(judge, tmp_path / "v.jsonl", progress=False)
    verdicts = cached(prompts, ["a"] * calls, ["b"] * calls)
    server.shutdown(), server.server_close()
    lost = [i for i in range(calls) if i % 100 == 50]
    assert verdicts == [None if i in lost else 1.0 - i % 2 for i in range(calls)]
    assert rests == [1.0] * len([i for i in range(0, calls, 30) if i not in lost])
    assert f"no readable answer for {len(lost)} of {calls} pairs (500: {len(lost)})" in caplog.text
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == calls - len(lost)
    assert "secret-key" not in caplog.text


def test_a_server_that_goes_away_leaves_the_verdicts_it_gave(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    def answer(request, judge, pace):
        content = json.loads(request.data)["messages"][0]["content"]
        if int(content.split("|")[0]) >= 20: raise ConnectionError("gone")
        return {"choices": [{"message": {"content": "A"}}]}
    monkeypatch.setattr("tokpref.experiments.judges.endpoint.post", answer)
    judge = EndpointJudge("tiny", "http://127.0.0.1:9", "{prompt}|{first}|{second}", concurrency=1)
    with pytest.raises(ConnectionError, match="gone"):
        CachedJudge(judge, tmp_path / "v.jsonl", progress=False)([str(i) for i in range(64)], ["a"] * 64, ["b"] * 64)
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 20


def test_a_wait_is_obeyed_by_all_requests(monkeypatch):
    from tokpref.experiments.judges import endpoint
    now, slept = [100.0], []
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(endpoint.time, "sleep", lambda s: (slept.append(s), now.append(now.pop() + s)))
    pace = endpoint.Pace()
    pace.rest(30), pace.rest(5)
    pace.wait(), pace.wait()
    assert slept == [30.0]
    assert endpoint.asked_to_wait("7") == 7 and endpoint.asked_to_wait("soon") is None
    assert endpoint.asked_to_wait("Thu, 01 Jan 1970 00:00:00 GMT") == 0


class Largest(TorchDispatchMode):
    "Inside, the bytes of the largest tensor that anything gives back."

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result)
                 if isinstance(x, torch.Tensor) and x.layout == torch.strided]
        self.bytes = max([self.bytes, *sizes])
        return result


def long_pair(tokens, vocab):
    "One pair of `tokens` a row, half of them prompt, and two models of that vocabulary."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, max_position_embeddings=tokens)
    ids = torch.randint(vocab, (2, tokens))
    ids[1, :tokens // 2] = ids[0, :tokens // 2]
    there = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": there, "completion_mask": there.clone()}
    batch["completion_mask"][:, :tokens // 2] = 0
    return LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False), batch


def test_no_table_of_all_tokens_times_the_vocabulary_exists():
    tokens, vocab = 1024, 16_384
    policy, reference, batch = long_pair(tokens, vocab)
    with Largest() as largest: pair_loss(policy, reference, batch, LOSSES["tdpo2"]).loss.backward()
    assert largest.bytes < 30e6 < 4 * tokens * vocab / 2
    with Largest() as largest: pair_stats(policy, reference, batch, kl=True, entropy=True)
    assert largest.bytes < 30e6


@pytest.mark.skipif(not SLOW, reason="make test-faults")
def test_rows_of_8k_tokens_and_a_vocabulary_of_256k_fit_into_two_gigabytes(tmp_path):
    "Its logits would be 8.6 GB for the policy and as much for the reference."
    def train(folder):
        policy, reference, batch = long_pair(8192, 262_144)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        pair_loss(policy, reference, batch, LOSSES["tdpo2"]).loss.backward()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        print(f"8k tokens, 256k vocabulary: {time.perf_counter() - began:.0f} s, {grown:.2f} GiB more")
        assert grown < 2 and policy.lm_head.weight.grad.isfinite().all()
    assert in_child(train, tmp_path) == 0


def test_rows_grow_no_faster_than_their_number(tokenizer, tmp_path):
    sizes = (50_000, 200_000) if SLOW else (500, 2_000)
    spent, peaks = [], []
    for rows in sizes:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for i in range(rows): file.write(json.dumps({**PAIRS[i % 6], "prompt": f"say {i}: "}) + "\n")
        from tokpref.data import load_preferences
        tracemalloc.start()
        began = time.perf_counter()
        prepared, report = prepare(load_preferences(path), tokenizer, examples=0)
        spent.append(time.perf_counter() - began)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(prepared) == report.kept == rows
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"rows {sizes}: {spent[0]:.1f} s, {spent[1]:.1f} s; Python's peak {peaks[0] / 1e6:.0f} MB, "
          f"{peaks[1] / 1e6:.0f} MB; the process's {high:.0f} MB")
    assert peaks[1] < 2 * 4 * max(peaks[0], 2e6)


def test_pairs_are_packed_in_one_look_at_each():
    rng = random.Random(0)
    costs = [rng.randint(10, 2000) for _ in range(1024)]
    began = time.perf_counter()
    bins, length = pack_rows(costs)
    print(f"1,024 pairs packed in {1e3 * (time.perf_counter() - began):.1f} ms")
    began = time.perf_counter()
    groups = group_pairs(costs, 4096)
    print(f"1,024 pairs in groups in {1e3 * (time.perf_counter() - began):.1f} ms")
    assert sorted(i for group in groups for i in group) == list(range(1024))
    assert sorted(i for part in bins for i in part) == list(range(1024))
    assert max(sum(costs[i] for i in part) for part in bins) == length


@pytest.mark.skipif(not SLOW, reason="make test-faults")
def test_a_hundred_runs_are_one_comparison(tmp_path):
    labels = [f"dpo:beta={0.01 * (i + 1):.2f}" for i in range(50)]
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    record = compare("toy", "smoke", losses=labels, seeds=[0, 1], out=tmp_path, overrides=QUICK, progress=False)
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    size = (tmp_path / "comparison.json").stat().st_size / 1e6
    print(f"100 runs: {time.perf_counter() - began:.0f} s, {grown:.0f} MiB more at the end, a record of {size:.1f} MB")
    assert grown < 500
    assert len(record["runs"]) == 100 and not any("error" in run for run in record["runs"])
    began = time.perf_counter()
    again = compare("toy", "smoke", losses=labels, seeds=[0, 1], out=tmp_path, overrides=QUICK, progress=False)
    print(f"100 runs read again: {time.perf_counter() - began:.1f} s")
    assert without_times(again) == without_times(record)
