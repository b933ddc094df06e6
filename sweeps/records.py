"""A sweep in MLflow: one run for the sweep, one for each variant, one for each fold of it; all of them get closed."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pipelines.runs.code import git_sha
from pipelines.store.reader import FeatureStore
from pipelines.tracking.mlflow_runs import Run, Tracker, TrackingError, final_metrics, read_curve
from pipelines.tracking.run_params import fold_params, task_metrics
from sweeps.paper_tables import Table
from sweeps.results import FoldResult, last_line
from sweeps.study import Variant
from sweeps.trial import TrialSpec

logger = logging.getLogger(__name__)
NAN = float("nan")
# What a method without training has under the keys of those with: equal keys let MLflow compare all of them.
NO_CURVE = {"step": 0, "loss": NAN, "lr": NAN, "episodes_per_s": NAN, "seen_miou": NAN}
NO_TRAINING = {"seen_miou": NAN, "train_seconds": 0.0}


class TrialPlan(Protocol):
    """What is run: a SweepPlan, or a search, whose jobs become more."""

    name: str
    store: FeatureStore
    variants: Sequence[Variant]
    jobs: Sequence[TrialSpec]


class SweepRuns:
    """Listens to a sweep and logs it from the driver.

    While trials run, a tracker that fails costs a warning and no trial: `close` logs from the result files whatever is
    missing, and raises TrackingError if the tracker fails still.
    """

    def __init__(self, tracker: Tracker, study: str, plan: TrialPlan, settings: dict):
        self._tracker, self._plan, self._study = tracker, plan, study
        self._live: dict[str, Run] = {}
        self._failed: dict[str, str] = {}
        self._warned = False
        settings = settings | {"store": plan.store.key, "backbone": plan.store.info.backbone, "git_sha": git_sha()}
        self._sweep = tracker.open(self._study, plan.name, plan.name, "sweep", settings)
        self._variants = {v.name: self._open_variant(v.name) for v in plan.variants}

    def started(self, job: TrialSpec) -> None:
        self._tolerate(self._open, job)

    def reported(self, job: TrialSpec, metrics: dict) -> None:
        if metrics.get("phase") == "train" and job.name in self._live:
            point = {key: value for key, value in metrics.items() if key != "phase"}
            self._tolerate(self._live[job.name].curve, [point])

    def finished(self, job: TrialSpec, result: FoldResult) -> None:
        self._tolerate(self._log_finished, job, result)

    def failed(self, job: TrialSpec, reason: str) -> None:
        self._failed[job.name] = reason
        self._tolerate(self._log_failed, job)

    def close(self, results: dict[str, FoldResult], tables: list[Table]) -> None:
        """Log what is missing, sum up over folds, end every run: KILLED where it neither finished nor failed."""
        outcome = {job.name: self._close_fold(job, results.get(job.name)) for job in self._plan.jobs}
        for name, run in self._variants.items():
            jobs = [job for job in self._plan.jobs if job.variant.name == name]
            run.metrics(over_folds([fold_metrics(results[j.name]) for j in jobs if j.name in results]))
            self._end(run, [job for job in jobs if outcome[job.name] != "FINISHED"], outcome)
        for table in tables:
            self._sweep.text(table.csv(), f"{table.name}.csv")
            self._sweep.text(table.text(), f"{table.name}.txt")
        self._end(self._sweep, [job for job in self._plan.jobs if outcome[job.name] != "FINISHED"], outcome)

    def abort(self) -> None:
        """End whatever is open as KILLED, after an error of the driver itself."""
        for run in [*self._live.values(), *self._variants.values(), self._sweep]:
            if run.status == "RUNNING":
                self._tolerate(run.close, "KILLED")

    def _end(self, run: Run, unfinished: list[TrialSpec], outcome: dict[str, str]) -> None:
        failed = [job.name for job in unfinished if outcome[job.name] == "FAILED"]
        if failed:
            run.close("FAILED", "\n".join(f"{name} failed: {last_line(self._failed[name])}" for name in failed))
        else:
            run.close("KILLED" if unfinished else "FINISHED")

    def _open_variant(self, name: str) -> Run:
        jobs = [job for job in self._plan.jobs if job.variant.name == name]
        params = fold_params(self._plan.store, name, jobs[0].train, [c for job in jobs for c in job.evaluations])
        return self._tracker.open(self._study, f"{self._plan.name}/{name}", name, "trial", params, self._sweep)

    def _key(self, job: TrialSpec) -> str:
        return f"{self._plan.name}/{job.name}"

    def _open(self, job: TrialSpec) -> Run:
        if job.name not in self._live:
            params = fold_params(self._plan.store, job.variant.name, job.train, job.evaluations)
            parent = self._variants.get(job.variant.name, self._sweep)  # a search has no variants
            self._live[job.name] = self._tracker.open(self._study, self._key(job), job.name, "fold", params, parent)
        return self._live[job.name]

    def _log_finished(self, job: TrialSpec, result: FoldResult) -> None:
        run = self._open(job)
        if result.scores:
            run.params({"episodes_digest": result.episodes_digest, "classes_drawn": _classes_drawn(result)})
        run.curve(read_curve(result.run_dir) or [NO_CURVE])
        run.metrics(fold_metrics(result))
        run.text(job.file.read_text(), job.file.name)
        run.close()

    def _log_failed(self, job: TrialSpec) -> None:
        self._open(job).close("FAILED", self._failed[job.name])

    def _close_fold(self, job: TrialSpec, result: FoldResult | None) -> str:
        run = self._live.get(job.name) or self._tracker.find(self._study, self._key(job))
        if result:
            if run is None or run.status != "FINISHED":
                self._log_finished(job, result)
            return "FINISHED"
        if job.name in self._failed:
            if run is None or run.status != "FAILED":
                self._log_failed(job)
            return "FAILED"
        if run is not None and run.status == "RUNNING":
            run.close("KILLED")
        return "KILLED"

    def _tolerate(self, log: Callable, *arguments: object) -> None:
        try:
            log(*arguments)
        except (TrackingError, OSError) as error:
            if not self._warned:
                logger.warning("MLflow did not take a record (%s); the sweep goes on and logs it at its end.", error)
            self._warned = True


def fold_metrics(result: FoldResult) -> dict[str, float]:
    """The metrics of one fold's run; the evaluation's keys are the same for every variant."""
    metrics = {"seconds": result.seconds} | final_metrics(result.step, result.training or NO_TRAINING)
    for score in result.scores:
        metrics |= task_metrics((score.ways, score.shots, score.prompt), score)
    return metrics


def over_folds(folds: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric under its own name and, from two folds on, its sample deviation as `std_folds_<name>`."""
    summary = {}
    for key in dict.fromkeys(key for metrics in folds for key in metrics):
        values = [metrics[key] for metrics in folds if key in metrics]
        summary[key] = float(np.mean(values))
        if len(values) > 1 and not key.startswith("std_"):
            summary[f"std_folds_{key}"] = float(np.std(values, ddof=1))
    return summary


def _classes_drawn(result: FoldResult) -> str:
    return ",".join(dict.fromkeys(str(score.classes_drawn) for score in result.scores))
