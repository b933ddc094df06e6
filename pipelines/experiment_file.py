"""Settings as text: an experiment's TOML file, NAME=VALUE, options of the command line, and back."""

import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from la.errors import InputError
from pipelines.config import Settings, TrainConfig, closest, fields_of


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a TOML file. Raises InputError where it is missing or is none."""
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {file} cannot be read ({error}). Expected a TOML file, such as --print-config prints."
        ) from error


def assignment(text: str, settings: type[Settings] = TrainConfig) -> tuple[str, str]:
    """NAME=VALUE as (field of `settings`, value). Raises InputError with the nearest names for one that is unknown."""
    name, sign, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not sign or name not in fields_of(settings):
        near = closest(name, settings)
        raise InputError(f"--set {text}: expected NAME=VALUE with a setting, such as {near}.")
    return name, value.strip()


def as_file(config: Settings) -> str:
    """All settings as a TOML file for --config, each with what it does; those without a value are comments."""
    lines = []
    values = config.model_dump(mode="json").items()
    for name, value in sorted(values, key=lambda pair: isinstance(pair[1], dict)):  # a table takes all that follows it
        about = type(config).model_fields[name].description
        text = f"# {name} =\n" if value is None else tomli_w.dumps({name: _without_none(value)})
        lines.append(f"# {about}\n{text}" if about else text)
    return "\n".join(lines)


def _without_none(value: Any) -> Any:
    """The tables within a table keep what has a value: TOML has no word for none."""
    return {k: _without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def flag_of(settings: type[Settings], name: str) -> str:
    """The option's name, such as --val-every for val_every."""
    extra = settings.model_fields[name].json_schema_extra if name in settings.model_fields else None
    return "--" + ((extra or {}).get("flag") or name).replace("_", "-")


def as_text(value: Any) -> str:
    """A value as it is typed: on, 0.0003, mask,point or 4x1x4,2x4x2."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join("x".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_options(config: TrainConfig) -> list[str]:
    """The options of `train` that give these settings: preset, recipe, and what differs from theirs."""
    words = ["--workspace", str(config.workspace), "--preset", config.preset, "--recipe", config.recipe]
    for name in config.changed:
        value, flag = getattr(config, name), flag_of(TrainConfig, name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif name == "also":
            words += [word for path in value for word in (flag, str(path))]
        elif name not in ("workspace", "device", "threads"):
            words += [flag, as_text(value)]
    return words
