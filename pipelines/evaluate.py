"""Evaluation of any method on the same episodes, features and metric (paper section 5.1)."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from la.baselines import BASELINES
from la.batch import EpisodeBatch
from la.device import autocast, pick_device
from la.errors import InputError
from la.metrics import FewShotIoU
from la.model import LabelAnything, load_state
from pipelines.batches import BatchBuilder
from pipelines.config import EvaluateConfig
from pipelines.episodes import EpisodeShards, ensure_episodes, evaluation_plan
from pipelines.store import FeatureStore
from pipelines.workspace import Workspace, digest

Method = Callable[[EpisodeBatch], Tensor]


@dataclass(frozen=True)
class EvaluateResult:
    """mIoU in percent: the mean over seeds, its standard deviation, each seed's, each class's, and on what."""

    miou: float
    std: float
    per_seed: list[float]
    per_class: dict[str, float]  # class name -> IoU over the episodes of all seeds
    episodes_per_class: dict[str, int]
    episodes_digest: str
    classes_drawn: int
    classes_skipped: dict[str, str]  # class name -> why it was not drawn
    method: str
    store: str


def evaluate(config: EvaluateConfig, on_progress: Callable[[int, int], None] | None = None) -> EvaluateResult:
    """Score one method on `seeds` x `episodes` episodes; `on_progress` gets (episodes done, of all).

    Raises InputError for an empty workspace, an unknown method, a checkpoint that is missing, that has seen the
    fold's classes or that was trained on other features, and for too few images.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    device = pick_device(config.device)
    method, name = find_method(config, store, device)
    builder = builder_for(method, store, config.split)
    total, per_seed, digests = FewShotIoU(), [], []
    for seed in range(config.seeds):
        shards = ensure_episodes(evaluation_plan(config, seed), store)
        done_before = seed * config.episodes

        def progress(done: int, before: int = done_before) -> None:
            if on_progress:
                on_progress(before + done, config.seeds * config.episodes)

        scores = score(method, shards, builder, device, config.batch_size, progress)
        per_seed.append(scores.miou())
        digests.append(shards.digest)
        total += scores
    names = store.dataset(config.split).categories
    return EvaluateResult(
        miou=statistics.fmean(per_seed),
        std=statistics.stdev(per_seed) if len(per_seed) > 1 else 0.0,
        per_seed=per_seed,
        per_class={names[c]: iou for c, iou in total.per_class().items()},
        episodes_per_class={names[c]: n for c, n in sorted(total.episodes.items())},
        episodes_digest=digest(digests),
        classes_drawn=len(total.union),
        classes_skipped={names[int(c)]: why for c, why in shards.manifest["classes_skipped"].items()},
        method=name,
        store=store.key,
    )


def find_method(config: EvaluateConfig, store: FeatureStore, device: torch.device) -> tuple[Method, str]:
    """The method to call on batches, and its name with the step of its checkpoint."""
    if config.method in BASELINES:
        return BASELINES[config.method], config.method
    if config.method != "la":
        raise InputError(f"--method {config.method} is unknown. Choose la or one of {', '.join(BASELINES)}.")
    path = config.checkpoint or latest_run(Workspace(config.workspace), config.fold)
    path = path / "best.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--checkpoint {path} is not there. Pass a run's folder or its best.pt.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = load_state(saved).to(device).eval()
    except Exception as error:
        raise InputError(f"--checkpoint {path} is not a Label Anything checkpoint ({error}).") from error
    if saved["fold"] != config.fold:
        raise InputError(
            f"--checkpoint {path} was trained on fold {saved['fold']}, so it has seen classes of fold {config.fold}. "
            f"Use --fold {saved['fold']} or another checkpoint."
        )
    if saved["store"] is None and model.config.channels != store.info.channels:
        raise InputError(
            f"--checkpoint {path} takes features of {model.config.channels} channels, but those of store {store.key} "
            f"({store.info.backbone}) have {store.info.channels}. Featurize with the backbone it was trained on."
        )
    if saved["store"] not in (None, store.key):
        raise InputError(
            f"--checkpoint {path} was trained on features {saved['store']}, but the store is {store.key}: another "
            f"backbone, image size or data set. Pass --store {saved['store']}, or featurize with the same settings."
        )
    return model, f"la@{saved['step']}"


def builder_for(method: Method, store: FeatureStore, split: str) -> BatchBuilder:
    """With mask prompts of the size that the method takes."""
    return BatchBuilder(store, split, method.config.mask_px if isinstance(method, LabelAnything) else None)


def latest_run(workspace: Workspace, fold: int) -> Path:
    """The folder of the run finished last on that fold; InputError where there is none."""
    finished = []
    for result in workspace.runs.glob("*/result.json"):
        settings = json.loads((result.parent / "config.json").read_text())
        if settings["fold"] == fold:
            finished.append((result.stat().st_mtime, result.parent))
    if not finished:
        raise InputError(
            f"--workspace {workspace.root} has no finished training of fold {fold}. "
            f"Run `python cli.py train --fold {fold}`, or pass --checkpoint or --method prototype."
        )
    return max(finished)[1]


@torch.inference_mode()
def score(
    method: Method,
    shards: EpisodeShards,
    builder: BatchBuilder,
    device: torch.device,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> FewShotIoU:
    """Run `method` over all episodes; truth and prediction are compared at the photo's own size."""
    scores = FewShotIoU()
    episodes = list(shards)
    for start in range(0, len(episodes), batch_size):
        drawn = episodes[start : start + batch_size]
        batch = builder.pack(drawn).to(device)
        with autocast(device):
            logits = method(batch).float()
        for episode, low in zip(drawn, logits, strict=True):
            truth = builder.full_truth(episode)
            scores.add(segment(low, truth.shape).cpu(), truth, episode.classes)
        if on_progress:
            on_progress(start + len(drawn))
    return scores


def segment(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (C, h, w) of one query -> slots (H, W), upsampled bilinearly to the photo's own size."""
    # max, not argmax: argmax over the first of three dimensions takes 15 times as long on a CPU
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].max(0).indices
