"""A real Ray Tune sweep of pretended trials, whose driver is killed half-way and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.workspace import Workspace

ROOT = Path(__file__).parents[2]
VARIANTS = ["complete", "no_mixer", "no_spatial_convs", "no_token_pool", "prototype"]


def start(workspace: Path, round_: int) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(ROOT / "tests" / "fake_sweep.py"), str(workspace), str(round_)]
    # Not in the checkout: a trial must find the code without its driver's working directory.
    with open(workspace / f"round{round_}.log", "w") as log:
        return subprocess.Popen(command, env=environment, cwd=workspace, stdout=log, stderr=subprocess.STDOUT)


def wait_for(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.2)


def descendants(pid: int) -> set[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
    family = {pid}
    for _ in parents:
        family |= {child for child, parent in parents if parent in family}
    return family - {pid}


def at_work(pid: int) -> bool:
    """Whether the process lives, Ray's two agents aside: they try for a fixed 60 s to report the death, then end."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return bool(command) and not command.startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
    except OSError:
        return False


def all_runs(workspace: Path) -> list:
    client = MlflowClient(tracking_uri=Workspace(workspace).mlflow_uri)
    experiment = client.get_experiment_by_name("ablations")
    return client.search_runs([experiment.experiment_id]) if experiment else []


@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore:The ``noload``")  # MLflow's own
def test_a_killed_sweep_goes_on_where_it_was_and_failures_stay_alone(tmp_path):
    calls, results = tmp_path / "calls.log", tmp_path / "runs" / "sweeps"

    # Round 1: one trial finishes, one trial's process dies, one is at work when the driver is killed.
    driver = start(tmp_path, 1)
    started = [f"1 train {name}\n" for name in ("complete", "no_spatial_convs", "no_mixer")]
    wait_for(lambda: calls.exists() and all(s in calls.read_text() for s in started), 120, "third trial")
    wait_for(lambda: any('"finished": true' in f.read_text() for f in results.glob("*/complete*.json")), 20, "result")
    wait_for(lambda: any(r.data.tags.get("la.error") for r in all_runs(tmp_path)), 20, "logged failure")
    family = set(filter(at_work, descendants(driver.pid)))
    assert len(family) > 3, "expected Ray's processes below the driver"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not any(map(at_work, family)), 30, "end of Ray's processes")
    assert any(run.info.status == "RUNNING" for run in all_runs(tmp_path)), "the kill leaves runs open"

    # Round 2: the same command; nothing finished is repeated, what failed or was under way is.
    driver = start(tmp_path, 2)
    assert driver.wait(timeout=90) == 0, (tmp_path / "round2.log").read_text()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert outcome["finished"] == [f"{name}/fold0" for name in VARIANTS if name != "no_token_pool"]
    assert list(outcome["failed"]) == ["no_token_pool/fold0"]
    assert outcome["failed"]["no_token_pool/fold0"].strip().endswith("no_token_pool broke [on purpose]")
    assert not outcome["interrupted"]
    counts = Counter(calls.read_text().splitlines())
    assert counts["1 evaluate complete"] == 8
    assert not [line for line in counts if line.startswith("2") and line.endswith("complete")]
    assert counts["2 evaluate no_spatial_convs"] == counts["2 evaluate no_mixer"] == 8
    assert "w/o token pool,failed,38.3" in (Path(outcome["folder"]) / "table5.csv").read_text()
    assert len(list(results.iterdir())) == 1

    runs = all_runs(tmp_path)
    kinds = {kind: [r for r in runs if r.data.tags["la.kind"] == kind] for kind in ("sweep", "trial", "fold")}
    assert {kind: len(found) for kind, found in kinds.items()} == {"sweep": 1, "trial": 5, "fold": 5}
    names = {run.info.run_id: run.info.run_name for run in runs}
    for run in kinds["trial"]:
        assert run.data.tags["mlflow.parentRunId"] == kinds["sweep"][0].info.run_id
    for run in kinds["fold"]:
        assert names[run.data.tags["mlflow.parentRunId"]] == run.info.run_name.removesuffix("/fold0")
    status = {run.info.run_name: (run.info.status, run.data.tags.get("la.error")) for run in runs}
    error = "ValueError: no_token_pool broke [on purpose]"
    for name in VARIANTS:
        assert status[f"{name}/fold0"] == (("FAILED", error) if name == "no_token_pool" else ("FINISHED", None))
        assert status[name][0] == status[f"{name}/fold0"][0]
    assert status[kinds["sweep"][0].info.run_name][0] == "FAILED"

    finished = [run for run in kinds["fold"] if run.info.status == "FINISHED"]
    assert len({frozenset(run.data.params) for run in finished if run.data.params["method"] == "la"}) == 1
    judged = {frozenset(key for key in run.data.metrics if key.startswith("miou/")) for run in finished}
    assert len(judged) == 1
    assert len(next(iter(judged))) == 8
    client = MlflowClient(tracking_uri=Workspace(tmp_path).mlflow_uri)
    for run in (run for run in finished if run.info.run_name != "prototype/fold0"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [10, 20, 30]
        assert len(client.get_metric_history(run.info.run_id, "miou/1way-1shot-mask")) == 1
