"""Training on several workers: Ray Train starts them, joins them by DDP, and starts them again when one dies.

What dies restarts from the run folder's last checkpoint, however often, as long as there is a new one in between.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from la.device import pick_device
from la.errors import InputError
from pipelines.cluster import ray_session, wait_for
from pipelines.config import TrainConfig
from pipelines.runs.checkpoints import LAST, full_disk_told
from pipelines.runs.identity import run_dir_of
from pipelines.training.loop import Worker, train_loop
from pipelines.training.prepare import prepare
from pipelines.training.stop import Notice, notice
from pipelines.workspace import Workspace

STARTS = 4  # in a row from one checkpoint, after which what kills the workers is taken to lie in the run itself
POLL_SECONDS = 0.5  # between looks for reports and for notice


class Desk:
    """An actor beside the driver: reports go one way, notice to stop the other, and it counts starts in vain."""

    def __init__(self) -> None:
        self.reports: list[dict] = []
        self.stop = False
        self.failure = ""  # of the last worker that could tell
        self.mistake: type[InputError] | None = None  # of the user's to fix, so that another start is of no use
        self.mark: int | None = None
        self.starts = 0

    def begin(self, mark: int | None) -> bool:
        """Whether workers that found the checkpoint `mark` may start."""
        self.starts = self.starts + 1 if mark == self.mark else 1
        self.mark = mark
        if self.starts > STARTS:
            self.failure = self.failure or "the workers were killed, most likely for lack of memory"
            return False
        return self.mistake is None

    def report(self, metrics: dict) -> None:
        self.reports.append(metrics)

    def take_reports(self) -> list[dict]:
        taken, self.reports = self.reports, []
        return taken

    def ask_to_stop(self) -> None:
        self.stop = True

    def asked_to_stop(self) -> bool:
        return self.stop

    def fail(self, failure: str, mistake: type[InputError] | None) -> None:
        if not self.mistake:
            self.failure, self.mistake = failure, mistake

    def verdict(self) -> tuple[str, type[InputError] | None] | None:
        """(failure, its kind where it is the user's to fix) of a run that was given up."""
        return (self.failure, self.mistake) if self.mistake or self.starts > STARTS else None


def fit(config: TrainConfig, on_report: Callable[[dict], None] | None = None) -> int | None:
    """Run `train_loop` on `config.workers` Ray Train workers; `on_report` is called here, in the driver.

    An error of `on_report` stops the workers after the step under way, as notice does, and is raised once they ended.
    Returns the signal on which it stopped, if one came. Raises InputError for what a worker found to be the user's
    mistake, and RuntimeError where the workers die again and again without reaching another checkpoint.
    """
    with ray_session() as alone, notice() as stop_notice:  # in this order: Ray handles SIGTERM in its own way
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()
        gpu = _takes_gpus(config.device, alone)
        each = {"CPU": config.threads or 1} | ({"GPU": 1} if gpu else {})
        wait_for(f"--workers {config.workers}", config.workers, each, alone, stop_notice.came)
        if stop_notice.came():
            return stop_notice.signum
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.model_dump(mode="json"), "desk": desk},
            scaling_config=ScalingConfig(
                num_workers=config.workers, use_gpu=gpu, resources_per_worker={"CPU": config.threads or 1}
            ),
            run_config=RunConfig(
                # a name of its own each time: the loop itself goes on from the run folder's checkpoint
                name=f"{run_dir_of(config).name}-{time.time_ns()}",
                storage_path=str(Workspace(config.workspace).runs / "ray"),
                failure_config=FailureConfig(max_failures=-1),  # the desk decides
            ),
        )
        ended, failures = threading.Event(), []

        def run() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failures.append(error)
            finally:
                ended.set()

        # in a thread of its own: in the main one, Ray answers Ctrl-C by ending the workers without a checkpoint
        threading.Thread(target=run, daemon=True).start()
        refused = _pump(desk, on_report or (lambda _: None), stop_notice, ended)
        if failures or refused:
            raise (failures or refused)[0]
        verdict = ray.get(desk.verdict.remote())
        if verdict and verdict[1]:
            raise verdict[1](verdict[0])
        if verdict:
            raise RuntimeError(f"training started {STARTS} times without reaching another checkpoint: {verdict[0]}")
        return stop_notice.signum


def _takes_gpus(device: str, alone: bool) -> bool:
    """Whether each worker takes a GPU. On a cluster, what its nodes have counts, and not the driver's machine."""
    import ray

    if alone or not device.startswith(("auto", "cuda")):
        return pick_device(device).type == "cuda"
    return device != "auto" or ray.cluster_resources().get("GPU", 0) > 0


def _pump(desk, on_report: Callable[[dict], None], stop_notice: Notice, ended: threading.Event) -> list[Exception]:
    """Hand reports on and notice down until training ended; returns what `on_report` raised."""
    import ray

    last, refused = False, []
    while not last:
        last = ended.wait(POLL_SECONDS)
        if stop_notice.came() or refused:
            desk.ask_to_stop.remote()
        for report in ray.get(desk.take_reports.remote()):
            try:
                if not refused:
                    on_report(report)
            except Exception as error:
                refused.append(error)
    return refused


def _worker(settings: dict) -> None:
    import ray
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    config = TrainConfig(**settings["config"])
    desk = settings["desk"]
    torch.set_num_threads(config.threads or 1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    # flags go between CPUs: through NCCL, each step would wait for the GPU
    flags = dist.new_group(backend="gloo") if world > 1 else None

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        # a batch without masks (or points, or boxes) leaves their encoder without gradients
        kept = {"find_unused_parameters": True, "gradient_as_bucket_view": True}
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs=kept)

    def from_rank0(value: int) -> int:
        if flags is None:
            return value
        shared = torch.tensor([int(value)])
        dist.broadcast(shared, src=0, group=flags)
        return int(shared.item())

    def ask(stop_notice: Callable[[], bool]) -> Callable[[], bool]:
        if flags is None:
            return stop_notice
        shared = torch.tensor([int(stop_notice())])
        sent = dist.broadcast(shared, src=0, group=flags, async_op=True)

        def answer() -> bool:
            sent.wait()
            return bool(shared.item())

        return answer

    if not from_rank0(rank == 0 and ray.get(desk.begin.remote(_mark(run_dir_of(config))))):
        return
    stop, ended = threading.Event(), threading.Event()

    def listen() -> None:
        while not ended.wait(POLL_SECONDS) and not stop.is_set():
            if ray.get(desk.asked_to_stop.remote()):
                stop.set()

    if rank == 0:
        threading.Thread(target=listen, daemon=True).start()
    try:
        with full_disk_told(run_dir_of(config)):
            train_loop(
                prepare(config.model_copy(update={"device": str(device)})),
                Worker(rank, world, wrap, from_rank0, stop.is_set, ask),
                desk.report.remote,
            )
    except Exception as error:
        mistake = type(error) if isinstance(error, InputError) else None
        ray.get(desk.fail.remote(str(error) if mistake else f"{type(error).__name__}: {error}", mistake))
        if not mistake or world > 1:  # others wait for this rank: by the error Ray ends them too
            raise
    finally:
        ended.set()
        ray.get(desk.asked_to_stop.remote())  # answered after all reports


def _mark(run_dir: Path) -> int | None:
    """What changes with every checkpoint."""
    try:
        return (run_dir / LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return None
