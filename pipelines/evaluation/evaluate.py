"""Evaluation of any method on the same episodes, features and metrics (paper section 5.1)."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from la.device import autocast, pick_device
from la.episodes.protocols import protocol_of
from la.episodes.sampling import Episode
from la.evaluation.metrics import EpisodeScore, FewShotIoU, interval_of, resampled_means, score_episode
from la.model.decoder import segment
from pipelines.config import EvaluateConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodeShards, ensure_episodes, evaluation_plan
from pipelines.evaluation.methods import find_method
from pipelines.evaluation.shared_work import Predict, predictor
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, digest

SUPPORTS_AT_ONCE = 8  # with 16 an episode takes a quarter longer to predict on one CPU thread


@dataclass(frozen=True)
class EvaluateResult:
    """All in percent: mIoU as the mean over seeds, its deviation, each seed's, a bootstrap interval, and on what."""

    miou: float
    std: float
    per_seed: list[float]
    interval: tuple[float, float]  # 95 %, of the mean, episodes resampled within each seed
    resampled: tuple[float, ...]  # the means of those resamples
    fb_iou: float
    per_class: dict[str, float]  # class name -> IoU over the episodes of all seeds
    episodes_per_class: dict[str, int]
    episodes_digest: str
    classes_drawn: int
    classes_skipped: dict[str, str]  # class name -> why it was not drawn
    extremes: dict[str, list[tuple[int, int, float]]]  # best, median, worst -> (seed, index, IoU) of episodes
    method: str
    protocol: str
    store: str

    def title(self, config: EvaluateConfig) -> str:
        """What was evaluated on what."""
        return f"{self.method}, fold {config.fold}, {config.classes} classes of {config.split}"

    def summary(self, config: EvaluateConfig) -> str:
        """The result in a sentence."""
        spread = f" +- {self.std:.2f}" if config.seeds > 1 else ""
        return (
            f"{config.ways}-way {config.shots}-shot, {config.prompt} prompts: mIoU {self.miou:.2f}{spread} over "
            f"{config.seeds} seeds x {config.episodes} episodes, {self.classes_drawn} classes; "
            f"95 % of resampled episodes {self.interval[0]:.2f} to {self.interval[1]:.2f}, "
            f"FB-IoU {self.fb_iou:.2f}; protocol {config.protocol}, episodes {self.episodes_digest}"
        )


def evaluate(config: EvaluateConfig, on_progress: Callable[[int, int], None] | None = None) -> EvaluateResult:
    """Score one method on `seeds` x `episodes` episodes; `on_progress` gets (episodes done, of all).

    Raises InputError for an empty workspace, an unknown method or protocol, a checkpoint that is missing, that has seen
    the fold's classes or that was trained on other features, and for too few images.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    device = pick_device(config.device)
    method, name, mask_px = find_method(config, store, device)
    builder = BatchBuilder(store, config.split, mask_px)
    predict = predictor(method, builder, device)
    protocol = protocol_of(config.protocol)
    size = (store.info.image_size, store.info.image_size) if protocol.truth == "network" else None
    total, of_seeds, digests = FewShotIoU(), [], []
    for seed in range(config.seeds):
        shards = ensure_episodes(evaluation_plan(config, seed), store)
        done_before = seed * config.episodes

        def progress(done: int, before: int = done_before) -> None:
            if on_progress:
                on_progress(before + done, config.seeds * config.episodes)

        scores = score(predict, shards, builder, device, size, progress)
        of_seeds.append(scores)
        digests.append(shards.digest)
        total += scores
    per_seed = [scores.miou() for scores in of_seeds]
    names, resampled = store.dataset(config.split).categories, resampled_means(of_seeds)
    result = EvaluateResult(
        miou=statistics.fmean(per_seed),
        std=statistics.stdev(per_seed) if len(per_seed) > 1 else 0.0,
        per_seed=per_seed,
        interval=interval_of(resampled),
        resampled=tuple(round(mean, 3) for mean in resampled.tolist()),
        fb_iou=total.fb_iou(),
        per_class={names[c]: iou for c, iou in total.per_class().items()},
        episodes_per_class={names[c]: n for c, n in total.episodes_per_class().items()},
        episodes_digest=digest(digests),
        classes_drawn=len(total.per_class()),
        extremes=extremes_of(total, config.episodes),
        classes_skipped={names[int(c)]: why for c, why in shards.manifest["classes_skipped"].items()},
        method=name,
        protocol=protocol.name,
        store=store.key,
    )
    if config.gallery:
        from pipelines.evaluation.figures import draw_extremes  # brings matplotlib, which workers seldom need

        draw_extremes(config, method, name, builder, device, result.extremes)
    return result


def extremes_of(scores: FewShotIoU, per_seed: int, count: int = 3) -> dict[str, list[tuple[int, int, float]]]:
    """The `count` best, median and worst episodes as (seed, index, mean IoU of their classes in percent).

    Of episodes with the same counts of pixels, most likely the same photos drawn again, the first.
    """
    first = {score: at for at, score in reversed(list(enumerate(scores.episodes)))}
    ranked = sorted(((at, score.miou()) for score, at in first.items()), key=lambda item: (-item[1], item[0]))
    middle = max(0, len(ranked) // 2 - count // 2)
    chosen = {"best": ranked[:count], "median": ranked[middle : middle + count], "worst": ranked[-count:]}
    return {name: [(*divmod(at, per_seed), iou) for at, iou in found] for name, found in chosen.items()}


@torch.inference_mode()
def score(
    predict: Predict,
    shards: EpisodeShards,
    builder: BatchBuilder,
    device: torch.device,
    size: tuple[int, int] | None = None,
    on_progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> FewShotIoU | None:
    """Run `predict` over all episodes; truth and prediction are compared at `size` or the photo's own size.

    Episodes that differ by their index alone, of which few photos give many, are one task, predicted and scored once.
    Which episodes are predicted together is decided by their own ways and shots alone, so that no setting
    changes the order in which a number is summed up, and so the last bit of a logit. None where `stop`,
    which is asked before each batch, said so.
    """
    tasks = tasks_of(shards)
    distinct = list(dict.fromkeys(tasks))
    scores: dict[Episode, EpisodeScore] = {}
    _, ways, shots = shards.manifest["plan"]["batches"][0]
    together = max(1, SUPPORTS_AT_ONCE // (ways * shots))
    for start in range(0, len(distinct), together):
        if stop():
            return None
        drawn = distinct[start : start + together]
        with autocast(device):
            logits = predict(drawn).float()
        for episode, low in zip(drawn, logits, strict=True):
            truth = builder.full_truth(episode, size)
            scores[episode] = score_episode(segment(low, truth.shape).cpu(), truth, episode.classes)
        if on_progress:
            on_progress(len(tasks) * len(scores) // len(distinct))
    return FewShotIoU([scores[task] for task in tasks])


def tasks_of(episodes: Iterable[Episode]) -> list[Episode]:
    """The episodes without their index, which no prediction and no truth depends on."""
    return [episode._replace(index=0) for episode in episodes]
