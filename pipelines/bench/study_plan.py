"""The plan of a study: its settings in, its disk, reading, hours and bottlenecks out. What is not given is rates."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from la.data.coco import find_splits, load_coco
from la.errors import InputError
from pipelines.bench import rates
from pipelines.bench.cost import Cluster, Kind, Rates, Stage, bytes_per_image, images_per_step, job_of, store_bytes
from pipelines.bench.ratios import memory_gb
from pipelines.config import PlanConfig, TrainConfig

COCO_PHOTOS = 123_287  # of train2017 and val2017


def plan_study(
    config: PlanConfig, variants: Sequence[Mapping[str, Any]], tasks: Sequence[tuple[int, int]]
) -> tuple[dict[str, str], list[Stage]]:
    """Plan featurizing, a training on each fold, and a sweep that trains `variants` on each and evaluates `tasks`.

    Returns sizes and rates by name, as they are printed, and the stages one after the other. Variants are what they
    change of TrainConfig; a task (N, K) comes as often as there are kinds of prompts. Raises InputError for settings
    that cannot be used, and for a `coco_dir` as `load_coco` does.
    """
    training, trials = _trainings(config, variants)
    photos, photos_of = _photos(config)
    images = config.photos or photos
    vit, how = (config.backbone, config.image_size), {"device": config.device, "threads": config.threads}
    features = bytes_per_image(*rates.feature_shape(*vit), config.dtype)
    tested = config.seeds * config.episodes * sum(1 + ways * shots for ways, shots in tasks)
    if config.nodes > config.workers:
        raise InputError(
            f"--nodes is {config.nodes}, but --workers is {config.workers}: a node has at least one worker. "
            "Lower --nodes or raise --workers."
        )
    with tempfile.TemporaryDirectory(prefix="la-plan-") as name:
        folder = Path(name)
        disk = config.read_mb_per_second or rates.measure_reading(folder)
        featurized = config.featurize_rate or rates.measure_featurizing(folder, *vit, **how)
        rates_of = _rates(config, folder, photos_of)
        speed, read = rates_of(training), photos_of(training.batches)
        swept = [job_of(trial, rates_of(trial), photos_of(trial.batches), tested) for trial in trials]
    where = (disk, config.workers, config.nodes, config.ram_gb or memory_gb())
    cluster = Cluster(features, store_bytes(images, features), *where)
    sizes = {
        f"features of a photo, {config.dtype}": f"{features / 1e6:.3f} MB",
        f"store of {images} photos": f"{cluster.store / 1e9:.1f} GB",
        "of it, a node's memory holds": f"{100 * cluster.cached:.0f} %",
        "a worker reads in a training step": f"{read:.1f} photos, {read * features / 1e6:.0f} MB",
        "a worker featurizes": f"{featurized:.3g} photos/s",
        "a worker trains": f"{1 / speed.step:.3g} steps/s",
        "a worker evaluates, 1-way 1-shot": f"{1 / (2 * speed.photo):.3g} episodes/s",
        "a node's disk gives": f"{disk:.0f} MB/s",
    }
    trained, swept = [job_of(training, speed, read)] * config.folds, swept * config.folds
    return sizes, [
        cluster.featurize(images, featurized),
        cluster.train(f"train {config.folds} folds", trained),
        cluster.train(f"sweep ablations, {len(swept)} trials", swept, config.workers),
    ]


def _trainings(config: PlanConfig, variants: Sequence[Mapping[str, Any]]) -> tuple[TrainConfig, list[TrainConfig]]:
    """(the training asked for, those of the sweep on one fold, which follows no preset)"""
    common = config.model_dump(include={"steps", "device", "threads", "batch_scale", "recipe"}, exclude_none=True)
    return TrainConfig(**common, preset=config.preset), [TrainConfig(**common | variant) for variant in variants]


def _photos(config: PlanConfig) -> tuple[int, Callable[[tuple[Kind, ...]], float]]:
    """(photos of the folder, or of COCO; what a worker reads in a step of such batches)"""
    if not config.coco_dir:
        return COCO_PHOTOS, images_per_step
    splits = find_splits(config.coco_dir)
    datasets = {split: load_coco(file, None, split) for split, (file, _) in splits.items()}
    drawn = cache(lambda batches: rates.photos_drawn(TrainConfig(batches=batches), datasets["train"]))
    return sum(len(dataset.images) for dataset in datasets.values()), drawn


def _rates(config: PlanConfig, folder: Path, photos_of: Callable) -> Callable[[TrainConfig], Rates]:
    """The rates of a training: those given, or measured on made-up features.

    Where steps alone are given, an evaluation is taken to cost a photo what training does. Variants of a preset cost
    nearly the same: the preset with all its parts stands for them, and is measured once for each kind of batches.
    """
    if config.steps_per_second:
        step = 1 / config.steps_per_second
        return lambda training: Rates(step, step / images_per_step(training.batches))
    workspace = rates.made_up_store(folder / "made-up", config.backbone, config.image_size)

    @cache
    def rates_of(**preset) -> Rates:
        training = TrainConfig(workspace=workspace, device=config.device, threads=config.threads, **preset)
        return rates.measure_training(training, photos_of(training.batches))

    return lambda training: rates_of(preset=training.preset, recipe=training.recipe, batches=training.batches)
