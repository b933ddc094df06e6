"""The failure drill: everything that can die is killed once, and what comes out must equal the undisturbed run.

    python -m tools.drill.run_drill [CASE ...]

All on real processes over drawn scenes. Exit code 1 where a case loses more than it may or ends with other bits.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.config import TrainConfig
from pipelines.runs.checkpoints import LAST
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace
from tools.drill.ground import (
    EVERY,
    SLOW_PIXELS,
    STEPS,
    WEIGHTS,
    DrillError,
    Ground,
    Job,
    forbid_large_files,
    kill,
    processes,
    reported_step,
    reports_of,
    same,
    saved_step,
    small_disk,
    starts_of,
    weights_of,
)
from tools.drill.s3_server import s3_server

FAILING = 12  # requests that an S3 server answers with 500


@dataclass(frozen=True)
class Finding:
    """What a case lost, whether that is no more than it may lose, and whether the result is that of no failure."""

    lost: str
    bearable: bool
    equal: bool


class Skipped(Exception):
    """A case that cannot be held here, and why."""


def featurize_actor(ground: Ground, title: str = "Map(Encode)") -> Finding:
    name = f"featurize-{title}"
    workspace = ground.root / name
    base = ground.slow_base
    job = ground.featurize(workspace, name, workers=2, pixels=SLOW_PIXELS)
    job.until(lambda: len(_shards(workspace)) > 1, "second shard")
    kill(job.until(lambda: processes(title), title)[0])
    finished = _shards(workspace)
    job.wait(0)
    return _featurize_finding(ground, workspace, finished, base)


def featurize_writer(ground: Ground) -> Finding:
    return featurize_actor(ground, "Writer")


def featurize_driver(ground: Ground) -> Finding:
    workspace = ground.root / "featurize-driver"
    job = ground.featurize(workspace, "featurize-driver")
    job.until(lambda: len(_shards(workspace)) > 1, "second shard")
    kill(job.process.pid)
    job.wait(-signal.SIGKILL)
    finished = _shards(workspace)
    ground.featurize(workspace, "featurize-driver-again").wait(0)
    return _featurize_finding(ground, workspace, finished)


def _featurize_finding(ground: Ground, workspace: Path, finished: dict[str, int], base: Path | None = None) -> Finding:
    after = _shards(workspace)
    redone = sum(after[name] != stamp for name, stamp in finished.items())
    lost = f"{redone} of {len(finished)} finished shards"
    return Finding(lost, not redone, ground.same_features(workspace, base))


def _shards(workspace: Path) -> dict[str, int]:
    """Finished shards with the time of each."""
    return {str(path): path.stat().st_mtime_ns for path in workspace.glob("features/*/*/part-*.parquet")}


def train_worker(ground: Ground) -> Finding:
    config = _on_ray(ground, "train-worker")
    job = ground.train(config, "train-worker")
    step, saved = _past_a_checkpoint(job, config)
    for pid in processes("RayTrainWorker"):
        kill(pid)
    job.wait(0)
    return _training_finding(ground, config, step, saved)


def train_driver(ground: Ground) -> Finding:
    config = _on_ray(ground, "train-driver")
    job = ground.train(config, "train-driver")
    step, saved = _past_a_checkpoint(job, config)
    kill(job.process.pid)
    job.wait(-signal.SIGKILL)
    ground.train(config, "train-driver-again").wait(0)
    return _training_finding(ground, config, step, saved)


def node(ground: Ground) -> Finding:
    config = _on_ray(ground, "node")
    spare = ground.cluster.add_node(num_cpus=1)
    ground.cluster.remove_node(ground.worker_node, allow_graceful=False)  # so that training starts on the spare one
    ground.worker_node = ground.cluster.add_node(num_cpus=0)
    job = ground.train(config, "node")
    step, saved = _past_a_checkpoint(job, config)
    ground.cluster.remove_node(spare, allow_graceful=False)
    ground.cluster.add_node(num_cpus=2)
    job.wait(0)
    return _training_finding(ground, config, step, saved)


def sigterm(ground: Ground) -> Finding:
    """By the command line's own verb, in process."""
    workspace = ground.copy("sigterm")
    config = ground.config.model_copy(update={"workspace": workspace, "checkpoint_every": STEPS})
    return _notice(ground, config, "sigterm", signal.SIGTERM)


def sigterm_ray(ground: Ground) -> Finding:
    config = _on_ray(ground, "sigterm-ray").model_copy(update={"checkpoint_every": STEPS})
    return _notice(ground, config, "sigterm-ray", signal.SIGUSR1)


def _notice(ground: Ground, config: TrainConfig, name: str, signum: int) -> Finding:
    job = ground.train(config, name)
    step = job.until(lambda: reported_step(config), "report")
    sent = time.monotonic()
    job.process.send_signal(signum)
    told = job.wait(128 + signum)
    seconds = time.monotonic() - sent
    saved = saved_step(run_dir_of(config))
    ground.train(config, f"{name}-again").wait(0)
    resumed = starts_of(run_dir_of(config))[-1]
    lost = max(0, step - resumed)
    good = lost == 0 and resumed == saved and seconds < 30 and "the same command goes on" in told
    return Finding(f"{lost} steps, saved within {seconds:.1f} s", good, ground.same_weights(config))


def tune_trial(ground: Ground) -> Finding:
    workspace = ground.copy("tune-trial")
    options = ("--variants", "complete", "--steps", 130, "--dim", 32, "--batch-scale", 0.25, "--ways", 1)
    options += ("--seeds", 1, "--episodes", 4)
    job = ground.verb("sweep", "ablations", *options, workspace=workspace, name="tune-trial")
    run_dir = job.until(lambda: next(iter(workspace.glob(f"runs/*/{LAST}")), None), "checkpoint of the trial").parent
    for pid in processes("ImplicitFunc", "trial"):
        kill(pid)
    saved = saved_step(run_dir)
    if "killed" not in job.wait(1):
        raise DrillError(f"{job.log} does not say that the trial's process was killed")
    ground.verb("sweep", "ablations", *options, workspace=workspace, name="tune-trial-again").wait(0)
    config = TrainConfig.model_validate_json((run_dir / "config.json").read_text())
    alone = config.model_copy(update={"workspace": ground.copy("tune-trial-alone")})
    ground.train(alone, "tune-trial-alone").wait(0)
    resumed = starts_of(run_dir)[-1]
    equal = same(weights_of(run_dir), weights_of(run_dir_of(alone)))
    return Finding(f"0 trials, went on from step {resumed}", resumed >= saved > 0, equal)


def disk_full(ground: Ground) -> Finding:
    config = _in_process(ground, "disk-full")
    run_dir = run_dir_of(config)
    with small_disk(Workspace(config.workspace).runs, megabytes=16) as mounted:
        job = ground.train(config, "disk-full")
        job.until(lambda: saved_step(run_dir) >= EVERY, "checkpoint")
        filler = Workspace(config.workspace).runs / "filler"
        if mounted:
            _fill(filler)
        else:
            forbid_large_files(job.process.pid, 1000)
        told = job.wait(2)
        if "nothing more can be written there" not in told:
            raise DrillError(f"{job.log} does not say that the disk is full")
        filler.unlink(missing_ok=True)
        step, saved = reported_step(config), saved_step(run_dir)
        ground.train(config, "disk-full-again").wait(0)
        return _training_finding(ground, config, step, saved)


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def truncated_checkpoint(ground: Ground) -> Finding:
    """A kill as the power fails: the last checkpoint is cut short as well."""
    config = _in_process(ground, "truncated-checkpoint")
    run_dir = run_dir_of(config)
    job = ground.train(config, "truncated-checkpoint")
    job.until(lambda: saved_step(run_dir) >= 2 * EVERY, "second checkpoint")
    kill(job.process.pid)
    job.wait(-signal.SIGKILL)
    step, saved = reported_step(config), saved_step(run_dir)
    os.truncate(run_dir / LAST, (run_dir / LAST).stat().st_size // 2)
    told = ground.train(config, "truncated-checkpoint-again").wait(0)
    if f"{LAST} is cut short" not in told:
        raise DrillError("nothing was said of the damaged checkpoint")
    return _training_finding(ground, config, step, saved - EVERY, may_lose=2 * EVERY)


def truncated_shard(ground: Ground) -> Finding:
    workspace = ground.copy("truncated-shard")
    store = Workspace(workspace).find_store()
    shard = sorted(store.glob("train/part-*.parquet"))[2]
    before = _shards(workspace)
    os.truncate(shard, shard.stat().st_size // 2)
    try:
        list(FeatureStore(store).verify())
        raise DrillError(f"{shard} is cut short, and nothing noticed")
    except ValueError as error:
        if str(shard) not in str(error):
            raise DrillError(f"the error does not name {shard}: {error}") from error
    repair = ("--repair", "--weights", WEIGHTS, "--sample", 4, "--threads", 1)
    ground.verb("verify", *repair, workspace=workspace, name="truncated-shard").wait(0)
    after = _shards(workspace)
    others = sum(after[name] != before[name] for name in before if name != str(shard))
    return Finding(f"1 shard, {others} others made again", others == 0, ground.same_features(workspace))


def s3_errors(ground: Ground) -> Finding:
    """The server fails while shards are copied there, and again while another machine fetches the store."""
    try:
        server = ground.enter(s3_server())
    except ImportError as error:
        raise Skipped(f"{error.name} is not installed: pip install -e '.[dev]'") from error
    workspace, elsewhere, uri = ground.root / "s3", ground.root / "s3-elsewhere", server.folder("drill")
    job = ground.featurize(workspace, "s3", features=uri)
    job.until(lambda: len(_shards(workspace)) > 1, "second shard")
    server.failing = FAILING
    job.wait(0)
    server.failing = FAILING
    ground.verb("pull", uri, workspace=elsewhere, name="s3-pull").wait(0)
    finished = len(_shards(workspace))
    lost = f"0 of {finished} shards, {server.failed} answers of 500"
    equal = ground.same_features(workspace) and ground.same_features(elsewhere)
    return Finding(lost, server.failed == 2 * FAILING and len(_shards(elsewhere)) == finished, equal)


def _in_process(ground: Ground, name: str) -> TrainConfig:
    return ground.config.model_copy(update={"workspace": ground.copy(name)})


def _on_ray(ground: Ground, name: str) -> TrainConfig:
    """One Ray Train worker, whose bits must be those of training in one process."""
    return ground.config.model_copy(update={"workspace": ground.copy(name), "workers": 1})


def _past_a_checkpoint(job: Job, config: TrainConfig) -> tuple[int, int]:
    """(last step told, step of the last checkpoint), once training is some steps past one."""
    job.until(lambda: reported_step(config) > EVERY and saved_step(run_dir_of(config)), "checkpoint")
    return reported_step(config), saved_step(run_dir_of(config))


def _training_finding(ground: Ground, config: TrainConfig, step: int, saved: int, may_lose: int = EVERY) -> Finding:
    """`step` was told before the failure, `saved` was in the checkpoint that has to be gone on from."""
    resumed = starts_of(run_dir_of(config))[-1]
    lost = max(0, step - resumed)
    steps = sorted(map(int, reports_of(config).read_text().split()))
    good = resumed >= saved > 0 and lost <= may_lose and steps[-1] == STEPS
    return Finding(f"{lost} steps of {step}", good, ground.same_weights(config))


# What was done to whom; those of Ray come together, so that they share a cluster.
CASES: dict[str, tuple[str, Callable[[Ground], Finding]]] = {
    "featurize-driver": ("SIGKILL: featurize", featurize_driver),
    "sigterm": ("SIGTERM: training", sigterm),
    "disk-full": ("disk full: training", disk_full),
    "truncated-checkpoint": ("SIGKILL, last.pt cut short", truncated_checkpoint),
    "truncated-shard": ("shard cut short", truncated_shard),
    "s3-errors": ("S3 server answers 500", s3_errors),
    "featurize-actor": ("SIGKILL: featurize actor", featurize_actor),
    "featurize-writer": ("SIGKILL: featurize writer", featurize_writer),
    "train-worker": ("SIGKILL: Ray Train worker", train_worker),
    "train-driver": ("SIGKILL: Ray Train driver", train_driver),
    "sigterm-ray": ("SIGUSR1: Ray Train driver", sigterm_ray),
    "tune-trial": ("SIGKILL: Tune trial", tune_trial),
    "node": ("node removed: Ray Train", node),
}
ON_RAY = ("featurize-actor", "featurize-writer", "train-worker", "train-driver", "sigterm-ray", "tune-trial", "node")


def drill(names: list[str], console: Console) -> bool:
    """Hold the cases; True where each loses no more than it may. Those on Ray go beside the others: all wait a lot."""
    root = Path(tempfile.mkdtemp(prefix="drill-"))
    with console.status("scenes, features, an undisturbed training"):
        Ground(root).prepare()
    with ThreadPoolExecutor(1) as beside:
        others = beside.submit(_hold, [name for name in names if name not in ON_RAY], root, console)
        on_ray = _hold([name for name in names if name in ON_RAY], root, console)  # Ray starts in the main thread
        held = others.result() + on_ray
    table = Table("what failed", "what was lost", "result", "seconds", "", title="Failure drill")
    for row in held:
        table.add_row(*row)
    console.print(table)
    passed = all(row[-1] != "FAILED" for row in held)
    if passed:
        shutil.rmtree(root)
    else:
        console.print(f"what was printed and written: {root}", highlight=False, soft_wrap=True)
    return passed


def _hold(names: list[str], root: Path, console: Console) -> list[tuple[str, ...]]:
    """A row of the table for each case, one after the other."""
    ground, rows = Ground(root), []
    try:
        for name in names:
            title, case = CASES[name]
            started = time.monotonic()
            try:
                if name in ON_RAY:
                    ground.need_cluster()
                finding = case(ground)
                good = finding.bearable and finding.equal
                row = finding.lost, "equal" if finding.equal else "DIFFERS", "passed" if good else "FAILED"
            except Skipped as why:
                row = str(why), "", "skipped"
            except Exception as error:  # the other cases are worth holding
                row = f"{type(error).__name__}: {error}", "", "FAILED"
            finally:
                ground.end()
            seconds = f"{time.monotonic() - started:.0f}"
            rows.append((title, row[0], row[1], seconds, row[2]))
            console.print(f"{title}: {row[2]}, {row[0]} ({seconds} s)", highlight=False, markup=False)
    finally:
        ground.leave_cluster()
    return rows


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(CASES)
    if unknown := set(chosen) - CASES.keys():
        sys.exit(f"unknown: {', '.join(unknown)}. Choose some of {', '.join(CASES)}.")
    sys.exit(0 if drill(chosen, Console()) else 1)
