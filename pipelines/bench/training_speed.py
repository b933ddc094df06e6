"""Speed of training: Ray Train with one worker against the same loop in this process, and two workers against one."""

import shutil
import statistics
import tempfile
from pathlib import Path

from la.errors import InputError
from pipelines.bench.ratios import BenchResult, median_ratio, workspace_beside
from pipelines.cluster import ray_session
from pipelines.config import TrainConfig
from pipelines.training.loop import REPORT_EVERY
from pipelines.training.run import train
from pipelines.workspace import Workspace

WARM_UP = 2 * REPORT_EVERY  # steps that do not count: processes, caches and DDP's buckets settle


def bench_training(
    workspace: Path,
    preset: str = "paper",
    batches: tuple[tuple[int, int, int], ...] = TrainConfig.model_fields["batches"].default,
    steps: int = 30,
    repeats: int = 3,
    store: str | None = None,
    device: str = "auto",
) -> list[BenchResult]:
    """Steps a second once training runs, one thread each: start-up, validation and checkpoints are left out.

    The three are measured in turn, forwards and backwards; a ratio is the median over the turns. Raises InputError
    where Ray has fewer than two CPUs.
    """
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}  # by workers; 0: no Ray
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder, ray_session():
        import ray

        if ray.cluster_resources().get("CPU", 0) < 2:
            raise InputError("bench training runs two workers, but Ray has fewer than 2 CPUs here.")
        config = TrainConfig(
            # of its own: `evaluate` would take its runs for trainings
            workspace=workspace_beside(Workspace(workspace).find_store(store), Path(folder)),
            preset=preset,
            batches=batches,
            steps=WARM_UP + steps,
            train_batches=2 * (WARM_UP + steps),
            val_episodes=1,
            val_every=WARM_UP + steps,
            checkpoint_every=WARM_UP + steps,
            device=device,
            threads=1,
        )
        for turn in range(repeats):
            for workers in rates if turn % 2 == 0 else reversed(rates):
                rates[workers].append(_rate(config.model_copy(update={"workers": workers})))
    bare, one, two = rates.values()
    details = {"bare steps/s": statistics.median(bare), "one worker": statistics.median(one)}
    details |= {"two workers": statistics.median(two), "steps": steps, "repeats": repeats}
    alone = "training: Ray Train with one worker, steps a second against the same loop without Ray"
    together = "training: two Ray Train workers, episodes a second against one"
    return [
        BenchResult(alone, median_ratio(one, bare), 0.95, "at least", details),
        BenchResult(together, 2 * median_ratio(two, one), 1.6, "at least", details),
    ]


def _rate(config: TrainConfig) -> float:
    """Steps a second after the warm-up."""
    at: dict[int, float] = {}
    run = train(config, lambda report: at.update({report["step"]: report["seconds"]}))
    shutil.rmtree(run.run_dir)  # the next turn starts anew
    return (config.steps - WARM_UP) / (at[config.steps] - at[WARM_UP])
