"""Connecting to Ray: a cluster where there is one, else this machine for as long as the job runs."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from la.errors import InputError

CODE = Path(__file__).parents[1]
# What nobody asks for of a Ray that is started here and stopped again: each of its idle processes takes a hundredth of
# a core, which workers feel where they have all cores. The preemption of nodes is of clouds.
QUIET = {
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
WAIT_TOLD_SECONDS = 300.0  # between two words on what is waited for


@contextmanager
def ray_session() -> Iterator[bool]:
    """Use the Ray that runs in this process, or start one (or join that of RAY_ADDRESS) and leave it at the end.

    Gives whether one was started: then it is of this machine alone, and no node will ever be added.
    RAY_ADDRESS, which --address sets, is local, auto, host:port or ray://host:port. Workers find the project's code by
    PYTHONPATH, because their working directory is a temporary folder. Raises InputError where no cluster answers.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # the end of a training waits for one
    # of 60 by default: on a busy machine, or from a shared disk, importing torch takes longer, each time anew
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    import ray

    if ray.is_initialized():
        yield False
        return
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    address = os.environ.get("RAY_ADDRESS") or "local"
    # of a Ray started here; what a cluster has was said when it was started
    own = {"include_dashboard": False} if address == "local" else {}
    quiet = {name: value for name, value in QUIET.items() if own and name not in os.environ}
    os.environ.update(quiet)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            **own,
        )
    except (ConnectionError, TimeoutError) as error:
        raise InputError(
            f"--address {address} (or RAY_ADDRESS): no Ray cluster answers there ({error}). Start one with `ray start "
            "--head`, see deploy/, or leave it out to work on this machine alone."
        ) from error
    try:
        yield bool(own)
    finally:
        ray.shutdown()
        for name in quiet:
            del os.environ[name]


def wait_for(
    flag: str, count: int, each: dict[str, float], alone: bool, stop: Callable[[], bool] = lambda: False
) -> None:
    """Wait until Ray has `each` for `count` processes, or `stop()`; `flag` is what asked for them.

    Nodes of a cluster may be on their way, or be taken away and replaced: its autoscaler is asked for them, and the
    user told what is waited for. Where Ray is of this machine `alone`, raises InputError instead.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    def lacking() -> str:
        there = ray.cluster_resources()
        asked = {name: count * amount for name, amount in each.items()}
        short = {name: amount for name, amount in asked.items() if amount > there.get(name, 0)}
        return ", ".join(f"Ray has {there.get(name, 0):g} {name}s of {amount:g}" for name, amount in short.items())

    if not (short := lacking()):
        return
    if alone:
        raise InputError(f"{flag}: {short}. Ask for less, or pass --address of a cluster that has as many.")
    request_resources(bundles=[{name: amount for name, amount in each.items() if amount}] * count)
    told = -math.inf
    try:
        while short and not stop():
            if time.monotonic() - told > WAIT_TOLD_SECONDS:
                told = time.monotonic()
                print(f"{flag}: {short}. Waiting for nodes; if none are to come, ask for less.", file=sys.stderr)
            time.sleep(1)
            short = lacking()
    finally:
        request_resources(bundles=[])  # what runs on them keeps them from here on


def node_resources() -> list[dict[str, float]]:
    """What each living node of the cluster has: "CPU", "GPU" and others by name."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def gpu_share(device: str, count: int, nodes: list[dict[str, float]]) -> float:
    """GPUs for each of `count` processes: a whole one, or where there are fewer, a part in hundredths; 0 for "cpu"."""
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if device != "cpu" else 0
    return int(100 / -(-count // gpus)) / 100 if gpus else 0
