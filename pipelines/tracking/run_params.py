"""What tells one run from another: params that every run carries, and how metrics are spelled."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.runs.code import git_sha
from pipelines.store.reader import FeatureStore


class Scored(Protocol):
    """What any evaluation gives, in percent."""

    miou: float
    std: float
    interval: tuple[float, float]
    fb_iou: float


NONE = "-"  # value of params that do not apply (training, of a method without), so that all runs share their keys


def metric_key(ways: int, shots: int, prompt: str, statistic: str = "miou") -> str:
    """`miou_1way_1shot_mask`: the one spelling of an evaluation's metrics, so that runs compare."""
    return f"{statistic}_{ways}way_{shots}shot_{prompt}"


def task_metrics(task: tuple[int, int, str], score: "Scored") -> dict[str, float]:
    """The metrics of one evaluation of (ways, shots, prompt)."""
    low, high = score.interval
    values = {"miou": score.miou, "std_seeds": score.std, "low95": low, "high95": high, "fb_iou": score.fb_iou}
    return {metric_key(*task, name): value for name, value in values.items()}


def fold_params(
    store: FeatureStore, variant: str, train: TrainConfig | None, evaluations: Sequence[EvaluateConfig] = ()
) -> dict[str, object]:
    """Everything that tells one fold's run from another; the same keys for every variant and method.

    `train` is None for a method without training. `episodes_digest` joins once the episodes are drawn.
    """
    names = set(TrainConfig.model_fields) - {"workspace", "store", "fold", "threads", "device", "batch_scale"}
    settings = train.model_dump(mode="json") if train else dict.fromkeys(names, NONE)
    options = {"ways": "ways", "shots": "shots", "prompts": "prompt", "supports": "supports", "eval_seeds": "seeds"}
    options |= {"eval_episodes": "episodes", "eval_classes": "classes", "protocol": "protocol"}
    options |= {name: name for name in ("support_selection", "pool_draws", "flips")}
    evaluated = {name: _values(getattr(c, option) for c in evaluations) for name, option in options.items()}
    evaluated["method"] = _values(c.method for c in evaluations) if evaluations else "la"
    return (
        {name: settings[name] for name in sorted(names)}
        | evaluated
        | {"variant": variant, "fold": _values(c.fold for c in [train, *evaluations] if c), "git_sha": git_sha()}
        | {"store": store.key, "backbone": store.info.backbone, "image_size": store.info.image_size}
    )


def _values(values: Iterable) -> str:
    return ",".join(dict.fromkeys(map(str, values))) or NONE
