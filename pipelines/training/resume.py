"""A run is resumed in these steps, from `train` in `pipelines.training.run`, which holds the run's lock meanwhile.

On disk, in the run's folder: last.pt, where it goes on, with a copy of best.pt in it (`pipelines.runs.checkpoints`);
result.json once it is finished; config.json and identity.json, what it is (`pipelines.runs.identity`).

1. `settle` refuses a folder of other settings, and asks what to do where other code trained it.
2. `finished` looks at result.json: with the steps asked for, or out of minutes, the run is returned as it is.
3. `LastCheckpoint` reads last.pt, once; a damaged one is set aside for the one before. It refuses a checkpoint of
   another store, and one that is past the steps asked for.
4. `restore_best` writes best.pt anew from it where that is missing or damaged.
5. `reopen` makes a finished run, of which more steps are asked, one that is not.
6. `begin`, called by the loop on every worker, builds the model and the optimiser and gives them the checkpoint's
   state (`TrainState.load_state_dict`), after which nothing holds the checkpoint any more. Workers of Ray Train each
   read last.pt themselves, and after a crash begin here again.

The result is bit for bit that of a run that never stopped, on one worker (`tests/test_checkpoints.py`).
"""

import json
import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch.optim.swa_utils import AveragedModel

from la.errors import InputError
from la.model.hybrid import Hybrid
from la.model.label_anything import build
from la.schedules import factor
from pipelines.config import TrainConfig
from pipelines.episodes.episode_shards import pool_of
from pipelines.runs.checkpoints import (
    BEST,
    LAST,
    NEW,
    PREVIOUS,
    CheckpointWarning,
    DamagedCheckpoint,
    load,
    load_last,
    save,
    save_last,
)
from pipelines.runs.code import Code, code_now
from pipelines.runs.identity import CONFIG, IDENTITY, code_in, differences, identity_in, identity_of
from pipelines.runs.initial_weights import initial_weights
from pipelines.training.fit_matching import fit_matching
from pipelines.training.optimiser import optimiser_of
from pipelines.training.prepare import Prepared
from pipelines.training.state import TrainState

RESULT = "result.json"
OtherCode = Literal["ask", "again", "keep"]  # what becomes of a run that other code trained


def settle(prepared: Prepared, choice: OtherCode) -> Code:
    """The code of the run from here on. With "again", a run of other code is moved aside.

    Raises InputError where the folder holds a run of other settings, or with "ask", one of other code. Runs that do not
    say their code are taken as they are.
    """
    run_dir, config, now = prepared.run_dir, prepared.config, code_now()
    if (run_dir / CONFIG).exists():
        there = identity_in(run_dir, config.workspace)
        if there is None:
            raise InputError(f"{run_dir / CONFIG} are no settings of a run. Pass another --name, or remove {run_dir}.")
        changed = differences(there, identity_of(config))
        if changed:
            listed = "; ".join(f"{name} is {old} there, {new} now" for name, (old, new) in changed.items())
            raise InputError(
                f"{run_dir} holds a run of other settings: {listed}. Pass another --name, or its settings."
            )
    elif config.name and any(run_dir.glob("[!.]*")):
        raise InputError(f"{run_dir} holds other files than a run's. Pass another --name.")
    there = code_in(run_dir)
    trained = [run_dir / name for name in (RESULT, LAST, NEW, PREVIOUS) if (run_dir / name).exists()]
    if there is None:
        return now.model_copy(update={"earlier": ["unknown"] if trained else []})
    if trained and there.differs_from(now):
        if choice == "again":
            _move_aside(run_dir, there)
            return now
        if choice == "ask":
            verb = "finished" if (run_dir / RESULT).exists() else "begun"
            raise InputError(
                f"{run_dir} was {verb} at {there}; the code is now {now.digest}, and may give another result: pass "
                "--again to train anew (the old run is kept beside), or --keep to take it as it is and go on with it."
            )
        return now.model_copy(update={"earlier": [*there.earlier, there.digest]})
    return now.model_copy(update={"earlier": there.earlier if trained else []})


def _move_aside(run_dir: Path, code: Code) -> None:
    """Move a run's files into a folder beside its own, which is locked; what says whose they are goes last."""
    number, beside = 1, run_dir.with_name(f"{run_dir.name}-{code.digest}")
    while (beside / IDENTITY).exists():
        number, beside = number + 1, run_dir.with_name(f"{run_dir.name}-{code.digest}-{number}")
    beside.mkdir(exist_ok=True)
    for path in sorted(run_dir.glob("[!.]*"), key=lambda path: (path.name == IDENTITY, path.name != RESULT)):
        os.replace(path, beside / path.name)


def finished(run_dir: Path, config: TrainConfig) -> bool:
    """Whether the run has the steps asked for, or has run out of minutes. InputError where it has more steps."""
    try:
        result = json.loads((run_dir / RESULT).read_text())
    except FileNotFoundError:
        return False
    _refuse_more_steps(run_dir, config, result["step"])
    timed_out = config.minutes is not None and result["metrics"]["train_seconds"] > 60 * config.minutes
    return result["step"] == config.steps or timed_out


def _refuse_more_steps(run_dir: Path, config: TrainConfig, step: int) -> None:
    if step > config.steps:
        raise InputError(
            f"{run_dir} has trained for {step} steps, but --steps is {config.steps}. Pass --steps {step} or more to "
            "take it or go on with it, or --name for a run of its own."
        )


class LastCheckpoint:
    """The last whole checkpoint of a run: read when it is first asked for, and held until it is taken."""

    def __init__(self, prepared: Prepared):
        self._prepared = prepared

    @cached_property
    def content(self) -> dict | None:
        """None where there is none. Raises InputError where it is of another store, or has more steps than asked for.

        Without --store, the only store of a workspace is another one once that of before was removed.
        """
        run_dir, key = self._prepared.run_dir, self._prepared.store.key
        saved = load_last(run_dir)
        if saved and saved["store"] != key:
            raise InputError(
                f"{run_dir} was trained on the store {saved['store']}, and the workspace has {key} now. Pass --name "
                f"for a run of its own, or remove {run_dir}."
            )
        if saved:
            _refuse_more_steps(run_dir, self._prepared.config, saved["at"]["step"])
        return saved

    def take(self) -> dict | None:
        """The content, which is not held any more."""
        content = self.content
        del self.content
        return content


def restore_best(run_dir: Path, saved: dict | None) -> None:
    """Write best.pt anew from the run's last checkpoint where it is missing or damaged, with a warning.

    Raises InputError where a finished run's best.pt cannot be restored.
    """
    done = (run_dir / RESULT).exists()
    if saved is None and not done:
        return
    try:
        load(run_dir / BEST)
        return
    except FileNotFoundError:
        fault = f"{run_dir / BEST} is missing."
    except DamagedCheckpoint as error:
        fault = str(error)
    best = saved.get("best") if saved else None
    if best:
        save(run_dir / BEST, best)
        warnings.warn(f"{fault} It was restored from {LAST}.", CheckpointWarning, stacklevel=2)
    elif done:
        raise InputError(
            f"{fault} No whole last.pt is there to restore it from. Remove {run_dir} and run the same command again, "
            "which trains from the start."
        )


def reopen(run_dir: Path, config: TrainConfig, saved: dict | None) -> None:
    """Let a run that ended go on for more steps, as if they had been asked for from the start.

    A run validates at its end, where a longer one has no validation: what that chose is taken back.
    """
    (run_dir / RESULT).unlink(missing_ok=True)
    before = saved.get("before_end") if saved else None
    if before and saved["at"]["step"] < config.steps:
        saved["best"], saved["before_end"] = before["best"], None
        saved["at"] |= before["at"]
        if before["best"]:
            save(run_dir / BEST, before["best"])
        else:
            (run_dir / BEST).unlink(missing_ok=True)
        save_last(run_dir, saved)


def begin(prepared: Prepared, last: LastCheckpoint, device: torch.device) -> TrainState:
    """The state of the run's last checkpoint, or that of a new run: of random weights, or of those of `init`."""
    config, saved = prepared.config, last.take()
    torch.manual_seed(config.seed)
    model = build(prepared.shape).to(device)
    if saved is None and config.init:
        model.load_state_dict(initial_weights(config, prepared.shape, prepared.store.info.settings))
    elif saved is None and isinstance(model, Hybrid):
        pools = [pool_of(*source) for source in prepared.sources]
        fit_matching(model.matching, list(zip(pools, prepared.builders, strict=True)))
    optimiser = optimiser_of(model, config)
    length = config.schedule_steps or config.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: factor(config.schedule, step, config.warmup_steps, length)
    )
    state = TrainState(model, AveragedModel(model), optimiser, schedule)
    if saved:
        state.load_state_dict(saved)
    return state
