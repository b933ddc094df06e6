"""Checkpoints: damage is recognised, the one before is used, a full disk and a signal lose nothing."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

import pipelines.training.loop as training
from la.errors import InputError
from pipelines.config import EvaluateConfig
from pipelines.evaluation.evaluate import evaluate
from pipelines.runs.checkpoints import (
    CheckpointWarning,
    DamagedCheckpoint,
    load,
    load_last,
    save,
    save_last,
)
from pipelines.runs.identity import run_dir_of
from pipelines.training.run import train
from pipelines.training.stop import Stopped
from pipelines.workspace import Workspace
from tests.test_training import featurized_scenes, settings

EARLIER = Path(__file__).parent / "golden" / "earlier_run"
CONTENT = {"state": {"weight": torch.arange(3000.0), "bias": torch.ones(7)}, "at": {"step": 3, "losses": [0.5]}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return featurized_scenes(tmp_path_factory.mktemp("study"), train_images=80, val_images=48)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return one == other


def parts_that_count(run_dir):
    """All of the last checkpoint but its times."""
    saved = load(run_dir / "last.pt")
    for point in saved["at"]["curve"]:
        for name in ("seconds", "episodes_per_s"):
            point.pop(name)
    for name in ("seconds", "starts"):
        saved["at"].pop(name)
    return saved


def take_earlier_run(run_dir):
    """Put the run of an earlier version into `run_dir`, trained on the features of its workspace."""
    shutil.copytree(EARLIER, run_dir)
    key = Workspace(run_dir.parents[1]).find_store().name
    for name in ("best.pt", "last.pt"):
        saved = torch.load(run_dir / name, weights_only=True)
        for content in (saved, saved.get("best")):
            if content:
                content["store"] = key
        torch.save(saved, run_dir / name)


def test_no_flipped_byte_is_read_as_something_else(tmp_path):
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    whole, draw, found = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            assert same(load(path), CONTENT)  # of no effect: padding between the parts
        except DamagedCheckpoint:
            found += 1
    assert found > 200


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_damaged(tmp_path, share):
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match=r"last\.pt is cut short"):
        load(path)


def test_the_last_two_are_kept_and_a_damaged_one_is_set_aside(tmp_path):
    for step in (1, 2, 3):
        save_last(tmp_path, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.previous.pt", "last.pt"]
    assert load_last(tmp_path) == {"step": 3}
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.warns(CheckpointWarning, match=r"last\.pt is cut short.*goes on from the checkpoint before"):
        assert load_last(tmp_path) == {"step": 2}
    assert (tmp_path / "last.damaged").read_bytes() == b"nothing"
    save_last(tmp_path, {"step": 4})
    assert load(tmp_path / "last.pt") == {"step": 4}


def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    save_last(tmp_path, {"step": 1})
    real = os.replace

    def killed(source, target):
        if source.name == "last.new.pt":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_last(tmp_path, {"step": 2})
    assert load_last(tmp_path) == {"step": 2}
    save_last(tmp_path, {"step": 3})
    assert [load(tmp_path / name)["step"] for name in ("last.pt", "last.previous.pt")] == [3, 1]


def test_a_file_that_cannot_be_written_is_the_users_to_mend_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "last.pt"
    save(path, CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"nothing more can be written there.*Free some space"):
            save(path, CONTENT | {"at": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(load(path), CONTENT)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_disk_that_does_not_answer_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    save_last(tmp_path, CONTENT)

    def stale(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_bytes", stale)
        with pytest.raises(OSError, match="Stale"):
            load_last(tmp_path)
    assert same(load_last(tmp_path), CONTENT)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_that_an_earlier_version_left_goes_on_and_is_evaluated(workspace):
    """One stopped at step 4 of 8, when layers had other names and the architecture followed from a width."""
    own = {"preset": "debug", "dim": 16, "depth": 2, "token_pool": False, "val_every": 4, "steps": 8}
    config = settings(workspace, seed=3, **own)
    whole = parts_that_count(train(config).run_dir)
    run_dir = run_dir_of(config)
    shutil.rmtree(run_dir)
    take_earlier_run(run_dir)
    tested = EvaluateConfig(workspace=workspace, checkpoint=run_dir, seeds=1, episodes=2, threads=1)
    assert evaluate(tested).method == "debug@4"
    assert train(config).step == 8
    assert json.loads((run_dir / "result.json").read_text())["starts"] == [0, 4]
    resumed = parts_that_count(run_dir)
    assert resumed["training"].keys() == whole["training"].keys()
    for name, weights in whole["training"].items():
        torch.testing.assert_close(resumed["training"][name], weights, atol=2e-3, rtol=0)


def test_a_resume_reads_the_last_checkpoint_once(workspace, monkeypatch):
    config = settings(workspace, seed=10)
    run_dir = train(config).run_dir
    (run_dir / "result.json").unlink()
    read = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    train(config)
    assert read.count("last.pt") == 1


def test_training_whose_last_checkpoint_is_damaged_ends_as_if_nothing_had_happened(workspace):
    config = settings(workspace, seed=11)
    run_dir = train(config).run_dir
    expected = parts_that_count(run_dir)
    (run_dir / "result.json").unlink()
    os.truncate(run_dir / "last.pt", 1000)
    (run_dir / "best.pt").write_bytes(b"")
    with pytest.warns(CheckpointWarning) as told:
        assert train(config).step == 12
    assert [str(w.message).split()[0] for w in told if w.category is CheckpointWarning] == [
        str(run_dir / name) for name in ("last.pt", "best.pt")
    ]
    assert same(parts_that_count(run_dir), expected)
    assert same(load(run_dir / "best.pt"), expected["best"])


def test_a_finished_runs_best_is_restored_by_the_same_command(workspace):
    config = settings(workspace, seed=12)
    run = train(config)
    expected = load(run.checkpoint)
    os.truncate(run.checkpoint, 100)
    tested = EvaluateConfig(workspace=workspace, checkpoint=run.run_dir, seeds=1, episodes=2, threads=1)
    with pytest.raises(InputError, match=r"cut short.*same `train` command again"):
        evaluate(tested)
    with pytest.warns(CheckpointWarning, match=r"restored from last\.pt"):
        train(config)
    assert same(load(run.checkpoint), expected)
    os.truncate(run.checkpoint, 100)
    os.truncate(run.run_dir / "last.pt", 100)
    (run.run_dir / "last.previous.pt").unlink()
    with (
        pytest.raises(InputError, match=r"No whole last\.pt is there to restore it from\. Remove"),
        pytest.warns(CheckpointWarning),
    ):
        train(config)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_training_with_a_checkpoint_of_the_step_under_way(workspace, signum):
    config = settings(workspace, seed=13 + signum, checkpoint_every=1000, val_every=1000)
    expected = parts_that_count(train(config).run_dir)
    run_dir = run_dir_of(config)
    for file in (*run_dir.glob("*.pt"), run_dir / "result.json"):
        file.unlink()

    def told_at_ten(report):
        if report["step"] == 10:
            signal.raise_signal(signum)

    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match="the same command goes on") as stopped:
        train(config, told_at_ten)
    assert stopped.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    assert load(run_dir / "last.pt")["step"] == 10
    train(config)
    assert same(parts_that_count(run_dir), expected)
    assert json.loads((run_dir / "result.json").read_text())["starts"] == [0, 10]


@pytest.mark.parametrize("step", [6, 12])
def test_a_validation_that_a_signal_cuts_short_is_done_by_the_next_start(workspace, monkeypatch, step):
    config = settings(workspace, seed=20 + step)
    expected = parts_that_count(train(config).run_dir)
    run_dir = run_dir_of(config)
    for file in (*run_dir.glob("*.pt"), run_dir / "result.json"):
        file.unlink()
    real, calls = training.score, []

    def score(*arguments, **named):
        calls.append(arguments)
        if len(calls) == step // 6:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    monkeypatch.setattr(training, "score", score)
    with pytest.raises(Stopped):
        train(config)
    saved = load(run_dir / "last.pt")
    assert (saved["step"], saved["at"]["pending"]) == (step, True)
    train(config)
    assert same(parts_that_count(run_dir), expected)


def test_training_outside_the_main_thread_leaves_signals_alone(workspace):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(train(settings(workspace, seed=40, steps=2))))
    thread.start()
    thread.join()
    assert ended[0].step == 2
