"""From a sweep's settings to its trials: pure but for looking up the feature store."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from la.episodes.protocols import protocol_of
from la.errors import InputError
from pipelines.config import EvaluateConfig, SweepConfig, TrainConfig
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, digest
from sweeps.studies.registry import STUDIES
from sweeps.study import Variant
from sweeps.trial import TrialSpec

SET_BY_SWEEP = {"workspace", "store", "fold", "fold_lists", "device", "threads"}
NOT_IN_DIGEST = {"workspace", "concurrent", "threads", "gpus", "device", "tracking_uri"}  # they change no result


@dataclass(frozen=True)
class SweepPlan:
    """A sweep's name, which digests all that changes a result, its folder and its trials, variants first."""

    name: str
    folder: Path
    store: FeatureStore
    variants: tuple[Variant, ...]
    jobs: tuple[TrialSpec, ...]


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Raises InputError for an empty workspace, unknown variants or training settings, and folds outside 0-3."""
    workspace = Workspace(config.workspace)
    store = FeatureStore(workspace.find_store(config.store))
    config = config.model_copy(update={"workspace": workspace.root, "store": store.key})
    variants = _choose(config)
    for fold in config.folds:
        if fold not in range(4):
            raise InputError(f"--folds holds {fold}; COCO-20i has the folds 0, 1, 2 and 3.")
    for field in ("folds", "ways", "shots", "prompts"):
        values = getattr(config, field)
        if len(set(values)) < len(values):
            raise InputError(f"--{field} names a value twice: {', '.join(map(str, values))}. Name each once.")
    name = f"{config.study}-{digest(config.model_dump(mode='json', exclude=NOT_IN_DIGEST), 8)}"
    folder = workspace.runs / "sweeps" / name
    jobs = tuple(_job(config, variant, fold, folder) for variant in variants for fold in config.folds)
    return SweepPlan(name, folder, store, variants, jobs)


def _choose(config: SweepConfig) -> tuple[Variant, ...]:
    variants = {variant.name: variant for variant in STUDIES[config.study].variants}
    wanted = dict.fromkeys(config.variants if config.variants is not None else variants)
    unknown = [name for name in wanted if name not in variants]
    if unknown or not wanted:
        raise InputError(
            f"--variants {', '.join(unknown) or 'is empty'}: not in the study {config.study}. "
            f"Choose from {', '.join(variants)}."
        )
    return tuple(variants[name] for name in wanted)


def _job(config: SweepConfig, variant: Variant, fold: int, folder: Path) -> TrialSpec:
    shared = {"workspace": config.workspace, "store": config.store, "device": config.device, "threads": config.threads}
    evaluations = tuple(
        EvaluateConfig(
            **shared,
            method=variant.method,
            fold=fold,
            ways=ways,
            shots=shots,
            prompt=prompt,
            protocol=config.protocol,
            seeds=config.seeds,
            episodes=config.episodes,
        )
        for ways in config.ways
        for shots in config.shots
        for prompt in config.prompts
    )
    if variant.trained:
        gallery = folder / f"{variant.name}-fold{fold}.jpg"
        evaluations = (evaluations[0].model_copy(update={"gallery": gallery}), *evaluations[1:])
    train = _train_config(config, variant, fold, shared)
    return TrialSpec(
        variant, train if variant.trained else None, evaluations, folder / f"{variant.name}-fold{fold}.json"
    )


def _train_config(config: SweepConfig, variant: Variant, fold: int, shared: dict) -> TrainConfig:
    train = dict(config.train)
    if "recipe" in variant.overrides:  # a model of another kind, of other sizes, with settings of its own
        its_own = ("recipe", "batches", "lr", "dim", "depth")
        train = {name: value for name, value in train.items() if name not in its_own}
    for field in train:
        # a variant's own learning rate is a default: one that is given wins
        reserved = field in SET_BY_SWEEP or (field in variant.overrides and field != "lr")
        if reserved or field not in TrainConfig.model_fields:
            reason = f"set by the sweep ({variant.name})" if reserved else "no setting of training"
            choices = sorted(set(TrainConfig.model_fields) - SET_BY_SWEEP)
            raise InputError(f"Training setting {field!r} is {reason}. Choose from {', '.join(choices)}.")
    overrides = dict(variant.overrides)
    if "lr" in train or train.get("recipe", "small") != "small":
        overrides.pop("lr", None)
    try:
        lists = protocol_of(config.protocol).folds
        return TrainConfig(**shared, **(train | overrides), fold=fold, fold_lists=lists)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"Training setting {field!r} is {first['input']!r}: {first['msg']}.") from error
