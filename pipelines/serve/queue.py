"""Jobs in the order they came, so many at once as there are models, and each with the time it waited."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import NamedTuple

from la.predictor.predictor import Predictor
from pipelines.config import ServeConfig
from pipelines.serve.jobs import Jobs, Refused

Job = Callable[..., object]  # a method of `Jobs`, as `Jobs.segment`; its arguments follow


class Timed(NamedTuple):
    """What a job returned, and how many seconds it ran and waited before."""

    value: object
    seconds: float
    queue_seconds: float


class JobQueue:
    """Hands jobs to `do`, which returns a job's value and the seconds it ran, `at_once` of them at a time."""

    def __init__(self, do: Callable[[Job, tuple], tuple[object, float]], max_waiting: int, at_once: int = 1):
        self._do = do
        self.most, self.waiting = max_waiting + at_once, 0  # with those under way
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(at_once, "model")

    async def run(self, job: Job, *args: object) -> Timed:
        """Raises Refused (503) where too many wait already, and what the job raises."""
        with self._lock:
            if self.waiting >= self.most:
                raise Refused(503, "busy", None, f"{self.waiting} requests wait for the model; try again in a while.")
            self.waiting += 1
        future = self._threads.submit(self._timed, time.perf_counter(), job, args)
        future.add_done_callback(self._one_done)  # also where the user went away and the job never ran
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Start no further job."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _timed(self, came: float, job: Job, args: tuple) -> Timed:
        value, seconds = self._do(job, args)
        return Timed(value, round(seconds, 4), round(max(0.0, time.perf_counter() - came - seconds), 4))

    def _one_done(self, _: object) -> None:
        with self._lock:
            self.waiting -= 1


@contextmanager
def model_queue(config: ServeConfig, predictor: Predictor | None = None) -> Iterator[JobQueue]:
    """The queue before one model in this process, until the end of the block. InputError as `Jobs`."""
    with closing(JobQueue(partial(timed, Jobs(config, predictor)), config.max_waiting)) as queue:
        yield queue


def timed(jobs: Jobs, job: Job, args: tuple) -> tuple[object, float]:
    """A job's value and the seconds it ran. Raises what the job raises."""
    started = time.perf_counter()
    value = job(jobs, *args)
    return value, time.perf_counter() - started
