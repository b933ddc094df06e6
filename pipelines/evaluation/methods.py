"""Methods to evaluate by name: trained checkpoints, their variants at test time, and the training-free baselines."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from la.data.folds import fold_classes
from la.episodes.batch import EpisodeBatch
from la.episodes.protocols import protocol_of
from la.errors import InputError
from la.evaluation.baselines import BASELINES
from la.evaluation.test_time import averaged_over_draws, with_flips
from la.model.hybrid import Hybrid
from la.model.label_anything import LabelAnything, load_state
from pipelines.config import EvaluateConfig
from pipelines.runs.checkpoints import DamagedCheckpoint, load
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace

Method = Callable[[EpisodeBatch], Tensor]
Model = LabelAnything | Hybrid


def find_method(config: EvaluateConfig, store: FeatureStore, device: torch.device) -> tuple[Method, str, int | None]:
    """What to call on batches, its name with the step of its checkpoint, and the side of its mask prompts in pixels.

    Raises InputError for an unknown method and for a checkpoint that is missing, that has seen the classes it would be
    tested on or that was trained on other features.
    """
    if config.method in BASELINES:
        method, name, mask_px = BASELINES[config.method], config.method, None
        if config.pool_draws:
            raise InputError(f"--pool-draws is of trained models; --method {config.method} is none.")
    elif config.method == "la":
        model, name = load_checkpoint(config, store, device)
        if isinstance(model, Hybrid) and config.pool_draws:
            raise InputError(f"--pool-draws is not for {name}: a hybrid has no token pool.")
        method = partial(averaged_over_draws, model, draws=config.pool_draws) if config.pool_draws else model
        mask_px = model.config.mask_px
    else:
        raise InputError(f"--method {config.method} is unknown. Choose la or one of {', '.join(BASELINES)}.")
    return (partial(with_flips, method) if config.flips else method), name, mask_px


def load_checkpoint(config: EvaluateConfig, store: FeatureStore, device: torch.device) -> tuple[Model, str]:
    """The model of `config.checkpoint`, or of the fold's last run, and its name; raises as `find_method` does."""
    path = config.checkpoint or latest_run(config, store)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--checkpoint {path} is not there. Pass a run's folder or its best.pt.")
    try:
        saved = load(path)
    except DamagedCheckpoint as error:
        raise InputError(
            f"--checkpoint: {error} Run the same `train` command again, which restores best.pt from the run's last.pt, "
            "or choose another checkpoint."
        ) from error
    try:
        model = load_state(saved).to(device).eval()
    except Exception as error:
        raise InputError(f"--checkpoint {path} is not a Label Anything checkpoint ({error}).") from error
    training = json.loads(saved.get("train_config", "{}"))
    generalist = training.get("classes") == "all"
    if not generalist:
        categories = store.dataset(config.split).categories
        _, unseen = fold_classes(categories, saved["fold"], training.get("fold_lists", "interleaved"))
        tested = fold_classes(categories, config.fold, protocol_of(config.protocol).folds)[1]
        if set(tested) != set(unseen):
            raise InputError(
                f"--checkpoint {path} was trained on fold {saved['fold']}, so it has seen classes of fold "
                f"{config.fold} of protocol {config.protocol}. Use --fold {saved['fold']} or another checkpoint; for "
                "contiguous folds, train with --fold-lists contiguous."
            )
    if saved["store"] is None and model.config.channels != store.info.channels:
        raise InputError(
            f"--checkpoint {path} takes features of {model.config.channels} channels, but those of store {store.key} "
            f"({store.info.backbone}) have {store.info.channels}. Featurize with the backbone it was trained on."
        )
    if saved["store"] not in (None, *store.info.settings.keys_alike):
        raise InputError(
            f"--checkpoint {path} was trained on features {saved['store']}, but the store is {store.key}: another "
            f"backbone, image size or data set. Pass --store {saved['store']}, or featurize with the same settings."
        )
    name = f"{training.get('preset', 'la')}@{saved['step']}"
    return model, f"generalist {name}" if generalist else name


def with_checkpoint(config: EvaluateConfig) -> EvaluateConfig:
    """The settings with their checkpoint named, so that they stay true when another run is finished."""
    if config.method != "la" or config.checkpoint:
        return config
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    return config.model_copy(update={"checkpoint": latest_run(config, store)})


def latest_run(config: EvaluateConfig, store: FeatureStore) -> Path:
    """The run finished last that has not seen the classes to be tested; InputError where there is none."""
    workspace, lists, finished = Workspace(config.workspace), protocol_of(config.protocol).folds, []
    for result in workspace.runs.glob("*/result.json"):
        training = json.loads((result.parent / "config.json").read_text())
        trained_on = training["fold"], training.get("classes", "seen"), training.get("fold_lists", "interleaved")
        if trained_on == (config.fold, "seen", lists) and training["store"] in (None, *store.info.settings.keys_alike):
            finished.append((result.stat().st_mtime, result.parent))
    if not finished:
        wanted = f"python cli.py train --fold {config.fold}"
        wanted += "" if lists == "interleaved" else f" --fold-lists {lists}"
        raise InputError(
            f"--workspace {workspace.root} has no finished training of fold {config.fold} on the features {store.key} "
            f"with {lists} folds. Run `{wanted}`, or pass --checkpoint or --method prototype."
        )
    return max(finished)[1]
