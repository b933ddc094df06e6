"""Rates measured in seconds, by the very code of the real jobs on small made-up data of the real shapes.

Photos, features and weights are random: what they show changes no time, their sizes and counts do.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from la.backbone.vit import random_vit
from la.data.coco import Dataset
from la.episodes.sampling import training_episode
from pipelines.bench.cost import Rates, images_per_step
from pipelines.bench.random_store import HEIGHT, WIDTH, made_up_dataset, made_up_features
from pipelines.config import EvaluateConfig, FeaturizeConfig, TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.episodes.episode_shards import ensure_episodes, pool_on, training_plan
from pipelines.evaluation.evaluate import evaluate
from pipelines.runs.identity import run_dir_of
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.training.loop import Worker, train_loop
from pipelines.training.prepare import prepare
from pipelines.workspace import Workspace

FEATURIZED = 24  # photos
# So few classes that the few photos made here show each often enough for five shots. Objects of a photo are as many as
# COCO has of seen classes that are large enough to be drawn.
PHOTOS, CLASSES_IN_USE, OBJECTS, CLASSES_A_PHOTO = 64, 16, 5, 2
STEPS_A_KIND = 4  # of each kind of batch, on average
EVALUATED, EPISODES = ((1, 1), (2, 1)), 24  # (ways, shots), and so many of each
DRAWN = 200  # of each kind of batch, counted
READ_BYTES, READ_AT_ONCE = 256_000_000, 1_000_000


def feature_shape(backbone: str, image_size: int) -> tuple[tuple[int, int], int]:
    """((h, w) in tokens, channels) of a ViT. Raises InputError for a name or a size that cannot be used."""
    with torch.device("meta"):
        vit = random_vit(backbone, image_size)
    return (image_size // vit.patch_embed.patch_size[0],) * 2, vit.num_features


def measure_featurizing(folder: Path, backbone: str, image_size: int, **settings) -> float:
    """Photos a second of one worker: decoding, the ViT, writing. Loading the model is left out.

    Photos are scenes as large as COCO's, and nearly as many bytes. `settings` are others of FeaturizeConfig.
    """
    scenes = draw_scenes(folder / "scenes", train_images=FEATURIZED - 1, val_images=1, size=(HEIGHT, WIDTH))
    weights = folder / "weights.safetensors"
    safetensors.torch.save_file(random_vit(backbone, image_size).state_dict(), weights)
    shape = {"backbone": backbone, "weights": weights, "image_size": image_size}
    return featurize(FeaturizeConfig(workspace=folder, coco_dir=scenes, **shape, **settings)).images_per_second


def made_up_store(workspace: Path, backbone: str, image_size: int) -> Path:
    """Give a workspace a feature store of random numbers in the shape of that ViT's; returns the workspace."""
    grid, channels = feature_shape(backbone, image_size)
    features = np.random.default_rng(0).standard_normal((*grid, channels), np.float32).astype(np.float16)
    number, k = np.arange(PHOTOS)[:, None], np.arange(OBJECTS) % CLASSES_A_PHOTO
    apart = 1 + number // CLASSES_IN_USE  # so that each class meets many others, as seldom as in COCO
    classes = 1 + (number + k * apart) % CLASSES_IN_USE
    datasets = {split: made_up_dataset(split, first, classes) for split, first in (("train", 1), ("val", 1 + PHOTOS))}
    made_up_features(workspace, datasets, lambda image: np.roll(features, image.id, 0), image_size // grid[0])
    return workspace


def measure_training(config: TrainConfig, photos: float | None = None) -> Rates:
    """Rates of one worker on the store of `config.workspace`, which is small: its features stay in memory.

    Trains for some steps of each kind in `config.batches`, then evaluates a few episodes. A step goes with its photos:
    it is that of `photos`, or of as many as the batches ask for.
    """
    steps = STEPS_A_KIND * len(config.batches) + 2
    short = {"steps": steps, "val_every": steps, "checkpoint_every": steps, "val_episodes": 4, "workers": 0}
    config = config.model_copy(update=short | {"train_batches": steps, "fold": 0, "also": ()})
    calls: list[tuple[float, int]] = []  # of the model in training, and the photos of the batch it got

    def note(_: nn.Module, args: tuple) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        calls.append((time.perf_counter(), len(args[0].query) + len(args[0].support)))

    def watch(model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(note)
        return model

    started = time.perf_counter()
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    drawn = ensure_episodes(training_plan(config), store).manifest["episodes"]
    draw = (time.perf_counter() - started) / drawn
    train_loop(prepare(config), Worker(wrap=watch), lambda _: None)
    # From call to call, so reading, the optimiser and all else is in it. The first step allocates.
    step = (calls[-1][0] - calls[1][0]) / sum(read for _, read in calls[1:-1])
    how = {"device": config.device, "threads": config.threads}
    tested = EvaluateConfig(workspace=config.workspace, checkpoint=run_dir_of(config), **how)
    return Rates(step * (photos or images_per_step(config.batches)), measure_evaluation(tested), draw)


def measure_evaluation(config: EvaluateConfig) -> float:
    """Seconds of each photo of an episode, from the first batch of episodes on.

    Episodes are of seen classes, which are more than the unseen ones, so that few photos are drawn again.
    """
    seconds = photos = 0.0
    for ways, shots in EVALUATED:
        size = {"classes": "seen", "ways": ways, "shots": shots, "seeds": 1, "episodes": EPISODES}
        done: list[tuple[float, int]] = []
        evaluate(config.model_copy(update=size), lambda count, _, done=done: done.append((time.perf_counter(), count)))
        seconds += done[-1][0] - done[0][0]
        photos += (done[-1][1] - done[0][1]) * (1 + ways * shots)
    return seconds / photos


def photos_drawn(config: TrainConfig, dataset: Dataset) -> float:
    """Photos that a worker reads in a step on these annotations, from episodes drawn for the purpose.

    Fewer than `images_per_step` where classes have not photos enough for K shots. Raises InputError where classes are
    too few for a batch.
    """
    pool = pool_on(dataset, config.fold, config.classes, config.fold_lists)
    return statistics.fmean(
        size * (1 + len(training_episode(pool, "plan", index, ways, shots, config.prompts).supports))
        for size, ways, shots in config.batches
        for index in range(DRAWN)
    )


def measure_reading(folder: Path) -> float:
    """MB (1e6 bytes) a second that the disk of `folder` gives past the page cache, in pieces as large as features."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(rng.bytes(READ_BYTES))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        started = time.perf_counter()
        for number in rng.permutation(READ_BYTES // READ_AT_ONCE).tolist():
            os.pread(file.fileno(), READ_AT_ONCE, number * READ_AT_ONCE)
        return READ_BYTES / (time.perf_counter() - started) / 1e6
