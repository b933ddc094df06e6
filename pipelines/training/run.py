"""A training run from settings to result: in this process, or on the workers of Ray Train."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import TrainConfig
from pipelines.runs.checkpoints import BEST, full_disk_told, restore_best
from pipelines.training.loop import Report, Worker, train_loop
from pipelines.training.prepare import Prepared, prepare
from pipelines.training.stop import Stopped, notice
from pipelines.training.train_on_ray import fit
from pipelines.workspace import locked, write_text


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run lies and how it ended."""

    run_dir: Path
    checkpoint: Path  # the best on seen classes
    step: int
    metrics: dict[str, float]


def train(config: TrainConfig, on_report: Report | None = None) -> TrainResult:
    """Train a model, or go on with it; returns at once where the run is finished.

    `on_report` gets step, loss, lr, episodes_per_s, seconds and now and then seen_miou. Raises InputError for an empty
    workspace, a fold outside 0-3, too few images for the batches and a full disk. SIGTERM, SIGUSR1 and Ctrl-C to this
    process end the run after the step under way with a checkpoint, and raise Stopped.
    """
    prepared = prepare(config)  # mistakes are told before a folder is made
    run_dir = prepared.run_dir
    with locked(run_dir, wait=True), full_disk_told(run_dir):
        # two sweeps may need the same run: the second waits and finds it finished
        restore_best(run_dir, prepared.saved)
        if not (run_dir / "result.json").exists():
            _train(prepared, on_report or (lambda _: None))
    result = json.loads((run_dir / "result.json").read_text())
    return TrainResult(run_dir, run_dir / BEST, result["step"], result["metrics"])


def _train(prepared: Prepared, on_report: Report) -> None:
    prepared.draw_episodes()
    write_text(prepared.run_dir / "config.json", prepared.config.model_dump_json(indent=1))
    if prepared.config.workers:
        signum = fit(prepared.config, on_report)
    else:
        with notice() as stop:
            train_loop(prepared, Worker(stop_requested=stop.came), on_report)
        signum = stop.signum
    if signum and not (prepared.run_dir / "result.json").exists():
        raise Stopped(signum, prepared.run_dir)
