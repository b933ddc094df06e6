import json
import math
import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from fake_sweep import fake_store
from pipelines.tracking.run_params import NONE, fold_params, metric_key

from la.errors import InputError
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore
from pipelines.tracking.mlflow_runs import Tracker, log_evaluation, log_training, serve_ui, ui_command
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


def test_logging_a_fold_twice_adds_nothing(tracker):
    for _ in range(2):
        run_id = tracker.log_fold_run("twice", "k", "k", {"a": 1}, {"miou": 3.5}, [{"step": 5, "loss": 1.0}])
    assert len(runs(tracker, "twice")) == 1
    assert history(tracker, run_id, "miou") == [(0, 3.5)]
    assert runs(tracker, "twice")[0].info.status == "FINISHED"


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


def test_params_have_the_same_keys_with_and_without_training(workspace):
    store = FeatureStore(workspace.find_store(fake_store(workspace.root)))
    judged = [EvaluateConfig(workspace=workspace.root, fold=1, ways=ways) for ways in (1, 2)]
    la = fold_params(store, "complete", TrainConfig(workspace=workspace.root, fold=1, seed=3), judged)
    baseline = fold_params(store, "prototype", None, [c.model_copy(update={"method": "prototype"}) for c in judged])
    assert set(la) == set(baseline)
    assert (la["method"], la["fold"], la["seed"], la["ways"]) == ("la", "1", 3, "1,2")
    assert (baseline["method"], baseline["fold"], baseline["seed"]) == ("prototype", "1", NONE)
    assert (la["store"], la["backbone"]) == (store.key, "vit_fake")
    assert metric_key(2, 1, "point_box") == "miou_2way_1shot_point_box"


def test_train_and_evaluate_log_what_they_did(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fake_store(tmp_path)
    config = TrainConfig(workspace=tmp_path, steps=20)
    run_dir = run_dir_of(config)
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(config.model_dump_json())
    (run_dir / "curve.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.0, "seen_miou": 7.0}\n')
    metrics = {"seen_miou": 8.0, "seen_miou_last": None}
    log_training(config, SimpleNamespace(run_dir=run_dir, checkpoint=run_dir / "best.pt", step=20, metrics=metrics))
    evaluation = EvaluateConfig(workspace=tmp_path, checkpoint=run_dir / "best.pt", prompt="box")
    result = SimpleNamespace(
        miou=25.0,
        std=1.0,
        interval=(24.0, 26.5),
        fb_iou=60.0,
        per_class={"cat": 25.0},
        episodes_digest="e",
        classes_drawn=1,
        method="la@20",
    )
    for _ in range(2):
        log_evaluation(evaluation, result)
    tracker = Tracker(Workspace(tmp_path))
    (trained,), (judged,) = runs(tracker, "train"), runs(tracker, "evaluate")
    assert history(tracker, trained.info.run_id, "loss") == [(10, 2.0), (20, 1.0)]
    assert trained.data.metrics["best_seen_miou"] == 8.0
    assert trained.data.metrics["seen_miou"] == 7.0
    figures = {"miou": 25.0, "std_seeds": 1.0, "low95": 24.0, "high95": 26.5, "fb_iou": 60.0}
    assert judged.data.metrics == {f"{name}_1way_1shot_box": value for name, value in figures.items()}
    assert (judged.data.params["method"], judged.data.params["steps"]) == ("la@20", "20")
    assert set(trained.data.params) <= set(judged.data.params)
    assert json.loads(next(Workspace(tmp_path).artifacts.rglob("per_class.json")).read_text()) == {"cat": 25.0}


def test_the_ui_needs_a_database_and_a_free_port(tracker, workspace, tmp_path):
    with pytest.raises(InputError, match=r"has no mlflow\.db"):
        ui_command(Workspace(tmp_path))
    assert workspace.mlflow_uri in ui_command(workspace, port=5999)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="--port"):
            serve_ui(workspace, port=taken.getsockname()[1])
