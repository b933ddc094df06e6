"""Speed and memory of the model: annotated pairs packed against the dense grid, and supports in chunks.

The dense grid is the released model's: an entry for every support and every class, with room for the most prompts.
"""

import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from la.data.folds import FOLDS
from la.episodes.batch import EpisodeBatch, dense_grid
from la.episodes.sampling import Episode
from la.errors import InputError
from la.evaluation.losses import focal_loss
from la.model.attention import Attention
from la.model.label_anything import LabelAnything, ModelConfig, preset
from pipelines.bench.ratios import BenchResult, in_turn, median_ratio
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodePlan, draw, evaluation_plan, repeated, training_plan
from pipelines.store.reader import FeatureStore

TRAINING, TESTING = (2, 4, 2), (1, 5, 5)  # (B, N, K)
WAYS, MOST_SHOTS = 5, 20  # of the memory that shots cost


class _Setting:
    """Three ways to the same logits, and real episodes on the training photos of a store."""

    def __init__(self, store: FeatureStore, name: str):
        config = preset(name, channels=store.info.channels)
        if not isinstance(config, ModelConfig):
            raise InputError(f"--preset {name} has no dense grid to compare with. Choose paper, official or debug.")
        self.model = LabelAnything(replace(config, absent_pairs=False))
        self.dense = LabelAnything(replace(config, absent_pairs=True))  # the dense grid
        self.plain = deepcopy(self.dense)  # and attention that projects the whole feature map, as released
        for part in self.plain.modules():
            if isinstance(part, Attention):
                part.absorb = False
        for other in (self.dense, self.plain):
            other.load_state_dict(self.model.state_dict())
        self.store, self.root = store, store.path.parents[1]
        self.builder = BatchBuilder(store, "train", config.mask_px)

    def episodes(self, plan: EpisodePlan, number: int) -> list[Episode]:
        size = plan.batches[0][0]
        return draw(plan, self.store, 0, number * size, (number + 1) * size)

    def testing_plan(self, ways: int, shots: int, fold: int = 0) -> EpisodePlan:
        config = {"workspace": self.root, "classes": "seen", "split": "train", "fold": fold}
        return evaluation_plan(EvaluateConfig(ways=ways, shots=shots, **config), 0)

    def batch(self, episodes: list[Episode]) -> EpisodeBatch:
        return self.builder.pack(episodes).to("cpu")

    def against_dense(
        self, name: str, bar: float, run: Callable[[LabelAnything, int], None], work: list[EpisodeBatch], size: tuple
    ) -> BenchResult:
        packed, plain, dense = in_turn(
            *(partial(run, model) for model in (self.model, self.plain, self.dense)), turns=range(len(work))
        )
        details = {
            "(B, N, K)": str(size),
            "pairs packed": statistics.fmean(len(batch.pair_support) for batch in work),
            "pairs dense": statistics.fmean(len(dense_grid(batch).pair_support) for batch in work),
            "packed s": statistics.median(packed),
            "dense s": statistics.median(plain),
            "dense s, with the packed one's attention": statistics.median(dense),
        }
        return BenchResult(
            f"model: {name}, dense grid over packed", median_ratio(plain, packed), bar, "at least", details
        )


def bench_model(store_path: Path, name: str = "official", repeats: int = 5) -> list[BenchResult]:
    """Training and evaluation, packed against the dense grid, and the memory of 1 and of 20 shots. On the CPU."""
    torch.manual_seed(0)
    setting = _Setting(FeatureStore(store_path), name)
    return [*_training(setting, repeats), _testing(setting, repeats), *_shots(setting, repeats)]


def _training(setting: _Setting, repeats: int) -> list[BenchResult]:
    plan = training_plan(TrainConfig(workspace=setting.root, batches=(TRAINING,)))
    drawn = [setting.episodes(plan, number) for number in range(repeats)]
    work = [setting.batch(episodes) for episodes in drawn]
    truths = [setting.builder.truth(episodes) for episodes in drawn]

    def step(model: LabelAnything, number: int) -> None:
        model.zero_grad(set_to_none=True)
        focal_loss(model(work[number]), truths[number]).backward()

    packed, dense = (peak_bytes(partial(step, model, 0)) for model in (setting.model, setting.plain))
    memory = "model: peak memory of forward and backward, packed over dense grid"
    details = {"packed MB": packed / 1e6, "dense MB": dense / 1e6}
    return [
        setting.against_dense("forward and backward", 2.0, step, work, TRAINING),
        BenchResult(memory, packed / dense, 0.6, "at most", details),
    ]


def _testing(setting: _Setting, repeats: int) -> BenchResult:
    plan = setting.testing_plan(*TESTING[1:])
    work = [setting.batch(setting.episodes(plan, number)) for number in range(repeats)]

    @torch.inference_mode()
    def predict(model: LabelAnything, number: int) -> None:
        model(work[number])

    return setting.against_dense("evaluation", 2.5, predict, work, TESTING)


def _shots(setting: _Setting, repeats: int) -> list[BenchResult]:
    model = setting.model
    single = setting.episodes(setting.testing_plan(WAYS, 1, fold=FOLDS - 1), 0)[0]
    many = repeated(single, MOST_SHOTS)
    query = setting.batch([single]).query

    @torch.inference_mode()
    def prototypes(episode: Episode) -> Tensor:
        return model.prototypes(setting.builder.chunks([episode], WAYS))

    @torch.inference_mode()
    def segment(ready: Tensor) -> None:
        model.decode(query, ready, torch.ones(ready.shape[:2], dtype=torch.bool))

    few_bytes, most_bytes = (peak_bytes(lambda e=e: segment(prototypes(e))) for e in (single, many))
    few, most = prototypes(single), prototypes(many)
    with torch.inference_mode():
        apart = (most - model.prototypes(setting.batch([many]))).abs().max().item()
    few_seconds, most_seconds = in_turn(lambda _: segment(few), lambda _: segment(most), turns=range(4 * repeats))
    memory = f"model: peak memory of {WAYS}-way inference, {MOST_SHOTS} shots over 1"
    details = {"1 shot MB": few_bytes / 1e6, f"{MOST_SHOTS} shots MB": most_bytes / 1e6, "chunked differs by": apart}
    cached = f"model: a query against cached prototypes, {MOST_SHOTS} shots over 1"
    seconds = {"seconds": statistics.median(most_seconds)}
    return [
        BenchResult(memory, most_bytes / few_bytes, 1.5, "at most", details),
        BenchResult(cached, median_ratio(most_seconds, few_seconds), 1.1, "at most", seconds),
    ]


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that `work` holds at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
