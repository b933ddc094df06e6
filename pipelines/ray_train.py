"""Training on several workers: Ray Train starts them, joins them by DDP, and starts them again when one dies."""

import threading
import time

import torch

from la.device import pick_device
from pipelines.cluster import ray_session
from pipelines.config import TrainConfig
from pipelines.workspace import Workspace

RESTARTS = 3  # of all workers after one has died; each goes on from the last checkpoint


def fit(config: TrainConfig, on_report=None) -> None:
    """Run `train_loop` on `config.workers` Ray Train workers; `on_report` is called here, in the driver."""
    with ray_session():
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.util.queue import Queue

        gpu = pick_device(config.device).type == "cuda"
        reports = Queue(actor_options={"num_cpus": 0})
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": config.model_dump(mode="json"), "reports": reports},
            scaling_config=ScalingConfig(
                num_workers=config.workers, use_gpu=gpu, resources_per_worker={"CPU": config.threads or 1}
            ),
            run_config=RunConfig(
                # a name of its own each time: the loop itself goes on from the run folder's checkpoint
                name=f"{config.run_name}-{time.time_ns()}",
                storage_path=str(Workspace(config.workspace).runs / "ray"),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        stop = threading.Event()
        pump = threading.Thread(target=_pump, args=(reports, on_report or (lambda _: None), stop))
        pump.start()
        try:
            trainer.fit()
        finally:
            stop.set()
            pump.join()
            reports.shutdown()


def _pump(reports, on_report, stop: threading.Event) -> None:
    while not (stop.is_set() and reports.empty()):
        for report in reports.get_nowait_batch(reports.qsize()):
            on_report(report)
        stop.wait(0.5)


def _worker(settings: dict) -> None:
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    from pipelines.training import Worker, train_loop

    config = TrainConfig(**settings["config"])
    torch.set_num_threads(config.threads or 1)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        # a batch without masks (or points, or boxes) leaves their encoder without gradients
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"find_unused_parameters": True})

    def any_rank(flag: bool) -> bool:
        shared = torch.tensor([int(flag)], device=device)
        if dist.is_initialized():
            dist.broadcast(shared, src=0)
        return bool(shared.item())

    worker = Worker(context.get_world_rank(), context.get_world_size(), wrap, any_rank)
    train_loop(config.model_copy(update={"device": str(device)}), worker, settings["reports"].put)
