"""What MLflow shows of a run beside its curves: params, metrics by name, the code that ran, and its data sets."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking.context.registry import resolve_tags

from pipelines.config import EvaluateConfig, Settings, TrainConfig
from pipelines.runs.code import git_sha
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace


class Scored(Protocol):
    """What any evaluation gives, in percent."""

    miou: float
    std: float
    interval: tuple[float, float]
    fb_iou: float


MAIN = ("preset", "recipe", "lr", "steps", "seed")  # params of every training
TASK = ("ways", "shots", "prompt", "supports", "classes", "protocol", "seeds", "episodes")  # of a single evaluation
NO_PARAMS = {"workspace", "store", "threads", "device", "checkpoint", "gallery"}
DIGEST_LENGTH = 36  # characters MLflow keeps of a data set's digest


def metric_key(ways: int, shots: int, prompt: str) -> str:
    """`miou/1way-1shot-mask`: MLflow puts the charts of all metrics before a slash into one section."""
    return f"miou/{ways}way-{shots}shot-{prompt}"


def task_metrics(task: tuple[int, int, str], score: "Scored") -> dict[str, float]:
    """The metrics of one evaluation of (ways, shots, prompt): mIoU, and `statistics/...`, which MLflow shows below."""
    low, high = score.interval
    others = {"std_seeds": score.std, "low95": low, "high95": high, "fb_iou": score.fb_iou}
    key = metric_key(*task)
    return {key: score.miou} | {statistic_of(key, name): value for name, value in others.items()}


def statistic_of(key: str, name: str) -> str:
    """Name of another figure beside the mIoU `key`."""
    return key.replace("miou", f"statistics/{name}", 1)


def varied(configs: Iterable[Settings]) -> tuple[str, ...]:
    """Names of the settings in which some of the configs, all of one class, differ."""
    settings = [config.model_dump(mode="json", exclude=NO_PARAMS) for config in configs]
    return tuple(name for name in sorted(settings[0]) if any(s[name] != settings[0][name] for s in settings))


def changed(config: TrainConfig) -> tuple[str, ...]:
    """Names of the settings that are not as preset and recipe have them."""
    return tuple(sorted(set(config.changed) - NO_PARAMS))


def training_params(config: TrainConfig, names: Sequence[str]) -> dict[str, object]:
    """The fold, the settings that matter most, and `names`. The others are in the run's `config.json`."""
    settings = config.model_dump(mode="json")
    return {name: settings[name] for name in ("fold", *MAIN, *names) if name not in NO_PARAMS}


def settings_of(train: TrainConfig | None, evaluations: Sequence[EvaluateConfig] = ()) -> dict:
    """All that was asked for, for `config.json`."""
    training = {"train": train.model_dump(mode="json")} if train else {}
    return training | ({"evaluate": [c.model_dump(mode="json") for c in evaluations]} if evaluations else {})


@functools.cache
def source_tags() -> dict[str, str]:
    """MLflow's own tags of who ran what: user, source, and the commit of the code, outside a checkout none."""
    commit, dirty = git_sha().removesuffix("-dirty"), git_sha().endswith("-dirty")
    if commit == "none":
        return resolve_tags()
    return resolve_tags() | {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(dirty).lower()}


def features_input(store: FeatureStore, split: str, context: str) -> DatasetInput:
    """A feature store as a data set; `context` is what MLflow shows it was used for."""
    info = store.info
    counts = info.splits.get(split)
    photos = {"num_rows": counts.images, "annotations": counts.annotations} if counts else {}
    profile = photos | {"split": split, "photos": info.coco_dir, "weights": info.weights, "dtype": info.dtype}
    return _input(f"features-{info.backbone}-{info.image_size}px", store.key, store.path, context, profile)


def training_inputs(config: TrainConfig, store: FeatureStore, episodes_digest: str | None = None) -> list[DatasetInput]:
    """Data sets of a training: its stores and, once they are drawn, its episodes."""
    others = [FeatureStore(Workspace(path).find_store()) for path in config.also]
    inputs = [features_input(one, "train", "training") for one in (store, *others)]
    if episodes_digest:
        folder = _episodes(store, "la-train", config.fold, "train")
        manifests = ((path, json.loads(path.read_text())) for path in folder.glob("*/manifest.json"))
        of_run = ((path.parent, content) for path, content in manifests if content["digest"] == episodes_digest)
        path, manifest = next(of_run, (folder, {}))  # of several stores it is a digest of digests
        count = {"num_rows": manifest["episodes"]} if manifest else {}
        name = f"episodes-train-fold{config.fold}-seed{config.seed}"
        inputs.append(_input(name, episodes_digest, path, "training", count))
    return inputs


def evaluation_inputs(config: EvaluateConfig, store: FeatureStore, episodes_digest: str) -> Iterator[DatasetInput]:
    """Data sets of an evaluation: its store and its episodes. Equal digests are equal episodes, whatever the method."""
    yield features_input(store, config.split, "evaluation")
    folder = _episodes(store, f"{config.protocol}-test", config.fold, config.split)
    task = f"{config.ways}way-{config.shots}shot-{config.prompt}"
    profile = {"num_rows": config.seeds * config.episodes, "seeds": config.seeds, "classes": config.classes}
    name = f"episodes-{config.protocol}-fold{config.fold}-{task}"
    yield _input(name, episodes_digest, folder, "evaluation", profile)


def _episodes(store: FeatureStore, protocol: str, fold: int, split: str) -> Path:
    return store.path.parents[1] / "episodes" / f"protocol={protocol}" / f"fold={fold}" / f"split={split}"


def _input(name: str, digest: str, source: Path, context: str, profile: dict) -> DatasetInput:
    uri, about = json.dumps({"uri": str(source)}), json.dumps(profile)
    dataset = Dataset(name, digest[:DIGEST_LENGTH], "local", uri, profile=about)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
