"""Searches on a real Ray: one whose driver is killed, and one whose trials train on Ray Train workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from ray.util import placement_group_table

from pipelines.cluster import ray_session
from pipelines.config import FeaturizeConfig, SearchConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.store.featurize import featurize
from pipelines.workspace import Workspace
from sweeps.demo import BACKBONE, IMAGE_SIZE, WEIGHTS
from sweeps.search import search_state
from sweeps.search.search_run import run_search
from sweeps.study import find_study

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")  # MLflow's own


def start(workspace: Path, round_: int) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(ROOT / "tests" / "fake_search.py"), str(workspace), str(round_)]
    with open(workspace / f"round{round_}.log", "w") as log:
        return subprocess.Popen(command, env=environment, cwd=workspace, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.timeout(180)
def test_a_killed_search_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for workspace in (undisturbed, killed):
        workspace.mkdir()
    driver = start(killed, 1)
    calls, end = killed / "calls.log", time.monotonic() + 60
    while not calls.exists() or len(calls.read_text().splitlines()) < 4:
        assert driver.poll() is None, (killed / "round1.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.2)
    time.sleep(1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    outcomes = []
    for workspace in (undisturbed, killed):
        driver = start(workspace, 2)
        assert driver.wait(timeout=90) == 0, (workspace / "round2.log").read_text()
        outcomes.append(json.loads((workspace / "outcome2.json").read_text()))
    for outcome in outcomes:
        for train in outcome["settings"].values():
            train.pop("workspace")
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0]["results"]) == 6
    first, second = ([line[2:] for line in calls.read_text().splitlines() if line[0] == n] for n in "12")
    assert len(second) == 3, "three were finished, one went on, two were new"
    assert second[0] == first[3]

    client = MlflowClient(tracking_uri=Workspace(killed).mlflow_uri)
    runs = client.search_runs([client.get_experiment_by_name("search").experiment_id])
    kinds = [run.data.tags["la.kind"] for run in runs]
    assert (kinds.count("sweep"), kinds.count("fold")) == (1, 6)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.metrics["best_seen_miou"] > 0 for run in runs if run.data.tags["la.kind"] == "fold")


@pytest.mark.timeout(300)
def test_after_an_early_stop_of_two_workers_the_next_two_start_and_nothing_is_left_taken(tmp_path, monkeypatch):
    scenes = draw_scenes(tmp_path / "scenes", train_images=80, val_images=48)
    settings = {"backbone": BACKBONE, "weights": WEIGHTS, "image_size": IMAGE_SIZE}
    featurize(FeaturizeConfig(workspace=tmp_path, coco_dir=scenes, **settings))
    space, train = find_study("search").space | {"preset": ("debug",)}, {"batch_scale": 0.25, "workers": 2}
    config = SearchConfig(workspace=tmp_path, space=space, train=train, trials=2, steps=30, val_episodes=3)
    # a rung that nobody reaches before: the first trial is stopped at its first validation
    search = search_state.Search(config)
    for value in (101.0, 102.0, 103.0):
        trial = search.study.ask()
        trial.report(value, 5)
        trial.should_prune()
        search.study.tell(trial.number, state=search_state.TrialState.FAIL)
    ended = []
    with ray_session():
        monkeypatch.setattr("sweeps.search.search_run._Settle.finished", told(ended, "sweeps.search.search_run"))
        started = time.monotonic()
        result = run_search(config)
        assert not result.failed
        outcomes = [result.results[name] for name in sorted(result.results)]
        assert [outcome.stopped_early for outcome in outcomes] == [True, True]
        assert [outcome.step < 30 for outcome in outcomes] == [True, True]
        assert len(ended) == 2
        assert ended[1] - ended[0] < 120, "the first trial's workers give way to the second's"
        assert ended[0] - started < 120
        taken = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        assert taken == []
        assert ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


def told(ended: list[float], module: str):
    """`_Settle.finished` that notes when it is called."""
    original = sys.modules[module]._Settle.finished

    def finished(self, job, result):
        ended.append(time.monotonic())
        original(self, job, result)

    return finished
