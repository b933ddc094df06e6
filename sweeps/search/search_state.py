"""The state of a search, which driver and workers share: what Optuna proposed and was told, and how a trial runs.

Imported by the search's workers, so nothing here loads MLflow.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from la.errors import InputError
from pipelines.config import SearchConfig, TrainConfig, closest
from pipelines.runs.code import code_now
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, digest, write_text
from sweeps.plan import NOT_IN_DIGEST
from sweeps.results import FoldResult
from sweeps.search.space import check_spaces, draw_settings, first_rung, own_points, train_config
from sweeps.study import SET_BY_SWEEP, Variant
from sweeps.trial import Report, TrialSpec, finished, run_trial

SET_BY_SEARCH = SET_BY_SWEEP | {"steps", "val_every", "val_episodes"}
KEPT = 3  # one of so many trials goes on at a rung
RANDOM_TRIALS = 10  # before the sampler takes account of results
ENOUGH_TO_WEIGH = 15  # trials, below which the importance of a setting is noise
BETTER = 0.3  # share of the trials that are the better ones when settings are weighed

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StoppedEarly(Exception):
    """Other trials did better up to this step."""

    def __init__(self, step: int):
        super().__init__(f"stopped early at step {step}")
        self.step = step


@dataclass
class Search:
    """The state of a search: its folder, its jobs so far, and what Optuna knows of them. Raises InputError."""

    config: SearchConfig
    variants: tuple[Variant, ...] = ()  # none are given beforehand
    jobs: list[TrialSpec] = field(default_factory=list)

    def __post_init__(self):
        workspace = Workspace(self.config.workspace)
        self.store = FeatureStore(workspace.find_store(self.config.store))
        self.config = self.config.model_copy(update={"workspace": workspace.root, "store": self.store.key})
        self.folder = workspace.runs / "searches" / self.name
        for name in (*self.config.space, *self.config.train):
            if name not in TrainConfig.model_fields or name in SET_BY_SEARCH:
                raise InputError(
                    f"{name} is not a setting to search or to give. Nearest: {closest(name, TrainConfig)}."
                )
        if not self.config.spaces:
            raise InputError(f"study {self.config.study} has no [space] of settings to search.")
        check_spaces(self.config)
        self._own = own_points(self.config.spaces, self.config.train)
        for point in self._own:
            train_config(self.config, point)

    @cached_property
    def name(self) -> str:
        """Digests all that changes a result, and the code; with more trials or hours, the search goes on."""
        settings = self.config.model_dump(mode="json", exclude=NOT_IN_DIGEST | {"study", "trials", "hours"})
        return f"{Path(self.config.study).stem}-{digest([settings, code_now().digest], 8)}"

    @cached_property
    def study(self) -> optuna.Study:
        """Optuna's study, read from the journal file, which is created if it is missing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.folder / "journal.log"))),
            study_name=self.name,
            direction="maximize",
            # asynchronous successive halving; a trial that reached its last step is not asked
            pruner=optuna.pruners.SuccessiveHalvingPruner(first_rung(self.config), reduction_factor=KEPT)
            if self.config.early_stopping
            else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def propose(self) -> FrozenTrial:
        """A new trial. The first are the presets as they are, so that the search does not end below them."""
        number = len(self.study.trials)
        seed = int(digest([self.config.seed, number], 8), 16)
        if self.config.sampler == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed)
        else:
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=RANDOM_TRIALS, constant_liar=True, seed=seed
            )
        if number < len(self._own):
            self.study.enqueue_trial(self._own[number])
        draw_settings(self.study.ask(), self.config.spaces)
        return self.study.trials[-1]

    def job(self, trial: FrozenTrial) -> TrialSpec:
        """The training of a trial and where its result goes."""
        name = f"trial-{trial.number:04d}"
        return TrialSpec(
            Variant(name=name, title=name), train_config(self.config, trial.params), (), self.folder / f"{name}.json"
        )

    def settle(self, number: int, result: FoldResult | None) -> None:
        """Tell Optuna how a trial ended, once; None for one that failed."""
        trial = self.study.trials[number]
        if trial.state.is_finished():
            return
        if result is None:
            self.study.tell(number, state=TrialState.FAIL)
        elif result.stopped_early:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, result.training["seen_miou"])

    def take_up(self) -> list[FrozenTrial]:
        """Find the jobs of an earlier start; returns the trials that it left unfinished."""
        for trial in self.study.trials:
            if trial.state == TrialState.FAIL:
                continue  # others are drawn in their place
            self.jobs.append(self.job(trial))
            if not trial.state.is_finished() and (result := finished(self.jobs[-1])):
                self.settle(trial.number, result)
        return [trial for trial in self.study.trials if trial.state == TrialState.RUNNING]

    def importance(self) -> dict[str, float]:
        """Share of each setting in what tells the better trials from the others; empty where trials are too few.

        By the first validation, which is all that every trial has: those that ran to their end are good ones alone.
        """
        step = first_rung(self.config)
        judged = [trial for trial in self.study.trials if step in trial.intermediate_values]
        if len(judged) < ENOUGH_TO_WEIGH:
            return {}
        first = optuna.create_study(direction="maximize")
        for trial in judged:
            value = trial.intermediate_values[step]
            first.add_trial(
                optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)
            )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BETTER)
        return optuna.importance.get_param_importances(first, evaluator=evaluator)


@dataclass(frozen=True)
class SearchedTrial:
    """What a worker does for a trial."""

    config: SearchConfig
    train: Callable | None

    def __call__(self, settings: dict, report: Report) -> FoldResult:
        search = Search(self.config)
        trial = search.study.trials[settings["number"]]
        return run_searched(search, trial, report, self.train)


def run_searched(search: Search, trial: FrozenTrial, report: Report, train: Callable | None = None) -> FoldResult:
    """Train, asking Optuna after each validation whether to go on; write the job's result file.

    The training ends itself: Tune would kill the trial's process and leave its Ray Train workers' places taken.
    """
    job, started = search.job(trial), time.monotonic()
    live = optuna.trial.Trial(search.study, trial._trial_id)
    seen = dict(trial.intermediate_values)  # step -> mIoU, of an earlier start too

    def judged(metrics: dict) -> None:
        report(metrics)
        step, miou = metrics.get("step"), metrics.get("seen_miou")
        if miou is None or step >= job.train.steps:
            return
        if step not in seen:
            seen[step] = miou
            live.report(miou, step)
        if live.should_prune():
            raise StoppedEarly(step)

    try:
        result = run_trial(job, judged, train, code="again")  # runs of other code are of another search
    except StoppedEarly as stopped:
        result = FoldResult(
            variant=job.variant.name,
            fold=job.fold,
            finished=True,
            stopped_early=True,
            step=stopped.step,
            run_dir=run_dir_of(job.train),
            training={"seen_miou": max(seen.values()), "train_seconds": time.monotonic() - started},
        )
    result = result.model_copy(update={"seconds": result.training["train_seconds"]})
    write_text(job.file, result.model_dump_json(indent=1))
    return result
