import getpass
import hashlib
import json
import math
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_sweep import fake_store

from la.errors import InputError
from la.predictor.checkpoint import DEMO_CHECKPOINT
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.runs.code import git_sha
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore
from pipelines.tracking.job_runs import log_evaluation, log_training, tracked_training
from pipelines.tracking.mlflow_runs import Tracker, TrackingError, pages, serve_ui, ui_command
from pipelines.tracking.run_contents import changed, metric_key, source_tags, training_params, varied
from pipelines.training.stop import Stopped
from pipelines.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("a workspace"))  # with a space, as in many a home folder


@pytest.fixture
def tracker(workspace, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker(workspace)


def runs(tracker, study):
    return tracker._client.search_runs([tracker.experiment(study)])


def history(tracker, run_id, key):
    return [(m.step, m.value) for m in tracker._client.get_metric_history(run_id, key)]


def test_a_run_is_found_again_by_its_key(tracker, workspace):
    first = tracker.open("found", "k/1", "one", "fold", {"lr": 0.1})
    again = Tracker(workspace).open("found", "k/1", "one", "fold", {"lr": 0.2, "dim": 8})
    assert again.id == first.id
    run = runs(tracker, "found")[0]
    assert run.data.params == {"lr": "0.1", "dim": "8"}, "a param keeps its first value, new ones join"
    assert tracker.find("found", "k/2") is None


def test_children_name_their_parent_and_artifacts_lie_in_the_workspace(tracker, workspace):
    parent = tracker.open("family", "p", "p", "sweep")
    child = tracker.open("family", "p/c", "c", "trial", parent=parent)
    child.text("hello", "note.txt")
    found = {run.info.run_id: run for run in runs(tracker, "family")}
    assert found[child.id].data.tags["mlflow.parentRunId"] == parent.id
    assert next(workspace.artifacts.rglob("note.txt")).read_text() == "hello"


def test_a_resumed_curve_repeats_no_step(tracker, workspace):
    points = [{"step": s, "loss": 1 / s, "seen_miou": None} for s in (1, 2, 3)]
    run = tracker.open("curve", "k", "k", "fold")
    run.curve(points[:2])
    Tracker(workspace).open("curve", "k", "k", "fold").curve(points)
    assert history(tracker, run.id, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_not_a_number_is_logged_once_as_that(tracker, workspace):
    run = tracker.open("nan", "k", "k", "fold")
    run.curve([{"step": 0, "loss": float("nan")}])
    for _ in range(2):
        run.metrics({"miou": float("nan")})
    (kept,) = runs(tracker, "nan")
    assert math.isnan(kept.data.metrics["loss"])
    assert math.isnan(kept.data.metrics["miou"])
    assert len(history(tracker, run.id, "miou")) == 1


def test_an_experiment_is_of_the_kind_that_trains_models(tracker, workspace):
    def kind(name):
        return tracker._client.get_experiment(Tracker(workspace).experiment(name)).tags["mlflow.experimentKind"]

    assert kind("kind") == "custom_model_development"
    tracker._client.create_experiment("of an earlier version")
    assert kind("of an earlier version") == "custom_model_development"


def test_a_run_says_who_ran_which_code(tracker):
    repository = Path(__file__).parents[1]
    commit = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    status = subprocess.run(["git", "-C", repository, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    run = tracker.open("source", "k", "k", "fold")
    tags = tracker._client.get_run(run.id).data.tags
    assert tags["mlflow.source.git.commit"] == commit.stdout.strip()
    assert tags["mlflow.source.git.dirty"] == ("true" if status.stdout.strip() else "false")
    assert tags["mlflow.user"] == getpass.getuser()
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == (sys.argv[0], "LOCAL")


def test_outside_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    for known in (git_sha, source_tags):
        known.cache_clear()
    assert "mlflow.source.git.dirty" not in source_tags()
    for known in (git_sha, source_tags):
        known.cache_clear()


def test_every_way_out_closes_the_run(tracker):
    for error, status in ((None, "FINISHED"), (ValueError("no\nluck"), "FAILED"), (KeyboardInterrupt(), "KILLED")):
        expected = pytest.raises(type(error)) if error else nullcontext()
        with expected, tracker.open("closed", status, status, "fold") as run:
            if error:
                raise error
        found = tracker._client.get_run(run.id)
        assert found.info.status == status
        assert found.data.tags.get("la.error") == ("luck" if status == "FAILED" else None)


def test_a_run_that_succeeds_at_last_loses_its_error(tracker):
    tracker.open("healed", "k", "k", "fold").close("FAILED", "ValueError: broke")
    with tracker.open("healed", "k", "k", "fold") as run:
        pass
    found = tracker._client.get_run(run.id)
    assert (found.info.status, found.data.tags.get("la.error")) == ("FINISHED", None)


def test_an_experiment_in_the_bin_comes_back(tracker, workspace):
    tracker._client.delete_experiment(tracker.experiment("binned"))
    Tracker(workspace).open("binned", "k", "k", "fold")
    assert len(runs(tracker, "binned")) == 1


def test_an_unknown_kind_of_tracking_uri_is_the_users_to_mend(workspace):
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        Tracker(workspace, "gopher://nowhere")


def test_params_are_what_matters_and_what_differs(tmp_path):
    complete = TrainConfig(workspace=tmp_path, fold=1, seed=3)
    mixer = complete.model_copy(update={"class_example_mixer": False, "fold": 2, "device": "cuda"})
    assert varied([complete, mixer]) == ("class_example_mixer", "fold")
    params = training_params(mixer, varied([complete, mixer]))
    assert params == {
        "preset": "paper",
        "recipe": "small",
        "lr": 3e-4,
        "steps": 2000,
        "seed": 3,
        "fold": 2,
        "class_example_mixer": False,
    }
    hybrid = TrainConfig(workspace=tmp_path, preset="hybrid", prompts=("mask",))
    assert changed(hybrid) == ("prompts",), "what the recipe sets is not changed"
    assert metric_key(2, 1, "point_box") == "miou/2way-1shot-point_box"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A training that is pretended: its config, and what `train` returns."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake_store(tmp_path)
    config = TrainConfig(workspace=tmp_path, steps=20)
    run_dir = run_dir_of(config)
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(config.model_dump_json())
    (run_dir / "curve.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.0, "seen_miou": 7.0}\n')
    (run_dir / "result.json").write_text('{"episodes_digest": "abc"}')
    drawn = tmp_path / "episodes/protocol=la-train/fold=0/split=train/some"
    drawn.mkdir(parents=True)
    (drawn / "manifest.json").write_text('{"digest": "abc", "episodes": 12}')
    metrics = {"seen_miou": 8.0, "seen_miou_last": None}
    return config, SimpleNamespace(run_dir=run_dir, checkpoint=DEMO_CHECKPOINT, step=20, metrics=metrics)


def datasets(run):
    """(name, digest, context) -> source, of a run's inputs."""
    return {
        (one.dataset.name, one.dataset.digest, one.tags[0].value): json.loads(one.dataset.source)["uri"]
        for one in run.inputs.dataset_inputs
    }


def test_train_and_evaluate_log_what_they_did(trained, tmp_path):
    config, result = trained
    for _ in range(2):
        log_training(config, result, register="drawn")
    scores = SimpleNamespace(
        miou=25.0,
        std=1.0,
        interval=(24.0, 26.5),
        fb_iou=60.0,
        per_class={"cat": 25.0},
        episodes_digest="e",
        classes_drawn=1,
        method="la@20",
    )
    gallery = tmp_path / "extremes.jpg"
    gallery.write_bytes(b"a picture")
    evaluation = EvaluateConfig(workspace=tmp_path, checkpoint=result.run_dir, prompt="box", gallery=gallery)
    for _ in range(2):
        log_evaluation(evaluation, scores)
    tracker = Tracker(Workspace(tmp_path))
    (training,), (judged,) = runs(tracker, "train"), runs(tracker, "evaluate")
    assert history(tracker, training.info.run_id, "loss") == [(10, 2.0), (20, 1.0)]
    assert training.data.metrics["best_seen_miou"] == 8.0
    assert training.data.metrics["seen_miou"] == 7.0
    figures = {"std_seeds": 1.0, "low95": 24.0, "high95": 26.5, "fb_iou": 60.0}
    others = {f"statistics/{name}/1way-1shot-box": value for name, value in figures.items()}
    assert judged.data.metrics == {"miou/1way-1shot-box": 25.0} | others
    assert (judged.data.params["method"], judged.data.params["steps"]) == ("la@20", "20")
    assert set(training.data.params) <= set(judged.data.params)

    key = FeatureStore(Workspace(tmp_path).find_store()).key
    store, episodes = str(Workspace(tmp_path).features / key), str(tmp_path / "episodes/protocol=")
    assert datasets(training) == {
        ("features-vit_fake-480px", key, "training"): store,
        ("episodes-train-fold0-seed0", "abc", "training"): f"{episodes}la-train/fold=0/split=train/some",
    }
    assert datasets(judged) == {
        ("features-vit_fake-480px", key, "evaluation"): store,
        ("episodes-la-fold0-1way-1shot-box", "e", "evaluation"): f"{episodes}la-test/fold=0/split=val",
    }
    kept = {path.name: path for path in Path(judged.info.artifact_uri).iterdir()}
    assert json.loads(kept["per_class.json"].read_text()) == {"cat": 25.0}
    assert kept["extremes.jpg"].read_bytes() == b"a picture"
    settings = json.loads(kept["config.json"].read_text())
    assert settings["train"]["ema"] == config.ema
    assert settings["evaluate"][0]["prompt"] == "box"
    assert len(training.outputs.model_outputs) == 1
    (version,) = tracker._client.search_model_versions("name = 'drawn'")
    assert (int(version.version), version.run_id) == (1, training.info.run_id)


def test_a_training_is_followed_while_it_runs(trained, tmp_path, monkeypatch):
    config, result = trained
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    met = []

    def train(config, on_report, code):
        for point in ({"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}):
            on_report(point)
        (run,) = runs(Tracker(Workspace(tmp_path)), "train")
        met.append((run.info.status, run.data.metrics["loss"]))
        until = time.monotonic() + 1
        while (
            time.monotonic() < until
        ):  # at work, as an idle machine may well have a load of 0; others may run meanwhile
            hashlib.pbkdf2_hmac("sha256", b"", b"", 50_000)
        return result

    monkeypatch.setattr("pipelines.training.run.train", train)
    reports = []
    assert tracked_training(config, reports.append) is result
    assert met == [("RUNNING", 2.0)], "the first report at once, the next with those of two seconds"
    assert [report["step"] for report in reports] == [10, 20]
    tracker = Tracker(Workspace(tmp_path))
    (run,) = runs(tracker, "train")
    assert (run.info.status, history(tracker, run.info.run_id, "loss")) == ("FINISHED", [(10, 2.0), (20, 1.0)])
    assert 0 < run.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [(Stopped(15, Path("run")), "KILLED"), (KeyboardInterrupt(), "KILLED"), (ValueError("no"), "FAILED")],
    ids=["signal", "ctrl-c", "error"],
)
def test_a_training_that_ends_early_closes_its_run_and_a_mistake_leaves_none(trained, monkeypatch, error, status):
    config, _ = trained

    reports = []

    def train(config, on_report, code):
        for report in reports:
            on_report(report)
        raise error

    monkeypatch.setattr("pipelines.training.run.train", train)
    for logged in ([], [status]):
        with pytest.raises(type(error)):
            tracked_training(config)
        assert [run.info.status for run in runs(Tracker(Workspace(config.workspace)), "train")] == logged
        reports.append({"step": 10, "loss": 2.0})


def test_a_mistyped_workspace_stays_empty(tmp_path):
    with pytest.raises(InputError, match="holds no features"):
        tracked_training(TrainConfig(workspace=tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


def test_a_tracker_that_fails_meanwhile_ends_no_training(trained, monkeypatch, caplog):
    config, result = trained
    works = Tracker.open

    def train(config, on_report, code):
        monkeypatch.setattr(Tracker, "open", lambda *_: (_ for _ in ()).throw(TrackingError("gone")))
        on_report({"step": 10, "loss": 2.0})
        monkeypatch.setattr(Tracker, "open", works)
        return result

    monkeypatch.setattr("pipelines.training.run.train", train)
    tracked_training(config)
    assert caplog.text.count("MLflow did not take a record (gone)") == 1
    tracker = Tracker(Workspace(config.workspace))
    (run,) = runs(tracker, "train")
    assert (run.info.status, len(history(tracker, run.info.run_id, "loss"))) == ("FINISHED", 2)


def test_the_ui_names_the_pages_worth_opening(tracker, workspace):
    tracker.open("single", "k", "k", "fold")
    for name in ("earlier", "newest"):
        sweep = tracker.open("swept", name, name, "sweep")
        sweep.metrics({"miou/1way-1shot-box": 3.0})
        time.sleep(0.01)
    found = dict(pages(workspace, "http://server"))
    runs_of = "http://server/#/experiments/{}/runs?workflowType=machine_learning"
    single, swept = (runs_of.format(tracker.experiment(study)) for study in ("single", "swept"))
    assert found["single"] == single
    variants = f"searchFilter=tags.mlflow.parentRunId%20%3D%20%27{sweep.id}%27"
    order = "orderByKey=metrics.%60miou/1way-1shot-box%60&orderByAsc=false"
    assert found["newest by variant"] == f"{swept}&compareRunsMode=CHART&{variants}&{order}"
    assert "earlier by variant" not in found
    assert "Default" not in found


def test_the_ui_needs_a_database_and_a_free_port(tracker, workspace, tmp_path):
    with pytest.raises(InputError, match=r"has no mlflow\.db"):
        ui_command(Workspace(tmp_path))
    assert workspace.mlflow_uri in ui_command(workspace, port=5999)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            serve_ui(workspace, port=taken.getsockname()[1])
