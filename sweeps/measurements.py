"""What `bench` measures, by name."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from la.errors import InputError
from pipelines.bench import int8_reading, model_speed, query_latency, ratios, step_operators, training_speed
from pipelines.config import BenchConfig, TrainConfig
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace
from sweeps.trial_overhead import bench_sweep


def measurements(config: BenchConfig) -> dict[str, Callable]:
    """What can be measured, by name, with the settings that were given."""

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler talks of its set-up otherwise
    if config.threads:
        torch.set_num_threads(config.threads)

    def store() -> Path:
        return Workspace(config.workspace).find_store(config.store)

    def given(**names: str) -> dict:
        """Arguments for those of the settings that were given."""
        return {key: value for key, name in names.items() if (value := getattr(config, name)) is not None}

    presets = {"names": (config.preset,)} if config.preset else {}

    def featurize():
        if not config.coco_dir:
            raise InputError("--coco-dir is missing: featurizing is measured on photos.")
        vit = (config.backbone, config.image_size)
        if None in vit:
            vit = (FeatureStore(store()).info.backbone, FeatureStore(store()).info.image_size)
        sizes = given(images="photos", repeats="repeats")
        return [ratios.bench_featurize(config.coco_dir, vit[0], config.weights, vit[1], **sizes)]

    def reading():
        path, sizes = store(), given(images="photos", repeats="repeats")
        yield ratios.bench_store(path, **sizes)
        if small := int8_reading.int8_beside(path):
            yield from int8_reading.bench_int8(path, small, **sizes)

    def training():
        batches = TrainConfig(**given(preset="preset", batch_scale="batch_scale")).batches
        sizes = given(preset="preset", steps="steps", repeats="repeats", device="device")
        return training_speed.bench_training(config.workspace, batches=batches, store=config.store, **sizes)

    def predict():
        names = {name: name for name in ("backbone", "image_size", "ways", "shots", "repeats")}
        return query_latency.bench_predict(**presets, **given(**names))

    return {
        "featurize": featurize,
        "store": reading,
        "episodes": lambda: [ratios.bench_episodes(store(), **given(fold="fold", repeats="repeats"))],
        "data": lambda: [ratios.bench_data(store(), **given(fold="fold", repeats="repeats"))],
        "model": lambda: model_speed.bench_model(store(), **given(name="preset", repeats="repeats")),
        "evaluate": lambda: [
            ratios.bench_evaluate(store(), **given(name="preset", episodes="episodes", repeats="repeats"))
        ],
        "training": training,
        "operators": lambda: step_operators.bench_operators(**presets),
        "sweep": lambda: [bench_sweep(store(), **given(trials="trials"))],
        "predict": predict,
    }
