"""Checkpoints for prediction: a run's file, or the small one that comes with the product."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from la.backbone.vit import Backbone, identify_weights, load_backbone
from la.errors import InputError
from la.model.hybrid import Hybrid
from la.model.label_anything import LabelAnything, load_state

DEMO = "demo"
# Package data, found by its place: a frozen ViT of drawn scenes, and a hybrid trained on its features.
_HERE = Path(__file__).parent
DEMO_CHECKPOINT = _HERE / "hybrid_demo.safetensors"
BUNDLED_WEIGHTS = {"vit_demo_patch8_128": _HERE / "vit_demo.safetensors"}
_HEADER = "label_anything"  # the key in a .safetensors of all but the tensors, as JSON


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode, and what a checkpoint says of itself.

    `features` names backbone, weights, weights_digest, image_size, preprocessing and layer; None where the checkpoint
    does not say, as released ones. `digest` tells its weights from others. `training` holds the settings of its
    training that it tells, among them `fold`.
    """

    model: LabelAnything | Hybrid
    features: dict[str, Any] | None
    name: str
    digest: str
    training: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(source: Path | str) -> Checkpoint:
    """A run's folder or `best.pt`, a .safetensors with all but the tensors as JSON in its header, or "demo".

    Raises InputError for one that is missing or no checkpoint.
    """
    path = DEMO_CHECKPOINT if str(source) == DEMO else Path(source)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"checkpoint {path} is not there. Pass a run's folder, its best.pt, or {DEMO}.")
    try:
        saved = _of_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        model = load_state(saved).eval().requires_grad_(False)
        features = saved.get("features")
        training = {"fold": saved.get("fold")} | json.loads(saved.get("train_config") or "{}")
        name = f"{training.get('preset', saved.get('kind', 'la'))}@{saved.get('step', 0)}"
        return Checkpoint(model, features, name, _digest(saved["state"]), training)
    except Exception as error:  # the unpickler's own, which is not exported, among many
        raise InputError(f"checkpoint {path} is not a Label Anything checkpoint ({error!s:.160}).") from error


def backbone_of(
    checkpoint: Checkpoint,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    backbone: str | None = None,
    image_size: int | None = None,
) -> Backbone:
    """The frozen ViT whose features the model was trained on.

    `backbone` and `image_size` are for checkpoints that do not name theirs. Raises InputError where these are missing,
    for weights that cannot be had, that are others than those it was trained on, or whose features have other channels.
    """
    known = checkpoint.features
    if known is None and (backbone is None or image_size is None):
        raise InputError(
            "the checkpoint does not say whose features it takes. Pass backbone and image_size as it was trained "
            "with; the released models take vit_base_patch16_224.mae at 480."
        )
    name = known["backbone"] if known else backbone
    size = known["image_size"] if known else image_size
    weights = weights or BUNDLED_WEIGHTS.get(name)
    if weights is None and known and known["weights"].startswith("sha256:"):
        raise InputError(
            f"the checkpoint takes features of {name} with weights from a file ({known['weights'][:19]}...). Pass that "
            "file as weights."
        )
    vit = load_backbone(name, size, weights, device)
    if known and vit.weights_digest != known["weights_digest"] and identify_weights(name, weights) != known["weights"]:
        raise InputError(
            f"weights {weights or 'from the hub'} are other weights of {name} ({vit.weights_digest[:12]}) than those "
            f"the checkpoint was trained with ({known['weights_digest'][:12]}). Pass the same."
        )
    if vit.channels != checkpoint.model.config.channels:
        raise InputError(
            f"backbone {name} gives features of {vit.channels} channels, but the checkpoint takes "
            f"{checkpoint.model.config.channels}. Pass the backbone it was trained with."
        )
    return vit


def write_safetensors(path: Path, saved: Mapping[str, Any]) -> None:
    """A checkpoint without pickle: its tensors, the rest as JSON in the header."""
    rest = {name: value for name, value in saved.items() if name != "state"}
    state = {name: tensor.contiguous() for name, tensor in saved["state"].items()}
    safetensors.torch.save_file(state, path, {_HEADER: json.dumps(rest)})


def _of_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[_HEADER])
        return header | {"state": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118  no mapping


def _digest(state: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + state[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
