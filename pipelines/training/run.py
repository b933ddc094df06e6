"""A training run from settings to result: in this process, or on the workers of Ray Train.

What happens to a run that is there already: `pipelines.training.resume`.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import TrainConfig
from pipelines.runs.checkpoints import BEST, full_disk_told
from pipelines.runs.code import Code
from pipelines.runs.identity import code_in, differences, identity_in, identity_of, write_identity
from pipelines.training.loop import Report, Worker, train_loop
from pipelines.training.prepare import Prepared, prepare
from pipelines.training.resume import RESULT, LastCheckpoint, OtherCode, finished, reopen, restore_best, settle
from pipelines.training.stop import Stopped, notice
from pipelines.training.train_on_ray import fit
from pipelines.workspace import locked


class OtherSchedule(UserWarning):
    """A finished run differs from a new one in the length of its schedule alone."""


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run lies and how it ended."""

    run_dir: Path
    checkpoint: Path  # the best on seen classes
    step: int
    metrics: dict[str, float]
    code: str | None = None  # digests of the code that trained it; None of runs that do not say


def train(config: TrainConfig, on_report: Report | None = None, code: OtherCode = "ask") -> TrainResult:
    """Train a model, or go on with it; returns at once where the run is finished.

    `on_report` gets step, loss, lr, episodes_per_s, seconds and now and then seen_miou. `code`: whether a run that
    other code trained is trained again or kept. Raises InputError for an empty workspace, a fold outside 0-3, too few
    images for the batches, a full disk, and what `pipelines.training.resume` refuses. SIGTERM, SIGUSR1 and Ctrl-C to
    this process end the run after the step under way with a checkpoint, and raise Stopped.
    """
    prepared = prepare(config)  # mistakes are told before a folder is made
    run_dir, last = prepared.run_dir, LastCheckpoint(prepared)
    with locked(run_dir, wait=True), full_disk_told(run_dir):
        # two sweeps may need the same run: the second waits and finds it finished
        trained_by = settle(prepared, code)
        done = finished(run_dir, prepared.config)
        restore_best(run_dir, last.content)
        if not done:
            reopen(run_dir, prepared.config, last.content)
            _train(prepared, last, trained_by, on_report or (lambda _: None))
    result = json.loads((run_dir / RESULT).read_text())
    made_by = code_in(run_dir)
    return TrainResult(run_dir, run_dir / BEST, result["step"], result["metrics"], made_by and made_by.digests)


def _train(prepared: Prepared, last: LastCheckpoint, code: Code, on_report: Report) -> None:
    prepared.draw_episodes()
    config = prepared.config
    if config.warmup_steps >= (config.schedule_steps or config.steps):
        warnings.warn(
            f"warmup_steps is {config.warmup_steps}, and training has {config.steps} steps: the learning rate does not "
            "reach lr. Lower warmup_steps, or train longer.",
            stacklevel=2,
        )
    if last.content is None:
        _point_to_shorter(prepared)
    write_identity(prepared.run_dir, prepared.config, code)
    if prepared.config.workers:
        last.take()  # each worker reads it
        signum = fit(prepared.config.model_copy(update={"name": prepared.run_dir.name}), on_report)
    else:
        with notice() as stop:
            train_loop(prepared, Worker(stop_requested=stop.came), on_report, last)
        signum = stop.signum
    if signum and not (prepared.run_dir / RESULT).exists():
        raise Stopped(signum, prepared.run_dir)


def _point_to_shorter(prepared: Prepared) -> None:
    """Warn where a finished run differs in the length of its schedule alone, which may be meant to go on."""
    identity, workspace = identity_of(prepared.config), prepared.config.workspace
    for result in prepared.run_dir.parent.glob(f"*/{RESULT}"):
        there = identity_in(result.parent, workspace)
        changed = differences(there, identity) if there else {}
        if changed.keys() == {"schedule_steps"}:
            (length, now), shorter = changed["schedule_steps"], result.parent
            warnings.warn(
                f"{shorter} differs in the length of its schedule alone, {length} steps in place of {now}, "
                f"so this run starts anew. To start from its weights, pass --init {shorter}.",
                OtherSchedule,
                stacklevel=3,
            )
