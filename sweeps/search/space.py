"""What a search draws, and what it trains for it.

A setting that is searched relative to the preset's own tells, on one preset, something of the others too.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from optuna.trial import Trial

from la.errors import InputError
from la.model.label_anything import preset as model_preset
from pipelines.config import SearchConfig, SettingSpace, TrainConfig, entry_type, plain_type
from pipelines.experiment_file import as_options, as_text

NEUTRAL = {"times": 1.0, "plus": 0}
VALIDATIONS = 6  # in a training: the first is ASHA's first rung, the third the second


def key_of(name: str, space: SettingSpace) -> str:
    """The name under which Optuna keeps a setting, such as lr_times."""
    return f"{name}_{space.relative}" if space.relative else name


def draw_settings(trial: Trial, spaces: Mapping[str, SettingSpace]) -> None:
    """Draw a point of the space with an Optuna trial, which keeps it."""
    for name, space in spaces.items():
        key = key_of(name, space)
        if space.values is not None:
            trial.suggest_categorical(key, [_kept(value) for value in space.values])
        elif _type_of(name) is int and not space.relative:
            trial.suggest_int(key, int(space.low), int(space.high), log=space.log)
        else:
            trial.suggest_float(key, space.low, space.high, log=space.log)


def own_points(spaces: Mapping[str, SettingSpace], train: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points that are the presets as their recipes have them, as far as the space holds them."""
    points = []
    for preset in spaces["preset"].values if "preset" in spaces else (train.get("preset", "paper"),):
        own, point = TrainConfig(**dict(train) | {"preset": preset}), {}
        for name, space in spaces.items():
            value = NEUTRAL[space.relative] if space.relative else _kept(getattr(own, name))
            if space.values:
                inside = value in map(_kept, space.values)
            else:
                inside = value is not None and space.low <= value <= space.high
            point |= {key_of(name, space): value} if inside else {}
        points.append(point)
    return points


def check_spaces(config: SearchConfig) -> None:
    """Build the training of each value and each end of a range.

    Raises InputError or ValidationError for one that a setting cannot have.
    """
    for name, space in config.spaces.items():
        own = TrainConfig(**config.train)
        base = getattr(own, name, None) or getattr(model_preset(own.preset), name, None)
        number = _type_of(name) in (int, float)
        if (space.relative or not space.values) and not number:
            raise InputError(f"[space] {name} is no number: expected a list of values.")
        if space.relative and base is None:
            raise InputError(f"[space] {name} has no value of its own, to which others could be {space.relative}.")
        for value in space.values or (space.low, space.high):
            model_preset(train_config(config, {key_of(name, space): _kept(value)}).preset)  # else it is unknown


def train_config(config: SearchConfig, point: Mapping[str, Any]) -> TrainConfig:
    """The training of a point. Its numbers are rounded to what a command line can well say."""
    given = dict(config.train) | ({"preset": point["preset"]} if "preset" in point else {})
    own, settings = TrainConfig(**given), {}
    for name, space in config.spaces.items():
        if (key := key_of(name, space)) not in point:
            continue  # not there in older searches
        value, base = point[key], getattr(own, name)
        if space.relative:
            base = getattr(model_preset(own.preset), name) if base is None else base
            value = base * value if space.relative == "times" else base + value
            value = round(value) if isinstance(base, int) else value
        elif _of_words(name):
            value = tuple(value.split("+")) if value else ()
        settings[name] = float(f"{value:.3g}") if isinstance(value, float) else value
    return TrainConfig(
        **given | settings,
        workspace=config.workspace,
        store=config.store,
        fold=config.fold,
        seed=config.seed,
        steps=config.steps,
        val_every=first_rung(config),
        val_episodes=config.val_episodes,
        device=config.device,
        threads=config.threads,
    )


def first_rung(config: SearchConfig) -> int:
    """The step at which ASHA first compares, and the distance of validations."""
    return -(-config.steps // VALIDATIONS)


def train_command(train: TrainConfig) -> str:
    """The command line of a training. Where it ran already in its workspace, the command finds it finished."""
    return shlex.join(["python", "cli.py", "train", *as_options(train)])


def _type_of(name: str) -> Any:
    return plain_type(TrainConfig.model_fields[name].annotation)


def _of_words(name: str) -> bool:
    """Whether a setting is a list of words or of paths."""
    entry = entry_type(TrainConfig.model_fields[name].annotation)
    return entry is Path or get_origin(entry) is Literal


def _kept(value: object) -> object:
    """A value as Optuna keeps it: a list of words with a +, one of numbers as it is typed."""
    if not isinstance(value, list | tuple):
        return value
    return "+".join(map(str, value)) if all(isinstance(entry, str | Path) for entry in value) else as_text(value)
