"""Tracking on an MLflow server that another process runs, as on a cluster."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import mlflow
import pytest

from la.errors import InputError
from pipelines.tracking.mlflow_model import example, log_model
from pipelines.tracking.mlflow_runs import Tracker
from pipelines.workspace import Workspace

START_SECONDS = 60  # for the server on a busy machine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URI of a server on a free port of this machine, with a SQLite database and artifacts that it serves itself."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    # job execution starts more processes, which nothing here uses
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    env.pop("MLFLOW_TRACKING_URI", None)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(uri, process)
        yield uri
    finally:
        process.terminate()
        process.wait(20)


def wait_until_it_answers(uri: str, process: subprocess.Popen) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        assert process.poll() is None, "the server ended at its start"
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no answer from {uri} within {START_SECONDS} s")


def test_the_environment_names_the_server_and_the_workspace_stays_free_of_runs(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    tracker = Tracker(Workspace(tmp_path))
    parent = tracker.open("remote", "sweep", "sweep", "sweep")
    points = [{"step": step, "loss": 1 / step} for step in range(1, 2502)]  # more than a request takes

    def log(tracker, points):
        with tracker.open("remote", "sweep/a", "a", "fold", {"fold": 0}, parent) as run:
            run.curve(points)
            run.metrics({"miou": 25.0})
            run.text('{"cat": 25.0}', "per_class.json")
        return run.id

    first = log(tracker, points[:1500])
    # the job dies, and another one on another machine goes on
    again = Tracker(Workspace(tmp_path / "elsewhere"))
    assert log(again, points) == first
    client = again._client
    run = client.get_run(first)
    assert (run.info.status, run.data.params["fold"], run.data.metrics["miou"]) == ("FINISHED", "0", 25.0)
    assert run.data.tags["mlflow.parentRunId"] == parent.id
    assert [m.step for m in client.get_metric_history(first, "loss")] == list(range(1, 2502))
    assert run.info.artifact_uri.startswith("mlflow-artifacts:"), "through the server, not this machine's disk"
    local = client.download_artifacts(first, "per_class.json", str(tmp_path))
    assert Path(local).read_text() == '{"cat": 25.0}'
    uri = log_model("demo", again, first)
    assert len(mlflow.pyfunc.load_model(uri).predict(example())) == 1
    assert not (tmp_path / "mlflow.db").exists()
    assert not Workspace(tmp_path).artifacts.exists()


def test_jobs_that_start_at_once_share_an_experiment(server, tmp_path):
    found: list[str] = []

    def job(number: int) -> None:
        found.append(Tracker(Workspace(tmp_path / str(number)), server).experiment("raced"))

    jobs = [threading.Thread(target=job, args=(n,)) for n in range(4)]
    for each in jobs:
        each.start()
    for each in jobs:
        each.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_server_that_is_not_there_is_told_before_any_work(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"http://127.0.0.1:{probe.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(InputError, match="does not answer"):
        Tracker(Workspace(tmp_path), free)
    assert time.monotonic() - started < 30
