"""Rates measured in seconds, by the very code of the real jobs on small made-up data of the real shapes.

Photos, features and weights are random: what they show changes no time, their sizes and counts do.
"""

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image as Pillow
from torch import nn

from la.backbone.vit import random_vit
from la.data.coco import Dataset, load_coco
from la.episodes.sampling import training_episode
from pipelines.bench.cost import Kind, Task, TrainRates, images_of
from pipelines.bench.random_store import ellipse, made_up_features
from pipelines.config import EvaluateConfig, FeaturizeConfig, TrainConfig
from pipelines.episodes.episode_shards import ensure_episodes, pool_on, training_plan
from pipelines.evaluation.evaluate import evaluate
from pipelines.store.featurize import featurize
from pipelines.store.reader import FeatureStore
from pipelines.training.loop import Worker, train_loop
from pipelines.training.prepare import prepare, run_dir_of
from pipelines.workspace import Workspace

HEIGHT, WIDTH = 480, 640  # pixels of a common COCO photo
# So few that the few photos made here show each often enough for five shots. Other counts are like those of COCO's
# objects of seen classes that are large enough to be drawn.
CLASSES, CLASSES_IN_USE = 80, 16
CLASSES_A_PHOTO, OBJECTS_A_PHOTO = 2, 5
PHOTOS = {"train": 64, "val": 64}
STEPS_A_KIND = 4  # of each kind of batch, on average
EPISODES = 24  # of each task, timed
DRAWN = 200  # of each kind of batch, counted
READ_BYTES, READ_AT_ONCE = 256_000_000, 1_000_000

Clock = Callable[[], float]  # seconds: time.perf_counter, or time.process_time, which other processes do not disturb


def feature_shape(backbone: str, image_size: int) -> tuple[tuple[int, int], int]:
    """((h, w) in tokens, channels) of a ViT. Raises InputError for a name or a size that cannot be used."""
    with torch.device("meta"):
        vit = random_vit(backbone, image_size)
    return (image_size // vit.patch_embed.patch_size[0],) * 2, vit.num_features


def measure_featurizing(
    folder: Path,
    backbone: str,
    image_size: int,
    photos: int = 24,
    weights: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> float:
    """Photos a second of one worker: decoding, the ViT, writing. Loading the model is left out."""
    coco = folder / "coco"
    rng = np.random.default_rng(0)
    for split, count in (("train", photos - 1), ("val", 1)):
        images = _write_coco(coco, split, count, rng)
        (coco / f"{split}2017").mkdir(exist_ok=True)
        for image in images:
            coarse = Pillow.fromarray(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8))
            photo = coarse.resize((WIDTH, HEIGHT), Pillow.Resampling.BICUBIC)  # about as many bytes as a real one has
            photo.save(coco / f"{split}2017" / image["file_name"], quality=90)
    if weights is None:
        weights = folder / "weights.safetensors"
        safetensors.torch.save_file(random_vit(backbone, image_size).state_dict(), weights)
    config = FeaturizeConfig(
        workspace=folder / "featurized",
        coco_dir=coco,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        device=device,
        threads=threads,
    )
    return featurize(config).images_per_second


def made_up_store(folder: Path, backbone: str, image_size: int) -> Path:
    """A workspace with a feature store of random numbers in the shape of that ViT's; returns the workspace."""
    grid, channels = feature_shape(backbone, image_size)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((*grid, channels), np.float32).astype(np.float16)
    datasets = {}
    for split, count in PHOTOS.items():
        _write_coco(folder / "made-up-coco", split, count, rng)
        datasets[split] = load_coco(_annotation_file(folder / "made-up-coco", split), None, split)
    workspace = folder / "made-up"
    made_up_features(
        workspace,
        datasets,
        lambda image: np.roll(features, image.id, 0),
        patch_size=image_size // grid[0],
        backbone=backbone,
        shard_size=max(PHOTOS.values()),
    )
    return workspace


@dataclass
class Stopwatch:
    """Times every step of a training from outside: it hears when the model is called, and with what batch.

    A step lasts from one call to the next, so reading, the optimiser and all else of the loop is in it.
    """

    clock: Clock = time.perf_counter
    calls: list[tuple[float, Kind]] = field(default_factory=list)

    def wrap(self, model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(self._called)
        return model

    def _called(self, _: nn.Module, args: tuple) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        batch = args[0]
        size, ways = batch.slots.shape[0], batch.slots.shape[1] - 1
        self.calls.append((self.clock(), (size, ways, round(len(batch.support) / size / ways))))

    def step_seconds(self, batches: Sequence[Kind]) -> float:
        """Of a step, the mean over the kinds, each as likely; a kind that no step had costs by its photos.

        The first step is left out, as it allocates.
        """
        seconds = defaultdict(list)
        for (start, kind), (stop, _) in zip(self.calls[1:], self.calls[2:], strict=False):
            seconds[kind].append(stop - start)
        medians = {kind: statistics.median(found) for kind, found in seconds.items()}
        a_photo = sum(medians.values()) / sum(map(images_of, medians))
        return statistics.fmean(medians.get(kind, a_photo * images_of(kind)) for kind in batches)


def measure_training(
    config: TrainConfig, tasks: Sequence[Task] = ((1, 1),), clock: Clock = time.perf_counter
) -> TrainRates:
    """Rates of one worker on the store of `config.workspace`, which is small: it and the page cache are friends.

    Trains for some steps of each kind in `config.batches`, then evaluates a few episodes of each task.
    """
    steps = STEPS_A_KIND * len(config.batches) + 2
    short = {"steps": steps, "val_every": steps, "checkpoint_every": steps, "val_episodes": 4, "workers": 0}
    config = config.model_copy(update=short | {"train_batches": steps, "fold": 0, "also": ()})
    watch = Stopwatch(clock)
    drawing = clock()
    manifest = ensure_episodes(training_plan(config), _store_of(config)).manifest
    started = clock()
    train_loop(prepare(config), Worker(wrap=watch.wrap), lambda _: None)
    evaluated = {task: _evaluation_seconds(config, task, clock) for task in tasks}
    return TrainRates(
        step_seconds=watch.step_seconds(config.batches),
        start_seconds=watch.calls[0][0] - started,
        draw_seconds=(started - drawing) / manifest["episodes"],
        evaluate_seconds={task: episode for task, (episode, _) in evaluated.items()},
        evaluate_start_seconds=statistics.fmean(start for _, start in evaluated.values()),
    )


def _store_of(config: TrainConfig) -> FeatureStore:
    return FeatureStore(Workspace(config.workspace).find_store(config.store))


def _evaluation_seconds(config: TrainConfig, task: Task, clock: Clock) -> tuple[float, float]:
    """(of an episode, from the first batch of them on; of all the rest, which is paid once)"""
    ways, shots = task
    settings = EvaluateConfig(
        workspace=config.workspace,
        checkpoint=run_dir_of(config),
        classes="seen",  # more than the unseen ones, so that few photos are drawn again
        ways=ways,
        shots=shots,
        seeds=1,
        episodes=EPISODES,
        device=config.device,
        threads=config.threads,
    )
    done: list[tuple[float, int]] = []
    started = clock()
    evaluate(settings, lambda episodes, _: done.append((clock(), episodes)))
    whole = clock() - started
    (first, before), (last, after) = done[0], done[-1]
    episode = (last - first) / (after - before)
    return episode, max(0.0, whole - after * episode)


def photos_drawn(config: TrainConfig, dataset: Dataset) -> float:
    """Photos that a worker reads in a step on these annotations, from episodes drawn for the purpose.

    Fewer than `images_per_step` where classes have not photos enough for K shots. Raises InputError where classes are
    too few for a batch.
    """
    pool = pool_on(dataset, config.fold, config.classes, config.fold_lists)

    def episode(index: int, ways: int, shots: int) -> int:
        return 1 + len(training_episode(pool, "plan", index, ways, shots, config.prompts).supports)

    return statistics.fmean(
        size * statistics.fmean(episode(index, ways, shots) for index in range(DRAWN))
        for size, ways, shots in config.batches
    )


def measure_reading(folder: Path) -> float:
    """MB (1e6 bytes) a second that the disk of `folder` gives past the page cache, in pieces as large as features."""
    file = folder / "read-probe"
    piece = np.random.default_rng(0).bytes(READ_AT_ONCE)
    with open(file, "wb") as out:
        for _ in range(READ_BYTES // READ_AT_ONCE):
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    order = np.random.default_rng(1).permutation(READ_BYTES // READ_AT_ONCE)
    with open(file, "rb", buffering=0) as content:
        os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        started = time.perf_counter()
        for place in order:
            os.pread(content.fileno(), READ_AT_ONCE, int(place) * READ_AT_ONCE)
        seconds = time.perf_counter() - started
    file.unlink()
    return READ_BYTES / seconds / 1e6


def _annotation_file(coco: Path, split: str) -> Path:
    return coco / "annotations" / f"instances_{split}2017.json"


def _write_coco(coco: Path, split: str, count: int, rng: np.random.Generator) -> list[dict]:
    """Annotations as many and as large as COCO's of `count` photos that are not there; returns the images."""
    first = 1 if split == "train" else 100_001
    images, annotations = [], []
    for number in range(count):
        image = {"id": first + number, "file_name": f"{first + number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        images.append(image)
        apart = 1 + number // CLASSES_IN_USE  # so that each class meets many others, as seldom as in COCO
        shown = [1 + (number + k * apart) % CLASSES_IN_USE for k in range(CLASSES_A_PHOTO)]
        for k in range(OBJECTS_A_PHOTO):
            annotations.append(_ellipse(image, shown[k % CLASSES_A_PHOTO], len(annotations) + 100 * first, rng))
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, CLASSES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    _annotation_file(coco, split).parent.mkdir(parents=True, exist_ok=True)
    _annotation_file(coco, split).write_text(json.dumps(content))
    return images


def _ellipse(image: dict, category: int, number: int, rng: np.random.Generator) -> dict:
    corners = ellipse(rng, (25, 110), WIDTH, HEIGHT)
    box = [*corners.min(0), *np.ptp(corners, 0)]
    shape = {"segmentation": [corners.round(2).flatten().tolist()], "bbox": [round(float(v), 2) for v in box]}
    return shape | {"id": number, "image_id": image["id"], "category_id": category, "iscrowd": 0}
