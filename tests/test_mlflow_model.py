"""A checkpoint as an MLflow model: what it gives by itself, far from the workspace, is what `predict` gives."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import la
from la.backbone.vit import identify_weights, load_backbone
from la.errors import InputError
from la.model.label_anything import build, preset, save_state
from la.predictor.checkpoint import read_checkpoint
from pipelines.config import PredictConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.predict.segment_folder import predict
from pipelines.tracking.mlflow_model import SCRIPT, example, log_model
from pipelines.tracking.mlflow_runs import Tracker
from pipelines.workspace import Workspace

LOADED = """
import sys, mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"predictor": {"device": "cpu"}})
model.predict(pandas.read_parquet(sys.argv[2])).to_parquet(sys.argv[3])
import la
print(la.__file__, "pipelines" in sys.modules)
"""


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """The demo's checkpoint, registered as `shapes`; its tracker, run and URI."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(Workspace(tmp_path / "workspace"))
    with tracker.open("train", "k", "k", "fold") as run:
        uri = log_model("demo", tracker, run.id, "shapes")
    return tracker, run.id, uri


def test_a_model_without_workspace_or_project_gives_the_masks_of_predict(logged, tmp_path):
    scenes = draw_scenes(tmp_path / "scenes", train_images=80, val_images=12)
    content = json.loads((scenes / "annotations" / "instances_val2017.json").read_text())
    files = {image["id"]: scenes / "val2017" / image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    supports = sorted(files)[:2]
    annotations = [one for one in content["annotations"] if one["image_id"] in supports and not one.get("iscrowd")]
    (scenes / "annotations" / "support.json").write_text(json.dumps(content | {"annotations": annotations}))
    queries = sorted(files)[2:7]
    (tmp_path / "queries").mkdir()
    for photo in queries:
        shutil.copy(files[photo], tmp_path / "queries")
    predict(
        PredictConfig(
            checkpoint="demo",
            support=scenes / "annotations" / "support.json",
            support_images=scenes / "val2017",
            images=tmp_path / "queries",
            out=tmp_path / "out",
            device="cpu",
        )
    )

    rows = []
    for photo in supports:
        prompts: dict[str, list] = {}
        for one in (one for one in annotations if one["image_id"] == photo):
            prompts.setdefault(names[one["category_id"]], []).append(one)
        rows.append((files[photo].read_bytes(), json.dumps(prompts)))
    rows += [(files[photo].read_bytes(), None) for photo in queries]
    pd.DataFrame(rows, columns=["photo", "prompts"]).to_parquet(tmp_path / "asked.parquet")
    model = mlflow.artifacts.download_artifacts(logged[2], dst_path=str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "workspace")
    command = [sys.executable, "-c", LOADED, model, tmp_path / "asked.parquet", tmp_path / "answer.parquet"]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [f"{model.rstrip('/')}/code/la/__init__.py", "False"]

    answer = pd.read_parquet(tmp_path / "answer.parquet")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(answer) == len(queries)
    for photo, row in zip(queries, answer.to_dict("records"), strict=True):
        mask = np.asarray(Image.open(io.BytesIO(row["mask"])))
        expected = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{files[photo].stem}.png"))
        assert (mask == expected).all()
        found = {one["category_id"]: one["score"] for one in results if one["image_id"] == int(files[photo].stem)}
        scores = dict(zip(json.loads(row["classes"]), json.loads(row["scores"]), strict=True))
        assert {c: pytest.approx(scores[names[c]], abs=1e-4) for c in found} == found
    assert any(np.asarray(Image.open(io.BytesIO(mask))).any() for mask in answer["mask"])


def test_the_registry_has_the_model_with_signature_example_and_requirements(logged):
    tracker, run_id, _ = logged
    mlflow.set_tracking_uri(tracker.uri)
    model = mlflow.pyfunc.load_model("models:/shapes/1")
    assert model.metadata.run_id == run_id
    assert model.metadata.signature.inputs.input_names() == ["photo", "prompts"]
    assert model.metadata.signature.outputs.input_names() == ["mask", "classes", "scores"]
    assert model.input_example.equals(example())
    answer = model.predict(model.input_example)
    mask = np.asarray(Image.open(io.BytesIO(answer["mask"][0])))
    assert mask[70, 70] == 1, "the middle of the disc"
    assert mask[10, 120] == 0, "a corner"
    with pytest.raises(InputError, match="no supports"):
        model.predict(model.input_example[1:])


def test_the_requirements_are_what_the_model_imports(logged):
    listed = Path(mlflow.pyfunc.get_model_dependencies(logged[2])).read_text().splitlines()
    assert all(line == f"{line.split('==')[0]}=={version(line.split('==')[0])}" for line in listed)
    imported = set()
    for path in [SCRIPT, *Path(la.__file__).parent.rglob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    packages = {{"PIL": "pillow"}.get(name, name) for name in imported - sys.stdlib_module_names - {"la"}}
    assert {line.split("==")[0] for line in listed} == packages


def test_a_backbone_of_a_file_is_kept_or_named_when_the_model_is_loaded(logged, tmp_path):
    tracker, run_id, _ = logged
    tiny = tmp_path / "tiny.safetensors"
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tiny)
    vit = load_backbone("vit_tiny_patch16_224", 64, tiny, "cpu")
    features = read_checkpoint("demo").features | {"backbone": vit.name, "image_size": 64}
    named = {"weights": identify_weights(vit.name, tiny), "weights_digest": vit.weights_digest}
    model = build(preset("paper", channels=vit.channels, dim=32))
    torch.save(save_state(model) | {"step": 1, "features": features | named}, tmp_path / "best.pt")
    kept = mlflow.pyfunc.load_model(log_model(tmp_path, tracker, run_id, weights=tiny))
    without = log_model(tmp_path, tracker, run_id)
    with pytest.raises(InputError, match="Pass that file as weights"):
        mlflow.pyfunc.load_model(without)
    given = mlflow.pyfunc.load_model(without, model_config={"predictor": {"weights": str(tiny)}})
    assert given.predict(example()).equals(kept.predict(example()))


def test_a_checkpoint_that_is_none_is_named(logged, tmp_path):
    (tmp_path / "best.pt").write_text("no checkpoint")
    with pytest.raises(InputError, match=r"best\.pt is not a Label Anything checkpoint"):
        log_model(tmp_path, *logged[:2])
