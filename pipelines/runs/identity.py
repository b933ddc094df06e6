"""What names a run: the settings that change its result, resolved; and the files of its folder that say so.

config.json     the settings of the last start, as TrainConfig reads them
config.toml     the same in short, as `train --config` reads it
identity.json   the settings that change the result, with keys of stores and the digest of the weights it started from
                in place of names and paths, and the code it was trained by (`pipelines.runs.code`)

Runs of earlier versions have config.json alone, and names that digest other settings: they are found by what it says.
"""

import json
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomli_w

from la.errors import InputError
from pipelines.config import TrainConfig
from pipelines.runs.checkpoints import BEST, LAST, PREVIOUS, DamagedCheckpoint, load
from pipelines.runs.code import Code
from pipelines.workspace import Workspace, digest, write_text

CONFIG, EXPERIMENT, IDENTITY = "config.json", "config.toml", "identity.json"
# A run may be given more steps; the rest says where and how it runs, or, as the recipe, follows from other settings.
CHANGES_NOTHING = {
    *("workspace", "name", "recipe", "steps", "minutes", "checkpoint_every", "threads", "device", "compile")
}


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """Every setting that changes the result: two runs with equal ones are one run.

    Raises InputError where a feature store or the checkpoint of `init` is missing.
    """
    settings = config.model_dump(mode="json", exclude=CHANGES_NOTHING)
    return settings | {
        "store": Workspace(config.workspace).find_store(config.store).name,
        "also": [Workspace(path).find_store().name for path in config.also],
        "init": weights_digest(config.init) if config.init else None,
        "schedule_steps": None if config.schedule == "constant" else config.schedule_steps or config.steps,
    }


def run_name(config: TrainConfig) -> str:
    """The name that a run has unless it is given one: readable, and a digest of its identity. Raises InputError."""
    return f"{config.preset}-fold{config.fold}-seed{config.seed}-{digest(identity_of(config), 8)}"


def run_dir_of(config: TrainConfig) -> Path:
    """The folder of the run: that of its `name`, one that holds this very run, or a new one. Raises InputError."""
    runs = Workspace(config.workspace).runs
    if config.name is not None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", config.name):
            raise InputError(f"--name is {config.name!r}; expected letters, digits, '-', '_' and '.' alone.")
        return runs / config.name
    own = runs / run_name(config)
    return own if (own / CONFIG).exists() else _of_an_earlier_version(config, own) or own


def _of_an_earlier_version(config: TrainConfig, own: Path) -> Path | None:
    """The folder of this run under another digest; of several, the one with most steps that it can go on from."""
    identity, alike = identity_of(config), []
    for file in own.parent.glob(f"{own.name.rpartition('-')[0]}-{'?' * 8}/{CONFIG}"):
        there = identity_in(file.parent, config.workspace)
        if there is not None and not differences(there, identity):
            steps = json.loads(file.read_text())["steps"]
            alike.append((steps <= config.steps, steps if steps <= config.steps else -steps, file.parent))
    return max(alike)[2] if alike else None


def identity_in(run_dir: Path, workspace: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder of a workspace; None where there is no run, or one that cannot be read."""
    try:
        if (run_dir / IDENTITY).exists():
            return json.loads((run_dir / IDENTITY).read_text())["settings"]
        settings = json.loads((run_dir / CONFIG).read_text()) | {"workspace": workspace}  # which may have been moved
        settings["store"] = settings["store"] or _store_in(run_dir)
        return identity_of(TrainConfig(**settings))
    except (OSError, ValueError, KeyError):
        return None


def _store_in(run_dir: Path) -> str | None:
    """Key of the store that a run's checkpoints were trained on; None where no whole one is there."""
    for name in (BEST, LAST, PREVIOUS):
        with suppress(OSError, DamagedCheckpoint):
            return load(run_dir / name)["store"]
    return None


def differences(there: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (there, now) of two identities; one that an earlier version did not know has its default there."""
    known = json.loads(TrainConfig(workspace=Path()).model_dump_json()) | there
    return {name: (known[name], value) for name, value in now.items() if known[name] != value}


def code_in(run_dir: Path) -> Code | None:
    """The code that a run was trained by; None of a run that does not say, as those of earlier versions."""
    try:
        return Code(**json.loads((run_dir / IDENTITY).read_text())["code"])
    except FileNotFoundError:
        return None


def write_identity(run_dir: Path, config: TrainConfig, code: Code) -> None:
    """Say in the run's folder what it is."""
    content = {"settings": identity_of(config), "code": code.model_dump()}
    write_text(run_dir / IDENTITY, json.dumps(content, indent=1))
    write_text(run_dir / EXPERIMENT, settings_as_toml(config))
    write_text(run_dir / CONFIG, config.model_dump_json(indent=1))


def settings_as_toml(config: TrainConfig) -> str:
    """An experiment file: preset, recipe, fold, seed, and what differs from their defaults. It names no workspace."""
    settings = config.model_dump(mode="json", exclude={"workspace"}, exclude_none=True)
    always = ("preset", "recipe", "fold", "seed")
    return tomli_w.dumps({name: settings[name] for name in (*always, *config.changed) if name in settings})


def weights_digest(source: str) -> str:
    """Digest of the weights of a run's folder or a checkpoint. Raises InputError where it is none."""
    path = Path(source)
    path = path / "best.pt" if path.is_dir() else path
    return _weights_digest(source, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=32)
def _weights_digest(source: str, changed: int) -> str:
    from la.predictor.checkpoint import read_checkpoint  # it loads timm

    return read_checkpoint(source).digest
