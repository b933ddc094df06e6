"""Settings from text: an experiment's TOML file, NAME=VALUE, and back to a file with what each setting does."""

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


def assignment(text: str) -> tuple[str, str | bool]:
    """NAME=VALUE as (field of TrainConfig, value). Raises InputError with the nearest names for one that is unknown."""
    name, sign, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not sign or name not in fields_of(TrainConfig):
        near = closest(name, TrainConfig)
        raise InputError(f"--set {text}: expected NAME=VALUE with a setting of training, such as {near}.")
    return name, value.strip()


def as_file(config: Settings) -> str:
    """All settings as a TOML file for --config, each with what it does; those without a value are comments."""
    lines = []
    values = config.model_dump(mode="json").items()
    for name, value in sorted(values, key=lambda pair: isinstance(pair[1], dict)):  # a table takes all that follows it
        about = type(config).model_fields[name].description
        text = f"# {name} =\n" if value is None else tomli_w.dumps({name: value})
        lines.append(f"# {about}\n{text}" if about else text)
    return "\n".join(lines)
