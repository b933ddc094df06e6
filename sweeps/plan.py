"""From a sweep's settings to its trials: pure but for looking up the study and the feature store."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from la.episodes.protocols import protocol_of
from la.errors import InputError
from pipelines.config import EvaluateConfig, SweepConfig, TrainConfig, closest
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, digest
from sweeps.study import SET_BY_SWEEP, Study, Variant, find_study
from sweeps.trial import TrialSpec, trial_name

NOT_IN_DIGEST = {"workspace", "concurrent", "threads", "gpus", "device", "tracking_uri"}  # they change no result


@dataclass(frozen=True)
class SweepPlan:
    """A sweep's name, which digests all that changes a result, its folder and its trials, variants first."""

    name: str
    folder: Path
    store: FeatureStore
    study: Study
    variants: tuple[Variant, ...]
    jobs: tuple[TrialSpec, ...]


def plan_sweep(config: SweepConfig, study: Study | None = None) -> SweepPlan:
    """The trials of a sweep; `study` in place of that which the settings name.

    Raises InputError for an empty workspace, unknown variants or training settings, and folds outside 0-3.
    """
    workspace = Workspace(config.workspace)
    store = FeatureStore(workspace.find_store(config.store))
    study = study or find_study(config.study)
    config = config.model_copy(update={"workspace": workspace.root, "store": store.key})
    variants = _choose(config, study)
    for fold in config.folds:
        if fold not in range(4):
            raise InputError(f"--folds holds {fold}; COCO-20i has the folds 0, 1, 2 and 3.")
    for field in ("folds", "ways", "shots", "prompts", "train_seeds"):
        values = getattr(config, field)
        if len(set(values)) < len(values):
            flag = field.replace("_", "-")
            raise InputError(f"--{flag} names a value twice: {', '.join(map(str, values))}. Name each once.")
    settings = config.model_dump(mode="json", exclude=NOT_IN_DIGEST | {"study"})
    name = f"{study.name}-{digest([settings, study.model_dump(mode='json', exclude={'about', 'tables'})], 8)}"
    folder = workspace.runs / "sweeps" / name
    jobs = tuple(
        _job(config, study, variant, fold, seed, folder)
        for variant in variants
        for fold in config.folds
        for seed in (config.train_seeds if variant.trained else config.train_seeds[:1])
    )
    return SweepPlan(name, folder, store, study, variants, jobs)


def _choose(config: SweepConfig, study: Study) -> tuple[Variant, ...]:
    variants = {variant.name: variant for variant in study.all_variants()}
    wanted = dict.fromkeys(config.variants if config.variants is not None else variants)
    unknown = [name for name in wanted if name not in variants]
    if unknown or not wanted:
        raise InputError(
            f"--variants {', '.join(unknown) or 'is empty'}: not in the study {study.name}. "
            f"Choose from {', '.join(variants)}."
        )
    return tuple(variants[name] for name in wanted)


def _job(config: SweepConfig, study: Study, variant: Variant, fold: int, seed: int, folder: Path) -> TrialSpec:
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
    seeded = len(config.train_seeds) > 1
    file = folder / trial_name(variant.name, fold, seed if seeded and variant.trained else None).replace("/", "-")
    if not variant.trained:
        return TrialSpec(variant, None, evaluations, file.with_name(f"{file.name}.json"), seeded)
    gallery = file.with_name(f"{file.name}.jpg")
    evaluations = (evaluations[0].model_copy(update={"gallery": gallery}), *evaluations[1:])
    train = _train_config(config, study, variant, shared | {"fold": fold, "seed": seed})
    return TrialSpec(variant, train, evaluations, file.with_name(f"{file.name}.json"), seeded)


def _train_config(config: SweepConfig, study: Study, variant: Variant, shared: dict) -> TrainConfig:
    for field in config.train:
        if field in SET_BY_SWEEP or field in variant.settings:
            raise InputError(f"Training setting {field!r} is set by the sweep ({variant.name}), and cannot be given.")
        if field not in TrainConfig.model_fields:
            raise InputError(f"Training setting {field!r} is not known. Nearest: {closest(field, TrainConfig)}.")
    try:
        lists = protocol_of(config.protocol).folds
        return TrainConfig(**study.settings_of(variant, config.train), **shared, fold_lists=lists)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"Training setting {field!r} is {first['input']!r}: {first['msg']}.") from error
