"""A checkpoint as an MLflow model, which needs neither the workspace nor this project to be installed."""

import io
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from PIL import Image, ImageDraw

import la
from la.errors import InputError
from la.predictor.checkpoint import DEMO, DEMO_CHECKPOINT, write_safetensors
from pipelines.tracking.mlflow_runs import Tracker

SCRIPT = Path(__file__).with_name("example_segmenter.py")
REQUIRED = ("mlflow", "torch", "timm", "numpy", "pandas", "pillow", "pycocotools", "safetensors")  # what both import
SIGNATURE = ModelSignature(
    Schema([ColSpec("binary", "photo"), ColSpec("string", "prompts", required=False)]),
    Schema([ColSpec("binary", "mask"), ColSpec("string", "classes"), ColSpec("string", "scores")]),
)


def log_model(
    checkpoint: Path | str, tracker: Tracker, run_id: str, register: str | None = None, weights: Path | None = None
) -> str:
    """Log a run's folder, its best.pt or "demo" as the model of an MLflow run; returns the model's URI.

    What it takes and gives is told in `example_segmenter.py`. A backbone of the hub is had from there when the model is
    loaded. One from a file is kept in the model where `weights` names the file; else who loads the model names it:
    `mlflow.pyfunc.load_model(uri, model_config={"predictor": {"weights": "dinov2.safetensors"}})`. `register` adds a
    version to the model of that name in the registry. Raises InputError for a checkpoint that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {"source": str(_without_pickle(checkpoint, Path(folder) / "heads.safetensors"))}
        artifacts |= {"weights": str(weights)} if weights else {}
        mlflow.set_tracking_uri(tracker.uri)
        with mlflow.start_run(run_id=run_id):
            return mlflow.pyfunc.log_model(
                name="segmenter",
                python_model=str(SCRIPT),
                code_paths=[str(Path(la.__file__).parent)],
                artifacts=artifacts,
                pip_requirements=[f"{name}=={version(name)}" for name in REQUIRED],
                model_config={"predictor": {}},  # an empty one logs no params, yet lets loaders give some
                signature=SIGNATURE,
                input_example=example(),
                registered_model_name=register,
            ).model_uri


def example() -> pd.DataFrame:
    """A support with a box around a disc, and a photo of another disc to segment."""
    prompts = json.dumps({"disc": [{"bbox": [20, 20, 60, 60]}]})
    return pd.DataFrame({"photo": [_disc(20), _disc(40)], "prompts": [prompts, None]})


def _disc(left: int) -> bytes:
    picture, file = Image.new("RGB", (128, 128), "seagreen"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((left, left, left + 60, left + 60), "gold")
    picture.save(file, "PNG")
    return file.getvalue()


def _without_pickle(checkpoint: Path | str, file: Path) -> Path:
    path = DEMO_CHECKPOINT if str(checkpoint) == DEMO else Path(checkpoint)
    path = path / "best.pt" if path.is_dir() else path
    if path.suffix == ".safetensors":
        return path
    try:
        write_safetensors(file, torch.load(path, "cpu", weights_only=True))
    except Exception as error:  # the unpickler's own, which is not exported, among many
        raise InputError(f"checkpoint {path} is not a Label Anything checkpoint ({error!s:.160}).") from error
    return file
