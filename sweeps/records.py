"""A sweep in MLflow: one run for the sweep, one for each variant, one for each fold of it; all of them get closed."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from pipelines.store.reader import FeatureStore
from pipelines.tracking.job_runs import final_metrics, log_best_model, read_curve
from pipelines.tracking.mlflow_runs import Run, Tolerant, Tracker
from pipelines.tracking.run_contents import (
    changed,
    evaluation_inputs,
    features_input,
    metric_key,
    settings_of,
    statistic_of,
    task_metrics,
    training_inputs,
    training_params,
    varied,
)
from sweeps.paper_tables import Table
from sweeps.results import FoldResult, last_line
from sweeps.study import Variant
from sweeps.trial import TrialSpec

# params of a sweep's own run; the last two are a search's
SWEEP_PARAMS = ["folds", "train_seeds", "protocol", "seeds", "episodes", "recipe", "lr", "steps", "fold", "trials"]
NOT_IN_METRIC = r"[^\w. :-]"
DESCRIPTION_LENGTH = 8000  # characters MLflow takes


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
        self._tolerate, self._stack = Tolerant(), ExitStack()
        params = {name: settings[name] for name in SWEEP_PARAMS if settings.get(name) is not None}
        self._sweep = tracker.open(self._study, plan.name, plan.name, "sweep", params)
        self._sweep.settings(settings | {"store": plan.store.key})
        self._sweep.inputs([features_input(plan.store, "train", "training")])
        self._variants = {v.name: self._open_variant(v.name) for v in plan.variants}
        self._tolerate(self._stack.enter_context, tracker.watched(self._sweep))

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

    def close(self, results: dict[str, FoldResult], tables: list[Table], register: str | None = None) -> None:
        """Log what is missing, sum up over folds, log the best model, end every run.

        KILLED is what neither finished nor failed. `register` names the best model in the model registry.
        """
        self._stack.close()
        outcome = {job.name: self._close_fold(job, results.get(job.name)) for job in self._plan.jobs}
        summaries = {}
        for name, run in self._variants.items():
            jobs = [job for job in self._plan.jobs if job.variant.name == name]
            trials = [(job.fold, fold_metrics(results[job.name])) for job in jobs if job.name in results]
            folds = {fold: means([metrics for of, metrics in trials if of == fold]) for fold, _ in trials}
            summaries[name] = over_folds(list(folds.values()))
            run.metrics(summaries[name] | by_fold(folds))
            self._end(run, [job for job in jobs if outcome[job.name] != "FINISHED"], outcome)
        if not self._variants:  # a search: each trial is a point of its own
            summaries = {name: fold_metrics(result) for name, result in results.items()}
        self._sum_up(summaries, results, tables, register)
        self._end(self._sweep, [job for job in self._plan.jobs if outcome[job.name] != "FINISHED"], outcome)

    def _sum_up(
        self, summaries: dict[str, dict], results: dict[str, FoldResult], tables: list[Table], register: str | None
    ) -> None:
        """The sweep's own run: the best of each mIoU, the variants' on the first task, tables, pictures."""
        jobs = self._plan.jobs
        first = jobs[0].evaluations[0] if jobs and jobs[0].evaluations else None
        headline = metric_key(first.ways, first.shots, first.prompt) if first else "best_seen_miou"
        keys = dict.fromkeys(
            k for metrics in summaries.values() for k in metrics if k == headline or k.startswith("miou/")
        )
        self._sweep.metrics({key: max(m[key] for m in summaries.values() if key in m) for key in keys})
        if self._variants:
            section = headline.replace("miou", "variants", 1)
            values = {name: m[headline] for name, m in summaries.items() if headline in m}
            # MLflow takes no = and + in names
            self._sweep.metrics({f"{section}/{re.sub(NOT_IN_METRIC, ':', name)}": v for name, v in values.items()})
        for table in tables:
            self._sweep.text(table.csv(), f"{table.name}.csv")
            self._sweep.text(table.text(), f"{table.name}.txt")
        if tables:
            self._sweep.describe("\n\n".join(map(markdown, tables))[:DESCRIPTION_LENGTH])
        folder = jobs[0].file.parent if jobs else None
        for picture in sorted(path for kind in ("*.jpg", "*.png") for path in folder.glob(kind)) if folder else ():
            self._sweep.file(picture, "pictures")
        trained = [job for job in jobs if job.name in results and results[job.name].checkpoint]
        if trained:
            best = max(trained, key=lambda job: self._rank(job, headline, summaries, results))
            run = self._open(best)
            log_best_model(results[best.name].checkpoint, self._tracker, [run, self._sweep], register)
            run.close()

    def _rank(self, job: TrialSpec, key: str, summaries: dict[str, dict], results: dict[str, FoldResult]) -> list:
        """By the variant's mean, and within it by the fold's own figure."""
        own = fold_metrics(results[job.name])
        return [metrics.get(key, float("-inf")) for metrics in (summaries.get(job.variant.name, own), own)]

    def abort(self) -> None:
        """End whatever is open as KILLED, after an error of the driver itself."""
        self._tolerate(self._stack.close)
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
        params = {key: value for key, value in self._params(jobs[0]).items() if key not in ("fold", "seed")}
        run = self._tracker.open(self._study, f"{self._plan.name}/{name}", name, "trial", params, self._sweep)
        run.settings(settings_of(jobs[0].train, [c for job in jobs for c in job.evaluations]))
        run.inputs([features_input(self._plan.store, "val", "evaluation")])
        return run

    def _params(self, job: TrialSpec) -> dict[str, object]:
        """What tells a trial from the others: settings that vary, but not for the recipe's sake."""
        # by a capital, since MLflow's page of a comparison first plots the first params by name
        params = {"Variant": job.variant.name, "method": job.variant.method, "fold": job.fold}
        if not job.train:
            return params
        params["seed"] = job.train.seed
        trainings = [other.train for other in self._plan.jobs if other.train]
        beyond_recipe = {name for config in trainings for name in changed(config)}
        return params | training_params(job.train, [name for name in varied(trainings) if name in beyond_recipe])

    def _key(self, job: TrialSpec) -> str:
        return f"{self._plan.name}/{job.name}"

    def _open(self, job: TrialSpec) -> Run:
        if job.name not in self._live:
            parent = self._variants.get(job.variant.name, self._sweep)  # a search has no variants
            run = self._tracker.open(self._study, self._key(job), job.name, "fold", self._params(job), parent)
            self._live[job.name] = run
            run.settings(settings_of(job.train, job.evaluations))
            if job.train:
                run.inputs(training_inputs(job.train, self._plan.store))
        return self._live[job.name]

    def _log_finished(self, job: TrialSpec, result: FoldResult) -> None:
        run = self._open(job)
        of_task = {(c.ways, c.shots, c.prompt): c for c in job.evaluations}
        for score in result.scores:
            config = of_task[score.ways, score.shots, score.prompt]
            run.inputs(evaluation_inputs(config, self._plan.store, score.episodes_digest))
        run.curve(read_curve(result.run_dir))
        run.metrics(fold_metrics(result))
        run.text(job.file.read_text(), job.file.name)
        for config in job.evaluations:
            if config.gallery and config.gallery.exists():
                run.file(config.gallery)
        run.close()

    def _log_failed(self, job: TrialSpec) -> None:
        self._open(job).close("FAILED", self._failed[job.name])

    def _close_fold(self, job: TrialSpec, result: FoldResult | None) -> str:
        run = self._live.get(job.name) or self._tracker.find(self._study, self._key(job))
        if run:
            run.params(self._params(job))  # of a search, in which more has come to vary since
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


def fold_metrics(result: FoldResult) -> dict[str, float]:
    """The metrics of one fold's run; those of a training only where there was one."""
    metrics = {}  # mIoU first: it is what MLflow's page of a comparison plots first
    for score in result.scores:
        metrics |= task_metrics((score.ways, score.shots, score.prompt), score)
    training = final_metrics(result.step, result.training) if result.training else {}
    return metrics | {"seconds": result.seconds} | training


def means(trials: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over trials, such as those of a fold with several seeds of training."""
    keys = dict.fromkeys(key for metrics in trials for key in metrics)
    return {key: float(np.mean([metrics[key] for metrics in trials if key in metrics])) for key in keys}


def over_folds(folds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric under its own name and, from two folds on, mIoU's sample deviation, `std_folds/<task>`."""
    summary = means(folds)
    for key in [key for key in summary if key.startswith("miou/")]:
        values = [metrics[key] for metrics in folds if key in metrics]
        if len(values) > 1:
            summary[statistic_of(key, "std_folds")] = float(np.std(values, ddof=1))
    return summary


def by_fold(folds: dict[int, dict[str, float]]) -> dict[str, float]:
    """`miou/<task>/fold<n>`: a section of MLflow's charts for each task, a chart for each fold, a bar a variant."""
    return {
        f"{key}/fold{fold}": value
        for fold, metrics in folds.items()
        for key, value in metrics.items()
        if key.startswith("miou/")
    }


def markdown(table: Table) -> str:
    """A table as Markdown, with its title and notes; it has no room for the differences to the paper."""
    heads = table.heads
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *table.rows]
    kept = [[cell for cell, head in zip(row, heads, strict=True) if head != "difference"] for row in rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in kept]
    return "\n".join([f"**{table.title}**", "", *lines, "", *(f"{note}  " for note in table.notes)])
