"""A search for settings of training: Optuna proposes and stops early, Ray Tune runs, seen classes decide.

Optuna's journal beside the trials' result files is the search's state. Every process writes to it, so a search that was
killed and is started again knows all that was reported: finished trials count, those under way go on from their
training's checkpoint. What is proposed as trial n depends on the seed, n and the trials known by then, on nothing in
memory.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial
from ray.tune.search import Searcher
from rich.console import Console

from pipelines.config import SearchConfig
from pipelines.experiment_file import as_text
from pipelines.tracking.mlflow_runs import Tracker
from pipelines.workspace import Workspace, locked, write_text
from sweeps.display import SweepDisplay
from sweeps.paper_tables import Table
from sweeps.records import SweepRuns
from sweeps.results import FoldResult
from sweeps.runner import run_trials
from sweeps.search.search_state import Search, SearchedTrial
from sweeps.search.space import train_command
from sweeps.trial import TrialSpec, finished


@dataclass(frozen=True)
class SearchResult:
    """How a search ended; trials are named `trial-<number>/fold<F>`."""

    config: SearchConfig
    name: str
    folder: Path  # Optuna's journal, result files and the table
    jobs: dict[str, TrialSpec]
    results: dict[str, FoldResult]  # of trials that ran to their end or were stopped early
    failed: dict[str, str]  # trial -> error, its last line the message
    interrupted: bool  # stopped by Ctrl-C before the last trial
    importance: dict[str, float]

    @property
    def ranked(self) -> list[str]:
        """Trials by seen mIoU, the best first, those stopped early last: they were not trained to their end."""
        ended = self.results
        return sorted(ended, key=lambda name: (ended[name].stopped_early, -ended[name].training["seen_miou"], name))

    @property
    def best_command(self) -> str | None:
        """The command line that trains with the best settings; None where no trial ran to its end."""
        if not self.ranked or self.results[self.ranked[0]].stopped_early:
            return None
        return train_command(self.jobs[self.ranked[0]].train)

    @property
    def tables(self) -> list[Table]:
        notes = [
            "mIoU on val photos of seen classes, the best of a training's validations; unseen classes take no part",
            "#: number of the trial; *: stopped early; of lists the first letters",
        ]
        if self.importance:
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.importance.items())
            notes.append(f"what told the better trials from the others at the first validation: {shares}")
        rows = tuple(self._row(name) for name in self.ranked)
        heads = [name.replace("_", " ") for name in self.config.spaces]
        title = f"Search: {len(rows)} trials on fold {self.config.fold}"
        return [Table("search", title, ("#", "mIoU", *heads), rows, tuple(notes))]

    def _row(self, name: str) -> tuple[str, ...]:
        train, result = self.jobs[name].train, self.results[name]
        return (
            self.jobs[name].variant.name.removeprefix("trial-").lstrip("0") or "0",
            f"{result.training['seen_miou']:.1f}" + "*" * result.stopped_early,
            *(short(getattr(train, setting)) for setting in self.config.spaces),
        )


def short(value: object) -> str:
    """A value in a column of a terminal: two digits, and first letters of a list's words."""
    if isinstance(value, tuple) and all(isinstance(entry, str) for entry in value):
        return "+".join(entry[0] for entry in value)
    return f"{value:.2g}" if isinstance(value, float) else as_text(value)


def run_search(
    config: SearchConfig, console: Console | None = None, train: Callable | None = None, command: str | None = None
) -> SearchResult:
    """Run trials until `config.trials` have ended, log to MLflow, write the table as CSV; progress goes to `console`.

    What an earlier start finished counts. A trial that fails is in `failed`, and the next start draws another instead.
    `train` runs in a worker in place of `pipelines.training.run.train`. Raises InputError as `run_sweep` does.
    """
    search = Search(config)
    with locked(search.folder, wait=False):
        content = {"command": command, "config": search.config.model_dump(mode="json")}
        write_text(search.folder / "search.json", json.dumps(content, indent=1))
        waiting = search.take_up()
        done = len(search.jobs) - len(waiting)
        logged = search.config.model_dump(mode="json", exclude={"workspace", "tracking_uri"})
        runs = SweepRuns(
            Tracker(Workspace(config.workspace), config.tracking_uri), Path(config.study).stem, search, logged
        )
        failed: dict[str, str] = {}
        try:
            if done < config.trials:
                proposals = Proposals(search, waiting, config.trials - done, config.hours)
                with SweepDisplay(console, config.trials, done) as display:
                    listeners = [_Settle(search), runs, display]
                    work = SearchedTrial(search.config, train)
                    failed = run_trials(
                        config,
                        int(config.train.get("workers", 0)),
                        search.folder,
                        work,
                        proposals.jobs,
                        listeners,
                        proposals,
                    )
            jobs = {job.name: job for job in search.jobs}
            results = {name: result for name, job in jobs.items() if (result := finished(job))}
            interrupted = len(results) + len(failed) < config.trials and not config.hours
            outcome = SearchResult(
                search.config, search.name, search.folder, jobs, results, failed, interrupted, search.importance()
            )
            for table in outcome.tables:
                write_text(search.folder / f"{table.name}.csv", table.csv())
            runs.close(results, outcome.tables)
            return outcome
        except BaseException:
            runs.abort()
            raise


class Proposals(Searcher):
    """What Tune asks for the next trial: those left unfinished, then new ones, `count` in all, for so many `hours`."""

    def __init__(self, search: Search, waiting: list[FrozenTrial], count: int, hours: float | None = None):
        super().__init__()
        self._search, self._waiting, self._left = search, list(waiting), count
        self._until = time.monotonic() + 3600 * hours if hours else float("inf")
        self.jobs: dict[str, TrialSpec] = {}  # proposed so far

    def __getstate__(self) -> dict:
        return {}  # Tune pickles it for Tuner.restore, which is not used here

    def suggest(self, trial_id: str) -> dict | str:
        if not self._left or time.monotonic() > self._until:
            return Searcher.FINISHED
        self._left -= 1
        if self._waiting:
            trial = self._waiting.pop(0)
        else:
            trial = self._search.propose()
            self._search.jobs.append(self._search.job(trial))
        job = self._search.job(trial)
        self.jobs[job.name] = job
        return {"trial": job.name, "number": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Nothing: `_Settle` hears of it with the result."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: all of it is in the journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as it is not used."""


class _Settle:
    """Listens to the trials and tells Optuna how they ended."""

    def __init__(self, search: Search):
        self._search = search

    def started(self, job: TrialSpec) -> None: ...

    def reported(self, job: TrialSpec, metrics: dict) -> None: ...

    def finished(self, job: TrialSpec, result: FoldResult) -> None:
        self._search.settle(_number(job), result)

    def failed(self, job: TrialSpec, reason: str) -> None:
        self._search.settle(_number(job), None)


def _number(job: TrialSpec) -> int:
    return int(job.variant.name.removeprefix("trial-"))
