"""Runs a study: every variant on every fold as a Ray Tune trial, each result a file, everything in MLflow.

The result files are the sweep's state. A sweep that was killed and is started again with the same settings reads them,
skips what is finished, and lets training go on from its own checkpoints; one whose settings differ is another sweep.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

# Read by Tune: its own tables would fight with ours, and its CSV, JSON and TensorBoard files repeat MLflow.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray import tune
from ray.tune.search import Searcher
from rich.console import Console

from la.errors import InputError
from pipelines.cluster import ray_session, wait_for
from pipelines.config import SweepConfig, TrialPlacement
from pipelines.runs.code import code_now
from pipelines.tracking.mlflow_runs import Tracker
from pipelines.training.resume import OtherCode
from pipelines.workspace import Workspace, locked, write_text
from sweeps.display import SweepDisplay
from sweeps.paper_tables import tables_of
from sweeps.plan import plan_sweep
from sweeps.records import SweepRuns
from sweeps.results import FoldResult, SweepResult, describe_error, read_result
from sweeps.study import Study
from sweeps.trial import Report, TrialSpec, finished, run_trial

Trainable = Callable[[TrialSpec, Report], FoldResult]
TrialWork = Callable[[dict, Report], object]  # runs in a worker, on what a trial is given
WORKER_DIED = "the trial's process died without an error: killed, most likely for lack of memory (--concurrent 1?)"


class Listener(Protocol):
    """What the driver tells, in its own process, while trials run."""

    def started(self, job: TrialSpec) -> None: ...
    def reported(self, job: TrialSpec, metrics: dict) -> None: ...
    def finished(self, job: TrialSpec, result: FoldResult) -> None: ...
    def failed(self, job: TrialSpec, reason: str) -> None: ...


def run_sweep(
    config: SweepConfig,
    console: Console | None = None,
    trainable: Trainable = run_trial,
    command: str | None = None,
    study: Study | None = None,
    code: OtherCode = "ask",
    register: str | None = None,
) -> SweepResult:
    """Run what is not finished, log to MLflow, write the tables as CSV; progress goes to `console`.

    A trial that fails is in `failed` and costs no other; the next start tries it again. Ctrl-C ends the sweep with what
    it has. Uses the running Ray, the cluster of RAY_ADDRESS, or starts one here; on several machines the workspace and
    the checkout have to lie on storage they share. `trainable` runs in a worker and has to write `job.file`.
    `command` is what was typed, for the report to name; `study` is taken in place of that which `config` names.
    `code`: whether trials that other code trained are trained again or kept; by itself a sweep does not mix codes.
    `register` names the best model in the model registry.

    Raises InputError for settings that cannot be met and for a sweep that runs already.
    """
    plan = plan_sweep(config, study)
    with locked(plan.folder, wait=False):
        settings = config.model_copy(update={"store": plan.store.key}).model_dump(mode="json")
        content = {"command": command, "config": settings, "study": plan.study.model_dump(mode="json")}
        write_text(plan.folder / "sweep.json", json.dumps(content, indent=1))
        results = settle_codes({job.name: job for job in plan.jobs}, code)
        todo = [job for job in plan.jobs if job.name not in results]
        failed: dict[str, str] = {}
        logged = config.model_dump(mode="json", exclude={"workspace", "train", "tracking_uri"}) | config.train
        runs = SweepRuns(Tracker(Workspace(config.workspace), config.tracking_uri), plan.study.name, plan, logged)
        try:
            if todo:
                by_name = {job.name: job for job in todo}

                def work(settings: dict, report: Report) -> FoldResult:
                    job = by_name[settings["trial"]]
                    return trainable(job, report) if code == "ask" else trainable(job, report, code=code)

                with SweepDisplay(console, len(plan.jobs), len(results)) as display:
                    workers = max((job.train.workers for job in plan.jobs if job.train), default=0)
                    failed = run_trials(config, workers, plan.folder, work, by_name, [runs, display])
            results = {job.name: result for job in plan.jobs if (result := finished(job))}
            interrupted = any(job.name not in results and job.name not in failed for job in plan.jobs)
            outcome = SweepResult(
                config, plan.name, plan.folder, plan.study, plan.variants, results, failed, interrupted
            )
            tables = tables_of(outcome)
            for table in tables:
                (plan.folder / f"{table.name}.csv").write_text(table.csv())
            runs.close(results, tables, register)
            return outcome
        except BaseException:
            runs.abort()
            raise


def settle_codes(jobs: Mapping[str, TrialSpec], code: OtherCode) -> dict[str, FoldResult]:
    """The results that are there and count. With "again", those that other code trained are deleted.

    Raises InputError with "ask" where there are such.
    """
    results = {name: result for name, job in jobs.items() if (result := read_result(job.file))}
    others = [name for name, result in results.items() if result.code and result.code != code_now().digest]
    if others and code == "ask":
        codes = ", ".join(sorted({str(results[name].code) for name in others}))
        raise InputError(
            f"{len(others)} of {len(jobs)} trials were trained by code {codes}, the code is now {code_now().digest}: "
            "one table would mix them. Pass --again to train them anew, or --keep to take them, marked in the table."
        )
    for name in others if code == "again" else ():
        jobs[name].file.unlink()
        del results[name]
    return {name: result for name, result in results.items() if result.finished}


def run_trials(
    placement: TrialPlacement,
    workers: int,
    folder: Path,
    work: TrialWork,
    jobs: Mapping[str, TrialSpec],
    listeners: Sequence[Listener],
    searcher: Searcher | None = None,
) -> dict[str, str]:
    """Run trials with Tune, each with `workers` Ray Train workers or alone; returns the errors of those that failed.

    Without a `searcher`, all `jobs` are run; one proposes trials, {"trial": name, ...}, and adds each to `jobs` first.
    """

    def trial(settings: dict) -> None:
        try:
            # In a dict of its own: Tune reads meaning into some keys, a `done` that is true ends the trial.
            work(settings, lambda metrics: tune.report({"report": metrics}))
        except Exception as error:
            # Reported, since Tune tells its callbacks that a trial failed but not why; raised, since a process whose
            # GPU context broke must not be used for the next trial.
            tune.report({"error": describe_error(error)})
            raise

    relay = _Relay(jobs, listeners)
    # Of an earlier start: Tune's own state, which nothing here reads back.
    shutil.rmtree(folder / "tune", ignore_errors=True)
    with ray_session() as alone:
        resources, concurrent = trial_resources(placement, workers, alone)
        tuner = tune.Tuner(
            tune.with_resources(trial, tune.PlacementGroupFactory([resources])),
            param_space=None if searcher else {"trial": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1 if searcher else 1,  # the searcher says when it has no more
                max_concurrent_trials=concurrent,
                # A worker that stays saves each further trial the start of a process and the import of torch.
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0, callbacks=[relay]),
        )
        with _quiet("execution.tune_controller", "tune", "analysis.experiment_analysis"):
            tuner.fit()
    return relay.errors


class _Relay(tune.Callback):
    """Tells the listeners what happens to the trials."""

    def __init__(self, jobs: Mapping[str, TrialSpec], listeners: Sequence[Listener]):
        self._jobs, self._listeners = jobs, listeners
        self.errors: dict[str, str] = {}

    def __getstate__(self) -> dict:
        # Tune pickles its callbacks for Tuner.restore, which is not used here; consoles and databases cannot be.
        return {}

    def on_trial_start(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        self._tell("started", trial)

    def on_trial_result(self, iteration: int, trials: list, trial: object, result: dict, **info: object) -> None:
        if "error" in result:
            self.errors[trial.config["trial"]] = result["error"]
        elif "report" in result:
            self._tell("reported", trial, result["report"])

    def on_trial_complete(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        result = finished(self._jobs[trial.config["trial"]])
        if result:
            self._tell("finished", trial, result)
        else:
            self.errors[trial.config["trial"]] = "the trial ended without a result file"
            self._tell("failed", trial, self.errors[trial.config["trial"]])

    def on_trial_error(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        self._tell("failed", trial, self.errors.setdefault(trial.config["trial"], WORKER_DIED))

    def _tell(self, event: str, trial: object, *arguments: object) -> None:
        for listener in self._listeners:
            getattr(listener, event)(self._jobs[trial.config["trial"]], *arguments)


def trial_resources(placement: TrialPlacement, workers: int, alone: bool) -> tuple[dict[str, float], int]:
    """What Tune sets aside for one trial, and how many run at once, on a Ray of this machine `alone` or a cluster.

    Tune does not count the workers that Ray Train starts for a trial. Were CPUs set aside for the trials themselves,
    they would wait for their workers and the workers for them; so such a trial takes a byte of memory (it has to take
    something), and the number of trials keeps within the CPUs and GPUs.
    """
    gpus = placement.gpus
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0 and placement.device != "cpu")
    if workers and gpus not in (0, 1):
        raise InputError(f"--gpus {gpus:g} with --workers {workers}: a Ray Train worker takes one whole GPU, or none.")
    processes = max(1, workers)
    if placement.device.startswith("cuda") and not gpus:
        raise InputError("--device cuda with no GPU for a trial: pass --gpus, of which a fraction shares one.")
    asked = f"--threads {placement.threads}, --gpus {gpus:g}" + (f", --workers {workers}" if workers else "")
    wait_for(asked, processes, {"CPU": placement.threads, "GPU": gpus}, alone)
    cluster = ray.cluster_resources()
    fit = int(cluster["CPU"] // (placement.threads * processes))
    if gpus:
        fit = min(fit, int(cluster["GPU"] / (gpus * processes)))
    at_once = placement.concurrent or fit  # on a cluster, those that find no room wait for nodes to come
    if workers or alone:
        at_once = min(at_once, fit)
    return {"memory": 1} if workers else {"CPU": placement.threads, "GPU": gpus}, at_once


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep Tune from printing each failed trial's traceback: the reason goes to MLflow and the tables."""
    loggers = [logging.getLogger(f"ray.tune.{name}") for name in names]

    def answers_ctrl_c(record: logging.LogRecord) -> bool:
        return record.getMessage().startswith("Stop signal received")

    for log in loggers:
        log.addFilter(answers_ctrl_c)
    try:
        yield
    finally:
        for log in loggers:
            log.removeFilter(answers_ctrl_c)
