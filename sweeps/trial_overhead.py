"""What a trial of a sweep costs beyond its own work."""

import tempfile
import time
from pathlib import Path

from pipelines.bench.ratios import BenchResult, workspace_beside
from pipelines.config import SweepConfig
from pipelines.workspace import write_text
from sweeps.results import FoldResult
from sweeps.trial import Report, TrialSpec

STEPS, STEP_SECONDS = 10, 0.05  # of a trial that sleeps in place of training
BAR_SECONDS = 3.0


def bench_sweep(store: Path, trials: int = 8) -> BenchResult:
    """A sweep whose trials sleep and report, one after the other, through Ray Tune and MLflow as any sweep.

    The seconds of each trial after the first, end to end, beyond those slept. The first pays for the start of Ray and
    of the worker process. Nothing is left in the workspace of `store`.
    """
    from sweeps.runner import run_sweep
    from sweeps.study import find_study

    names = [variant.name for variant in find_study("ablations").variants if variant.trained]
    with tempfile.TemporaryDirectory() as folder:
        config = SweepConfig(
            workspace=workspace_beside(store, Path(folder)),
            variants=tuple(names[: -(-trials // 4)]),
            folds=(0, 1, 2, 3),
            train={"steps": STEPS},
            concurrent=1,
        )
        started = time.time()
        results = sorted(run_sweep(config, trainable=sleep).results.values(), key=lambda r: r.training["ended"])
        whole = time.time() - started
    ends = [result.training["ended"] for result in results]
    after_first = [result.training["slept"] for result in results[1:]]
    overhead = (ends[-1] - ends[0] - sum(after_first)) / len(after_first)
    own = sum(after_first) / len(after_first)
    return BenchResult(
        "seconds of a Tune trial beyond its own work",
        overhead,
        BAR_SECONDS,
        "at most",
        {"own_s": own, "first_s": ends[0] - started, "trials": float(len(results)), "sweep_s": whole},
    )


def sleep(job: TrialSpec, report: Report) -> FoldResult:
    """A trial that sleeps where another trains; its reports, and waiting for them, are not its own work."""
    slept = 0.0
    for step in range(1, STEPS + 1):
        before = time.perf_counter()
        time.sleep(STEP_SECONDS)
        slept += time.perf_counter() - before
        report({"phase": "train", "step": step, "loss": 1.0, "lr": 1.0, "episodes_per_s": 1.0})
    training = {"slept": slept, "ended": time.time()}
    result = FoldResult(variant=job.variant.name, fold=job.fold, finished=True, step=STEPS, training=training)
    write_text(job.file, result.model_dump_json(indent=1))
    return result
