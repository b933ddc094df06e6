"""What a sweep will run and how long it will take, from rates measured on its own features."""

import heapq
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pipelines.bench.cost import Rates, images_per_step, job_of
from pipelines.bench.rates import measure_evaluation, measure_training, photos_drawn
from pipelines.bench.ratios import workspace_beside
from pipelines.config import EvaluateConfig, SweepConfig, TrainConfig
from pipelines.episodes.episode_shards import ensure_episodes, evaluation_plan
from pipelines.evaluation.evaluate import tasks_of
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace
from sweeps.plan import SweepPlan, plan_sweep
from sweeps.study import Study
from sweeps.trial import TrialSpec, finished

START_SECONDS = 15.0  # until Ray and the workers run and have loaded torch


def forecast(config: SweepConfig, study: Study, console: Console) -> tuple[Table, list[str]]:
    """The trials with their hours, and lines that sum them up. Nothing is left in the workspace.

    Rates are those of this machine: a few steps of each preset and its batches, and a few episodes. Raises InputError
    as `plan_sweep` does.
    """
    plan = plan_sweep(config, study)
    with console.status("measuring on this machine"), tempfile.TemporaryDirectory(prefix="la-forecast-") as folder:
        seconds = trial_seconds(plan, workspace_beside(plan.store.path, Path(folder)))
    table = Table("trial", "minutes", title=f"{plan.name}: {len(plan.jobs)} trials")
    for job in plan.jobs:
        minutes = f"{seconds[job.name] / 60:.1f}" if job.name in seconds else "finished"
        table.add_row(job.name, minutes)
    at_once = trials_at_once(config, max((job.train.workers for job in plan.jobs if job.train), default=0))
    hours = (makespan(list(seconds.values()), at_once) + START_SECONDS * bool(seconds)) / 3600
    tasks = ", ".join(dict.fromkeys(f"{c.ways}-way {c.shots}-shot {c.prompt}" for c in plan.jobs[0].evaluations))
    return table, [
        f"evaluated on {tasks}: {config.seeds} x {config.episodes} episodes of protocol {config.protocol}",
        f"{len(seconds)} trials to run, {at_once} at once: {hours:.2g} hours, or {60 * hours:.0f} minutes, here",
    ]


def trial_seconds(plan: SweepPlan, workspace: Path) -> dict[str, float]:
    """Seconds of each trial that is not finished, by its name; `workspace` holds the store, and takes what is drawn."""
    store, threads = FeatureStore(Workspace(workspace).find_store()), plan.jobs[0].evaluations[0].threads

    @cache
    def rates(config: TrainConfig) -> tuple[Rates, float]:
        photos = photos_drawn(config, store.dataset("train"))
        return measure_training(config, photos), photos

    @cache
    def photo_seconds(method: str) -> float:
        return measure_evaluation(EvaluateConfig(workspace=workspace, method=method, threads=threads))

    @cache
    def photos_tested(config: EvaluateConfig) -> float:
        """Photos of an evaluation's episodes, of which equal ones are predicted once."""
        shards = (ensure_episodes(evaluation_plan(config, seed), store) for seed in range(config.seeds))
        return sum(len(set(tasks_of(each))) for each in shards) * images_per_step([(1, config.ways, config.shots)])

    def seconds(job: TrialSpec) -> float:
        neutral = {"method": "prototype", "checkpoint": None, "gallery": None}
        tested = sum(photos_tested(config.model_copy(update=neutral)) for config in job.evaluations)
        if not job.train:
            return tested * photo_seconds(job.variant.method)
        # variants of a preset cost nearly the same, so one with its batches stands for them
        names = ("preset", "recipe", "dim", "depth", "batches", "accumulate", "threads", "device")
        alike = {name: getattr(job.train, name) for name in names}
        measured, photos = rates(TrainConfig(workspace=workspace, **alike))
        work = job_of(job.train, measured, photos)
        return work.steps + work.beside + tested * measured.photo

    return {job.name: seconds(job) for job in plan.jobs if not finished(job)}


def trials_at_once(config: SweepConfig, workers: int) -> int:
    """So many trials fit on this machine, or are asked for."""
    processes = max(1, workers)
    fit = max(1, len(os.sched_getaffinity(0)) // (config.threads * processes))
    if torch.cuda.is_available() and config.device != "cpu":
        fit = min(fit, max(1, int(torch.cuda.device_count() / ((config.gpus or 1) * processes))))
    return min(fit, config.concurrent or fit)


def makespan(seconds: list[float], at_once: int) -> float:
    """When the last of these trials ends, each begun, in their order, as soon as there is room."""
    ends = [0.0] * at_once
    for each in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + each)
    return max(ends)
