"""What a training run is made of, worked out once from its settings and handed to whatever needs it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from la.data.folds import fold_classes
from la.errors import InputError
from la.model.hybrid import HybridConfig
from la.model.label_anything import ModelConfig, preset
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import (
    EpisodePlan,
    EpisodeShards,
    ensure_episodes,
    evaluation_plan,
    training_plan,
    training_plan_of_another,
)
from pipelines.runs.identity import run_dir_of
from pipelines.runs.initial_weights import initial_weights
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, digest

VALIDATION_SEED = 1000  # apart from the seeds of the test protocol
SWITCHES = (
    "token_pool",
    "class_example_mixer",
    "spatial_convs",
    "match_prototypes",
    "match_affinity",
    "object_metric",
    "objectness",
    "drop_maps",
    "dim",
    "depth",
)


@dataclass(frozen=True)
class Prepared:
    """The parts of a training run. Episodes are drawn when first asked for, and once."""

    config: TrainConfig
    store: FeatureStore
    sources: tuple[
        tuple[EpisodePlan, FeatureStore], ...
    ]  # episodes to train on: of its own store, then of those in `also`
    shape: ModelConfig | HybridConfig
    run_dir: Path

    @cached_property
    def shards(self) -> list[EpisodeShards]:
        """The episodes to train on, of each source."""
        return [ensure_episodes(plan, store) for plan, store in self.sources]

    @cached_property
    def validation(self) -> EpisodeShards:
        """1-way 1-shot episodes of seen classes on val images: what checkpoints are chosen by."""
        config = self.config
        settings = EvaluateConfig(
            workspace=config.workspace, fold=config.fold, classes="seen", split="val", episodes=config.val_episodes
        )
        return ensure_episodes(evaluation_plan(settings, VALIDATION_SEED + config.seed, config.fold_lists), self.store)

    @cached_property
    def builders(self) -> list[BatchBuilder]:
        """What makes batches of each source's episodes."""
        return [BatchBuilder(store, "train", self.shape.mask_px) for _, store in self.sources]

    @property
    def episodes_digest(self) -> str:
        """Of the episodes of one source its own digest, of several a digest of theirs."""
        digests = [shards.digest for shards in self.shards]
        return digests[0] if len(digests) == 1 else digest(digests)

    def draw_episodes(self) -> None:
        """Draw what is not drawn yet, episodes and small masks, so that workers that start together only read."""
        _ = self.shards, self.validation, self.builders


def prepare(config: TrainConfig) -> Prepared:
    """Settings with every path whole and the store's key in them, and what they come to.

    Raises InputError for an empty workspace, a fold outside 0-3, settings that the preset has not, a schedule shorter
    than the training, and an `init` that is not there or is another model.
    """
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    config = config.model_copy(update={"store": store.key})
    if config.schedule != "constant" and config.steps > (config.schedule_steps or config.steps):
        raise InputError(
            f"--schedule-steps {config.schedule_steps} is less than --steps {config.steps}: the last steps would train "
            "at a rate of 0. Raise it, or lower --steps."
        )
    shape = model_config(config, store.info.channels)
    fold_classes(store.dataset("train").categories, config.fold, config.fold_lists)
    others = [FeatureStore(Workspace(path).find_store()) for path in config.also]
    sources = (training_plan(config), store), *((training_plan_of_another(config, store, o), o) for o in others)
    if config.init:
        initial_weights(config, shape, store.info.settings)
    return Prepared(config, store, sources, shape, run_dir_of(config))


def model_config(config: TrainConfig, channels: int) -> ModelConfig | HybridConfig:
    """Raises InputError for a switch of a part that the preset has not."""
    own = preset(config.preset)
    settings = {name: getattr(config, name) for name in SWITCHES}
    # what is not given, or given as it is anyway, says nothing: a preset need not know it
    given = {k: v for k, v in settings.items() if v is not None and (v is not True or hasattr(own, k))}
    return preset(config.preset, channels=channels, **given)


def steps_of_epochs(config: TrainConfig, epochs: float) -> int:
    """Steps that draw `epochs` x (training photos) episodes, as the paper counts an epoch."""
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    if not 0 < epochs < float("inf"):
        raise InputError(f"--epochs is {epochs:g}; expected a number above 0, such as 50.")
    per_step = max(1, config.workers) * config.accumulate * sum(b for b, _, _ in config.batches) / len(config.batches)
    return max(1, round(epochs * len(store.image_ids("train")) / per_step))
