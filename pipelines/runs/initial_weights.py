"""The weights that fine-tuning starts from: those of another run, of a checkpoint, or of an imported official one."""

from dataclasses import asdict

from torch import Tensor

from la.errors import InputError
from la.model.hybrid import HybridConfig
from la.model.label_anything import ModelConfig
from pipelines.config import TrainConfig
from pipelines.store.feature_shards import StoreSettings

SHAPE_NEUTRAL = {"absent_pairs", "drop_maps", "mask_px"}  # any weights go with any value of these


def initial_weights(
    config: TrainConfig, shape: ModelConfig | HybridConfig, features: StoreSettings
) -> dict[str, Tensor]:
    """The state dict of the checkpoint `config.init` names.

    Raises InputError where it is none, is of another model than `shape`, takes other features, or has seen the classes
    that this training leaves unseen.
    """
    from la.predictor.checkpoint import read_checkpoint  # it loads timm

    checkpoint = read_checkpoint(config.init)
    there, now = (asdict(each) | {"kind": type(each).__name__} for each in (checkpoint.model.config, shape))
    names = sorted((there.keys() | now.keys()) - SHAPE_NEUTRAL)
    if there["kind"] != now["kind"]:
        names = ["kind"]
    other = [f"{n} is {there.get(n)} there, {now.get(n)} here" for n in names if there.get(n) != now.get(n)]
    if other:
        raise InputError(
            f"--init {config.init} is another model than preset {config.preset}: {'; '.join(other)}. Pass the preset "
            "and the sizes that it was trained with, and features of the same backbone."
        )
    known, here = checkpoint.features or {}, features.model_dump()
    if other := [n for n in ("backbone", "weights", "layer") if known and known[n] != here[n]]:
        raise InputError(
            f"--init {config.init} was trained on other features: {other[0]} {known[other[0]]}, in the store "
            f"{here[other[0]]}. Featurize as it was trained, or start from another checkpoint."
        )
    trained = {"fold": None, "fold_lists": "interleaved", "classes": "seen"} | dict(checkpoint.training)
    other = [n for n in ("fold", "fold_lists", "classes") if trained[n] != getattr(config, n)]
    if config.classes == "seen" and trained["fold"] is not None and other:
        raise InputError(
            f"--init {config.init} was trained with {other[0]} {trained[other[0]]}, so it has seen classes that "
            f"{other[0]} {getattr(config, other[0])} leaves unseen. Take one of the same fold, or pass "
            "--fold-classes all."
        )
    return checkpoint.model.state_dict()
