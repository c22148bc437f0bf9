"""The benchmark runs, its losses agree, and its table says what the raw times say; no test here judges a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, str]:
    "(result, printed text) of a quick run."
    out = tmp_path_factory.mktemp("bench") / "engine.json"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, ROOT / "benchmarks" / "engine.py", "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_a_quick_run_measures_and_agrees(quick):
    result, printed = quick
    assert not result["failed"] and result["config"]["quick"]
    assert {"step", "losses", "head", "slope"} <= {run["section"] for run in result["runs"]}
    assert result["agreement"] and all(
        check["agrees"] and check["gradient"] < 1e-5 for check in result["agreement"].values()
    )
    assert "TDPO2, the released computation" in printed and str(ROOT) not in json.dumps(result)


def test_a_result_says_how_it_came_about(quick):
    result, _ = quick
    assert {"torch", "transformers", "tokpref"} <= result["versions"].keys() and result["hardware"]["cores"]
    assert result["config"]["seed"] and result["lengths"]["8"] and result["shapes"]["32k"]["vocab"] == 32_000
    assert all(len(run["times"]) == 2 for run in result["runs"] if run["section"] == "step")


def test_ratios_come_from_the_raw_times():
    import report
    run = dict(section="step", shape="32k", allocator="default")
    runs = [{**run, "contender": "own-dpo", "times": [3.0, 1.0, 2.0], "peak": 10},
            {**run, "contender": "trl-1.10", "times": [10.0, 20.0, 30.0], "peak": 50}]
    row = next(r for r in report.ratios(runs, "cpu") if r["what"] == "DPO step / TRL 1.10")
    assert row["ratio"] == 0.1 and row["low"] == 1.5 / 25 and row["high"] == 2.5 / 15 and row["met"] is False
    assert report.spread([2.0, 3.0, 8.0], [1.0, 1.0, 2.0], paired=True)[0] == 3.0


def test_operations_count_each_token_once():
    import report
    import workloads
    shape = workloads.Shape("llama", vocab=100, hidden=8, layers=2, heads=2, inner=16)
    parts = report.operations(shape, [(3, 2, 1)])
    assert parts["body"] == 8 * 6 * 2 * (4 * 8 * 8 + 3 * 8 * 16) and parts["head"] == 8 * 100 * 8 * 3
    assert parts["attention"] == 16 * 2 * 8 * (6 + 6 + 3 + 3 + 1)


def test_peers_are_pinned():
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("requirements-*.txt")]
    lines = [line for text in texts for line in text.splitlines()]
    assert lines and all("==" in line for line in lines if line and line[0] != "#")


def test_a_step_launches_little_more_than_its_models():
    "Counted without a GPU; the numbers do not grow with the pairs, and a KL costs next to nothing."
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "launches.py"], capture_output=True, text=True,
                          env=os.environ | {"TOKPREF_PEERS": "nowhere"})
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["dpo_8"] <= counts["body"] + 400 and counts["dpo_32"] <= counts["body"] + 400
    assert counts["tdpo2_8"] <= counts["dpo_8"] + 60 and counts["waits_8"] == 0 and counts["trl_8"] is None
