"""The runs of single trainings and evaluations, in the experiments `train` and `evaluate`."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from la.errors import InputError
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore
from pipelines.tracking.mlflow_runs import Run, Tolerant, Tracker, TrackingError
from pipelines.tracking.run_contents import (
    TASK,
    changed,
    evaluation_inputs,
    settings_of,
    task_metrics,
    training_inputs,
    training_params,
)
from pipelines.workspace import Workspace, digest

if TYPE_CHECKING:  # a sweep's driver needs no more than what they make
    from pipelines.evaluation.evaluate import EvaluateResult
    from pipelines.training.loop import Report
    from pipelines.training.resume import OtherCode
    from pipelines.training.run import TrainResult

MODEL = "la.model"  # tag: digest of the checkpoint that was logged, and the name it was registered by
CURVE_SECONDS = 2.0  # between requests while a training runs

logger = logging.getLogger(__name__)


def tracked_training(
    config: TrainConfig,
    on_report: "Report" = lambda _: None,
    register: str | None = None,
    code: "OtherCode" = "ask",
) -> "TrainResult":
    """Train as `pipelines.training.run.train` does, with curves and the machine's load in MLflow meanwhile.

    `register` names the best model in the model registry. A tracker that fails while training runs costs a warning;
    TrackingError where it fails still at the end, InputError where it does not answer at the beginning.
    """
    from pipelines.training.run import train

    with LiveTraining(config) as live:

        def report(metrics: dict) -> None:
            live.reported(metrics)
            on_report(metrics)

        result = train(config, report, code)
    log_training(config, result, register)
    return result


class LiveTraining:
    """The run of a training under way. It is opened by the first report, so that a wrong setting leaves none."""

    def __init__(self, config: TrainConfig):
        workspace = Workspace(config.workspace)
        workspace.find_store(config.store)  # first, so that nothing is made in a folder that is no workspace
        self._config, self._tracker = config, Tracker(workspace)
        self._stack, self._tolerate = ExitStack(), Tolerant()
        self._run: Run | None = None
        self._waiting: list[dict] = []
        self._logged = float("-inf")

    def reported(self, report: Mapping) -> None:
        """Take a report; what came since is logged every two seconds."""
        self._waiting.append(dict(report))
        if time.monotonic() - self._logged > CURVE_SECONDS:
            self._tolerate(self._log)
            self._logged = time.monotonic()

    def _log(self) -> None:
        if self._run is None:
            self._run = self._stack.enter_context(_open(self._tracker, self._config))
            self._tolerate(self._stack.enter_context, self._tracker.watched(self._run))
        self._run.curve(self._waiting)
        self._waiting = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tolerate(self._stack.__exit__, *error)


def log_training(config: TrainConfig, result: "TrainResult", register: str | None = None) -> None:
    """Log how a training ended, whatever is missing of its run, and its best model; InputError as `log_model`."""
    tracker = Tracker(Workspace(config.workspace))
    file = result.run_dir / "result.json"
    drawn = json.loads(file.read_text())["episodes_digest"] if file.exists() else None
    with _open(tracker, config, drawn) as run:
        run.curve(read_curve(result.run_dir))
        run.metrics(final_metrics(result.step, result.metrics))
        log_best_model(result.checkpoint, tracker, [run], register)


def log_best_model(checkpoint: Path, tracker: Tracker, runs: Sequence[Run], register: str | None = None) -> None:
    """Log a checkpoint as the model of the first run, which the others name too; one that is there already is not.

    Without a name to register it by, a failure is a warning.
    """
    try:
        from pipelines.tracking.mlflow_model import log_model

        content = f"{hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]} {register or ''}".strip()
        if runs[-1].tag(MODEL) != content:
            uri = log_model(checkpoint, tracker, runs[0].id, register)
            for run in runs[1:]:
                run.model(uri)
            runs[-1].set_tag(MODEL, content)
    except (TrackingError, InputError, OSError, ImportError) as error:
        if register:
            raise
        logger.warning("%s is not in MLflow as a model: %s", checkpoint, error)


def log_evaluation(config: EvaluateConfig, result: "EvaluateResult") -> None:
    """The run of one evaluation; each class's IoU is in its `per_class.json`."""
    workspace = Workspace(config.workspace)
    store = FeatureStore(workspace.find_store(config.store))
    training = _training_of(config, store)
    params = {name: getattr(config, name) for name in TASK} | {"fold": config.fold, "method": result.method}
    params |= {"classes_drawn": result.classes_drawn}
    if training:
        params = training_params(training, changed(training)) | params
    name = f"{result.method}-fold{config.fold}-{config.ways}way-{config.shots}shot-{config.prompt}"
    settings = settings_of(training, [config])
    key = f"{name}-{digest([settings, store.key, result.episodes_digest], 8)}"
    with Tracker(workspace).open("evaluate", key, name, "fold", params) as run:
        run.settings(settings)
        run.inputs(evaluation_inputs(config, store, result.episodes_digest))
        run.metrics(task_metrics((config.ways, config.shots, config.prompt), result))
        run.text(json.dumps(result.per_class, indent=1), "per_class.json")
        if config.gallery:
            run.file(config.gallery)


def final_metrics(step: int, training: Mapping[str, float | None]) -> dict[str, float]:
    """How a training ended. Under the name of its curve, the best seen mIoU would pass for the curve's last point."""
    renamed = {("best_seen_miou" if key == "seen_miou" else key): value for key, value in training.items()}
    return {"steps_trained": step} | {key: value for key, value in renamed.items() if value is not None}


def read_curve(run_dir: Path | None) -> list[dict]:
    """Every report of a training run, in order; empty where none were kept."""
    file = run_dir / "curve.jsonl" if run_dir else None
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def _open(tracker: Tracker, config: TrainConfig, episodes_digest: str | None = None) -> Run:
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    name = run_dir_of(config).name
    run = tracker.open("train", name, name, "fold", training_params(config, changed(config)))
    run.settings(settings_of(config))
    run.inputs(training_inputs(config, store, episodes_digest))
    return run


def _training_of(config: EvaluateConfig, store: FeatureStore) -> TrainConfig | None:
    """The training behind an evaluation's checkpoint; None for a baseline and for a checkpoint without its run."""
    if config.method != "la":
        return None
    from pipelines.evaluation.methods import latest_run

    path = config.checkpoint or latest_run(config, store)
    try:
        return TrainConfig.model_validate_json(((path if path.is_dir() else path.parent) / "config.json").read_text())
    except (OSError, ValueError):
        return None
