"""Training on Ray Train workers, as the command line starts it."""

import signal

import pytest
import torch

from la.errors import Diverged, InputError
from pipelines.bench.training_speed import bench_training
from pipelines.cluster import ray_session, wait_for
from pipelines.config import FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.runs.checkpoints import load
from pipelines.runs.identity import run_dir_of
from pipelines.store.featurize import featurize
from pipelines.training.run import train
from pipelines.training.stop import Stopped
from pipelines.training.train_on_ray import _takes_gpus
from sweeps.demo import BACKBONE, IMAGE_SIZE, WEIGHTS


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Features of a few scenes, and one Ray for all tests."""
    root = tmp_path_factory.mktemp("study")
    scenes = draw_scenes(root / "scenes", train_images=80, val_images=48)
    settings = {"backbone": BACKBONE, "weights": WEIGHTS, "image_size": IMAGE_SIZE}
    featurize(FeaturizeConfig(workspace=root, coco_dir=scenes, **settings))
    with ray_session():
        yield root


def test_two_ray_workers_train_report_and_finish(workspace):
    config = TrainConfig(
        workspace=workspace,
        preset="debug",
        workers=2,
        steps=12,
        warmup_steps=2,
        batches=((2, 1, 1), (2, 2, 1)),
        train_batches=12,
        val_episodes=3,
        val_every=6,
        schedule="constant",
        threads=1,
    )
    reports = []
    result = train(config, reports.append)
    assert result.step == 12
    assert [r["step"] for r in reports] == [6, 10, 12], "one report a step, of rank 0"
    assert result.checkpoint.exists()
    longer = train(config.model_copy(update={"steps": 14}), reports.append)
    assert (longer.step, longer.run_dir) == (14, result.run_dir)
    assert [r["step"] for r in reports] == [6, 10, 12, 14]


def test_ctrl_c_ends_workers_with_a_checkpoint_of_the_step_under_way(workspace):
    settings = {"workers": 1, "steps": 400, "batches": ((2, 1, 1),), "train_batches": 12, "threads": 1}
    config = TrainConfig(workspace=workspace, preset="debug", val_every=1000, checkpoint_every=1000, **settings)

    def ctrl_c(report):
        if report["step"] == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="SIGINT") as stopped:
        train(config, ctrl_c)
    assert stopped.value.exit_code == 130
    assert 10 <= load(run_dir_of(config) / "last.pt")["step"] < 400


def test_training_that_diverges_on_workers_ends_with_one_message(workspace):
    settings = {"workers": 2, "steps": 40, "batches": ((2, 1, 1),), "train_batches": 12, "threads": 1}
    config = TrainConfig(workspace=workspace, preset="debug", lr=1e30, warmup_steps=0, val_every=1000, **settings)
    with pytest.raises(Diverged, match=r"^Training diverged: step \d+ has the loss"):
        train(config)


def test_workers_take_gpus_where_the_cluster_has_them_whatever_this_machine_has(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert _takes_gpus("auto", alone=False)
    assert not _takes_gpus("cpu", alone=False)
    assert _takes_gpus("auto", alone=True) == torch.cuda.is_available()
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert not _takes_gpus("auto", alone=False)
    assert _takes_gpus("cuda", alone=False), "its nodes are waited for"


def test_nodes_of_a_cluster_are_waited_for_and_this_machine_alone_has_what_it_has(monkeypatch, capsys):
    there, asked = iter([{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]), []
    monkeypatch.setattr("ray.cluster_resources", lambda: next(there))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr("time.sleep", lambda _: None)
    wait_for("--workers 2", 2, {"CPU": 4, "GPU": 1}, alone=False)
    assert asked == [[{"CPU": 4, "GPU": 1}] * 2, []]
    assert capsys.readouterr().err.count("--workers 2: Ray has 2 CPUs of 8, Ray has 0 GPUs of 2. Waiting") == 1
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(InputError, match="--workers 3: Ray has 2 CPUs of 3"):
        wait_for("--workers 3", 3, {"CPU": 1}, alone=True)
    wait_for("--workers 3", 3, {"CPU": 1}, alone=False, stop=lambda: True)


def test_training_is_measured_without_ray_with_one_worker_and_with_two(workspace):
    runs = {path.name for path in (workspace / "runs").glob("*")}
    one, two = bench_training(workspace, "debug", ((2, 1, 1), (2, 2, 1)), steps=10, repeats=1)
    rates = [one.details[name] for name in ("bare steps/s", "one worker", "two workers")]
    assert all(rate > 0 for rate in rates)
    assert one.ratio == pytest.approx(rates[1] / rates[0])
    assert two.ratio == pytest.approx(2 * rates[2] / rates[1])
    assert runs == {path.name for path in (workspace / "runs").glob("*")}, "a user's runs stay his own"
