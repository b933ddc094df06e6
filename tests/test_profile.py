"""What shots cost: each cell in a process of its own, and honest about cells it cannot fill."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cli
from la.errors import InputError
from pipelines.config import FeaturizeConfig, ProfileConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.evaluation.profile import ProfileResult, ProfileRow, run_profile
from pipelines.evaluation.profile_cell import Cell, Memory, measure
from pipelines.store.featurize import featurize
from pipelines.workspace import Workspace
from tests.conftest import TINY

FAST = {"preset": "debug", "repeats": 1, "threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_weights):
    root = tmp_path_factory.mktemp("profile")
    scenes = draw_scenes(root / "scenes", train_images=100, val_images=10)
    featurize(FeaturizeConfig(workspace=root, coco_dir=scenes, weights=tiny_weights, **TINY))
    return root


def test_every_cell_is_measured_and_written(workspace):
    flags = {"shots": "1,2", "preset": "debug", "repeats": "1", "threads": "1", "device": "cpu", "workspace": workspace}
    arguments = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    printed = CliRunner().invoke(cli.app, ["profile", *arguments], env={"COLUMNS": "200"})
    assert printed.exit_code == 0, printed.output
    written = json.loads((workspace / "artifacts" / "profile.json").read_text())
    rows = written["rows"]
    assert [(r["method"], r["shots"], r["backbone"]) for r in rows] == [
        (method, shots, backbone)
        for backbone in (False, True)
        for method in ("la", "hybrid", "affinity")
        for shots in (1, 2)
    ]
    for row in rows[:6]:
        assert row["seconds"] > 0
        assert row["peak_mb"] >= row["loaded_mb"] > 0
        assert row["with_episode_mb"] > 0
        assert row["episode_mb"] == (5 * row["shots"] + 1) * 8 * 8 * 128 * 2 / 1e6  # float16 of supports and query
    for row in rows[6:]:
        assert row["seconds"] is None
        assert "Pass --weights FILE" in row["note"]
    assert printed.output.count("Pass --weights FILE") == 1
    assert "DCAMA 6.72" in printed.output


def test_photos_go_through_the_backbone(workspace, tiny_weights):
    store = Workspace(workspace).find_store()
    measured = measure(Cell(store, "la", 2, True, weights=tiny_weights, **FAST))
    assert measured.seconds > 0
    assert measured.episode_mb == (5 * 2 + 1) * 3 * 64 * 64 / 1e6  # bytes of photos


def test_bars_compare_memory_beyond_the_features(tmp_path):
    def row(method, shots, peak):
        return ProfileRow(method, shots, False, ready_mb=100.0, loaded_mb=110.0, peak_mb=peak, episode_mb=10.0 * shots)

    rows = [row("la", 1, 120.0), row("la", 10, 220.0), row("affinity", 1, 120.0), row("affinity", 10, 360.0)]
    beyond, growth, linear = ProfileResult(rows, tmp_path).summary()
    assert "affinity over la: 8.0" in beyond
    assert "reached" in beyond
    assert "la: 2.00 x" in growth
    assert "NOT less than linear" in linear


def test_a_peak_is_seen_after_it_is_over():
    memory = Memory(torch.device("cpu"))
    np.ones(25_000_000).sum()  # 200 MB before do not count
    before = memory.now()
    memory.reset()
    np.ones(12_500_000).sum()
    if memory.source == "VmHWM":
        assert 90e6 < memory.peak() - before < 150e6
    else:
        assert memory.peak() - before > 90e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["la", "dcama"]}, "--methods names dcama; choose from la, hybrid, prototype"),
        ({"fold": 4}, "fold is 4"),
        ({"preset": "huge"}, "preset huge is unknown"),
        ({"checkpoint": Path("nowhere")}, "checkpoint .*/nowhere is not there"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(workspace, change, message):
    with pytest.raises(InputError, match=message):
        run_profile(ProfileConfig(workspace=workspace, **{"shots": [1], "methods": ["la"]} | FAST | change))
