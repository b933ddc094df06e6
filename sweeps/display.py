"""What a sweep shows while it runs: a live table on a terminal, a line now and then in a log file."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sweeps.results import FoldResult, last_line, task_name
from sweeps.trial import TrialSpec

LINE_SECONDS = 60.0  # between two lines about one trial where there is no terminal


class SweepDisplay:
    """Listens to a sweep; use as a context manager around it. Shows nothing without a console."""

    def __init__(self, console: Console | None, total: int, done: int):
        self._console = console or Console(quiet=True)
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._phase: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self._spoke: dict[str, float] = {}
        self._sweep = self._progress.add_task("sweep", total=total, completed=done, state=f"{done} of {total} trials")
        self._total, self._done = total, done
        if done:
            self._say(f"{done} of {total} trials are finished already")

    def __enter__(self) -> "SweepDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, job: TrialSpec) -> None:
        self._tasks[job.name] = self._progress.add_task(job.name, total=None, state="starting")
        self._say(f"{job.name}: started", only_log=True)

    def reported(self, job: TrialSpec, metrics: dict) -> None:
        if metrics["phase"] == "train":
            done, total, state = metrics["step"], job.train.steps, f"step {metrics['step']} of {job.train.steps}"
            state += f"  loss {metrics['loss']:.3f}" if "loss" in metrics else ""
            if metrics.get("seen_miou") is not None:
                self._seen[job.name] = f"  seen mIoU {metrics['seen_miou']:.1f}"
            state += self._seen.get(job.name, "")
        else:
            done, total = metrics["done"], metrics["of"]
            state = f"evaluating, episode {done} of {total}"
        self._show(job, metrics["phase"], done, total, state)

    def finished(self, job: TrialSpec, result: FoldResult) -> None:
        first = result.scores[0] if result.scores else None
        task = task_name(first.ways, first.shots, first.prompt) if first else ""
        outcome = f"mIoU {first.miou:.1f} ({task})" if first else "too few images for every task"
        if not job.evaluations:
            outcome = f"seen mIoU {result.training['seen_miou']:.1f}"
            outcome += f", stopped early at step {result.step}" if result.stopped_early else ""
        self._end(job, f"{outcome}, {result.seconds / 60:.1f} min")

    def failed(self, job: TrialSpec, reason: str) -> None:
        self._end(job, f"[red]failed[/]: {escape(last_line(reason))}")

    def _show(self, job: TrialSpec, phase: str, done: int, total: int, state: str) -> None:
        task = self._tasks[job.name]
        # A phase has its own speed, and a training taken up again starts in its middle: neither tells the time left.
        if self._phase.get(job.name) != phase:
            self._phase[job.name] = phase
            self._progress.reset(task, total=total, completed=done, state=state)
        self._progress.update(task, completed=done, total=total, state=state)
        if not self._live and time.monotonic() - self._spoke.get(job.name, 0.0) > LINE_SECONDS:
            self._spoke[job.name] = time.monotonic()
            self._say(f"{job.name}: {state}")

    def _end(self, job: TrialSpec, state: str) -> None:
        self._done += 1
        self._progress.remove_task(self._tasks.pop(job.name))
        self._progress.update(self._sweep, completed=self._done, state=f"{self._done} of {self._total} trials")
        self._say(f"{job.name}: {state}")

    def _say(self, line: str, only_log: bool = False) -> None:
        if not (only_log and self._live):
            self._progress.console.print(line, highlight=False)
