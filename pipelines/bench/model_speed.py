"""Speed and memory of the model: annotated pairs packed against the dense grid, and supports in chunks.

The dense grid is the released model's: an entry for every support and every class, with room for the most prompts.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

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
from pipelines.bench.ratios import BenchResult, in_turn
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import EpisodePlan, draw, evaluation_plan, repeated, training_plan
from pipelines.store.reader import FeatureStore

TRAINING, TESTING = (2, 4, 2), (1, 5, 5)  # (B, N, K)
WAYS, MOST_SHOTS = 5, 20  # of the memory that shots cost


@dataclass
class _Setting:
    """Three ways to the same logits, and real episodes of a store."""

    store: FeatureStore
    model: LabelAnything
    dense: LabelAnything  # the dense grid
    plain: LabelAnything  # the dense grid, and attention that projects the whole feature map, as released
    builders: dict[str, BatchBuilder] = field(default_factory=dict)

    @classmethod
    def of(cls, store: FeatureStore, name: str) -> Self:
        config = preset(name, channels=store.info.channels)
        if not isinstance(config, ModelConfig):
            raise InputError(f"--preset {name} has no dense grid to compare with. Choose paper, official or debug.")
        models = [LabelAnything(replace(config, absent_pairs=absent)) for absent in (False, True, True)]
        for other in models[1:]:
            other.load_state_dict(models[0].state_dict())
        for part in models[2].modules():
            if isinstance(part, Attention):
                part.absorb = False
        return cls(store, *models)

    def batches(self, plan: EpisodePlan, count: int) -> list[tuple[EpisodeBatch, Tensor]]:
        builder = self.builder(plan.split)
        size = plan.batches[0][0]
        drawn = [draw(plan, self.store, 0, n * size, (n + 1) * size) for n in range(count)]
        return [(builder.pack(episodes).to("cpu"), builder.truth(episodes)) for episodes in drawn]

    def builder(self, split: str) -> BatchBuilder:
        if split not in self.builders:
            self.builders[split] = BatchBuilder(self.store, split, self.model.config.mask_px)
        return self.builders[split]


def bench_model(store_path: Path, name: str = "official", repeats: int = 5, fold: int = 0) -> list[BenchResult]:
    """Training and evaluation, packed against the dense grid, and the memory of 1 and of 20 shots. On the CPU."""
    torch.manual_seed(0)
    setting = _Setting.of(FeatureStore(store_path), name)
    return [*_training(setting, fold, repeats), _testing(setting, fold, repeats), *_shots(setting, repeats)]


def _training(setting: _Setting, fold: int, repeats: int) -> list[BenchResult]:
    root = setting.store.path.parents[1]
    work = setting.batches(training_plan(TrainConfig(workspace=root, fold=fold, batches=(TRAINING,))), repeats)

    def step(model: LabelAnything, k: int) -> None:
        batch, truth = work[k]
        model.zero_grad(set_to_none=True)
        focal_loss(model(batch), truth).backward()

    memory = [peak_bytes(lambda model=model: step(model, 0)) for model in (setting.model, setting.plain)]
    return [
        _against_dense(setting, "forward and backward", TRAINING, 2.0, step, [batch for batch, _ in work]),
        BenchResult(
            "model: peak memory of forward and backward, packed over dense grid",
            memory[0] / memory[1],
            0.6,
            "at most",
            {"packed MB": memory[0] / 1e6, "dense MB": memory[1] / 1e6},
        ),
    ]


def _testing(setting: _Setting, fold: int, repeats: int) -> BenchResult:
    _, ways, shots = TESTING
    root = setting.store.path.parents[1]
    config = EvaluateConfig(workspace=root, fold=fold, ways=ways, shots=shots, classes="seen", split="train")
    work = [batch for batch, _ in setting.batches(evaluation_plan(config, 0), repeats)]

    @torch.inference_mode()
    def predict(model: LabelAnything, k: int) -> None:
        model(work[k])

    return _against_dense(setting, "evaluation", TESTING, 2.5, predict, work)


def _against_dense(
    setting: _Setting,
    name: str,
    size: tuple[int, int, int],
    bar: float,
    run: Callable[[LabelAnything, int], None],
    work: list[EpisodeBatch],
) -> BenchResult:
    packed, plain, dense = in_turn(
        *(lambda k, model=model: run(model, k) for model in (setting.model, setting.plain, setting.dense)),
        turns=list(range(len(work))),
    )
    return BenchResult(
        f"model: {name}, dense grid over packed",
        statistics.median(d / p for p, d in zip(packed, plain, strict=True)),
        bar,
        "at least",
        {
            "(B, N, K)": str(size),
            "pairs packed": statistics.fmean(len(batch.pair_support) for batch in work),
            "pairs dense": statistics.fmean(len(dense_grid(batch).pair_support) for batch in work),
            "packed s": statistics.median(packed),
            "dense s": statistics.median(plain),
            "dense s, with the packed one's attention": statistics.median(dense),
        },
    )


def _shots(setting: _Setting, repeats: int) -> list[BenchResult]:
    builder, model = setting.builder("train"), setting.model
    config = EvaluateConfig(
        workspace=setting.store.path.parents[1], ways=WAYS, shots=1, classes="seen", split="train", fold=FOLDS - 1
    )
    one = draw(evaluation_plan(config, 0), setting.store, 0, 0, 1)[0]
    many = repeated(one, MOST_SHOTS)
    query = builder.pack([one]).to("cpu").query

    @torch.inference_mode()
    def prototypes(episode: Episode) -> Tensor:
        return model.prototypes(builder.chunks([episode], WAYS))

    @torch.inference_mode()
    def segment(ready: Tensor) -> None:
        model.decode(query, ready, torch.ones(ready.shape[:2], dtype=torch.bool))

    memory = [peak_bytes(lambda e=e: segment(prototypes(e))) for e in (one, many)]
    with torch.inference_mode():
        apart = (prototypes(many) - model.prototypes(builder.pack([many]).to("cpu"))).abs().max().item()
    few, lots = (prototypes(e) for e in (one, many))
    seconds = in_turn(lambda _: segment(few), lambda _: segment(lots), turns=list(range(4 * repeats)))
    return [
        BenchResult(
            f"model: peak memory of {WAYS}-way inference, {MOST_SHOTS} shots over 1",
            memory[1] / memory[0],
            1.5,
            "at most",
            {"1 shot MB": memory[0] / 1e6, f"{MOST_SHOTS} shots MB": memory[1] / 1e6, "chunked differs by": apart},
        ),
        BenchResult(
            f"model: a query against cached prototypes, {MOST_SHOTS} shots over 1",
            statistics.median(b / a for a, b in zip(*seconds, strict=True)),
            1.1,
            "at most",
            {"seconds": statistics.median(seconds[1])},
        ),
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
