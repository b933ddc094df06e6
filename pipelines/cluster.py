"""Connecting to Ray: a cluster where there is one, else this machine for as long as the job runs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CODE = Path(__file__).parents[1]


@contextmanager
def ray_session() -> Iterator[None]:
    """Use the Ray that runs in this process, or start one (or join that of RAY_ADDRESS) and leave it at the end.

    Workers find the project's code by PYTHONPATH, because their working directory is a temporary folder.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # each report waits for a health check
    import ray

    if ray.is_initialized():
        yield
        return
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    ray.init(
        address=os.environ.get("RAY_ADDRESS") or "local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()
