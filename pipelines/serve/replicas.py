"""Copies of the model as replicas of a Ray Serve deployment, each a process that does one job at a time.

The page's process keeps everything that users showed and owns it in Ray's object store, so that a replica that dies
takes nothing along. What a replica learned of a class set stays with it: another learns it anew from the same supports.
"""

import logging
import os
import socket
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ApplicationStatus

from la.errors import InputError
from la.predictor.checkpoint import DEMO
from pipelines.cluster import gpu_share, node_resources, ray_session
from pipelines.config import ServeConfig
from pipelines.serve.jobs import ClassSet, Jobs, Refused
from pipelines.serve.queue import Job, JobQueue, timed

MOST_LEARNED = 8  # class sets that a replica keeps; the hybrid takes 1.4 MB a support (ViT-S/14 at 420 px)
TRIES = 2  # of a job whose replica died: who dies of it twice would die of it again
START = 600.0  # seconds for all replicas to load their models
PATIENCE = 300.0  # seconds for a job, and for a replica to come back where all died


class Shown(NamedTuple):
    """What travels in place of a class set: its key, and where its supports are in the object store."""

    key: str
    supports: list[ray.ObjectRef]  # one, within a list, else Ray would fetch it with every job


class Replica:
    """One model in a process of its own."""

    def __init__(self, config: ServeConfig):
        self._learned: OrderedDict[str, ClassSet] = OrderedDict()
        try:
            self._jobs, self._mistake = Jobs(config), None
        except InputError as error:  # raised, Ray would tell it as a failed constructor and try again
            self._jobs, self._mistake = None, error

    def mistake(self) -> InputError | None:
        """Why the model cannot be used."""
        return self._mistake

    def do(self, job: Job, args: tuple) -> tuple[object, float] | InputError:
        """As `timed`, but with InputError returned: raised, it would arrive as one of Ray's."""
        if self._mistake:
            return self._mistake
        try:
            known = [self._class_set(one) if isinstance(one, Shown) else one for one in args]
            value, seconds = timed(self._jobs, job, tuple(known))
        except InputError as error:
            return error
        if isinstance(value, ClassSet):
            self._keep(value)
        return value, seconds

    def _class_set(self, shown: Shown) -> ClassSet:
        if shown.key not in self._learned:
            self._keep(self._jobs.learned(ray.get(shown.supports[0]), key=shown.key))
        self._learned.move_to_end(shown.key)
        return self._learned[shown.key]

    def _keep(self, class_set: ClassSet) -> None:
        self._learned[class_set.key] = class_set
        if len(self._learned) > MOST_LEARNED:
            self._learned.popitem(last=False)


class Replicas:
    """Has jobs done by whichever replica is free; used by as many threads as there are replicas."""

    def __init__(self, deployment: serve.handle.DeploymentHandle):
        self._deployment, self._ending = deployment, False
        self._shown: weakref.WeakKeyDictionary[ClassSet, Shown] = weakref.WeakKeyDictionary()
        if mistake := deployment.mistake.remote().result(timeout_s=PATIENCE):
            raise mistake

    def do(self, job: Job, args: tuple) -> tuple[object, float]:
        """Raises InputError as the job does, and Refused (503) where replicas die of it or none is there."""
        sent = tuple(self._sent(one) if isinstance(one, ClassSet) else one for one in args)
        for _ in range(TRIES):
            try:
                answer = self._deployment.do.remote(job, sent).result(timeout_s=PATIENCE)
            except RayActorError:
                if self._ending:
                    break
            except TimeoutError as error:
                message = f"the model did not answer within {PATIENCE:.0f} s; try again later, or a smaller photo."
                raise Refused(503, "model_lost", None, message) from error
            except DeploymentUnavailableError:
                break
            else:
                if isinstance(answer, InputError):
                    raise answer
                return answer
        message = "the process with the model ended at this; try again, or a smaller photo."
        raise Refused(503, "model_lost", None, message)

    def close(self) -> None:
        """Give up what runs when its replica ends, instead of waiting for another."""
        self._ending = True

    def _sent(self, class_set: ClassSet) -> Shown:
        if (shown := self._shown.get(class_set)) is None:
            shown = self._shown[class_set] = Shown(class_set.key, [ray.put(class_set.supports)])
        return shown  # freed when the class set is


def _until_running(name: str, count: int) -> None:
    """Raises InputError where Ray Serve gives up, or has had START seconds."""
    until = time.monotonic() + START
    while (now := serve.status().applications[name]).status != ApplicationStatus.RUNNING:
        if now.status == ApplicationStatus.DEPLOY_FAILED or time.monotonic() > until:
            raise InputError(
                f"--replicas {count}: Ray Serve could not start so many ({now.message!s:.600}). Pass fewer, or look at "
                "what else runs on the cluster: `ray status`."
            )
        time.sleep(0.2)


@contextmanager
def replicas_queue(config: ServeConfig) -> Iterator[JobQueue]:
    """The queue before `config.replicas` models, until the end of the block.

    Raises InputError for a cluster that does not answer or is too small, and for a checkpoint that cannot be used.
    """
    with ray_session():
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of every slow answer
        cpus, gpus = share_of(config, node_resources())
        device = config.device if not gpus else "cuda"  # a replica sees its own GPU alone
        checkpoint = config.checkpoint if config.checkpoint == DEMO else os.path.abspath(config.checkpoint)
        its = {
            "checkpoint": checkpoint,
            "weights": config.weights and config.weights.absolute(),
            "device": "cpu" if device == "auto" else device,
            "threads": config.threads or max(1, int(cpus)),
        }
        model = serve.deployment(
            Replica,
            name="model",
            num_replicas=config.replicas,
            max_ongoing_requests=1,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            health_check_period_s=2,  # 10 by default: so long a replica that died would not be missed
            graceful_shutdown_timeout_s=5,
            logging_config={"log_level": "WARNING"},
        )
        name = f"label-anything-{socket.gethostname()}-{config.port}"  # replaces what a killed server left behind
        serve.start(proxy_location="Disabled")  # no port of its own
        try:
            target = serve.RunTarget(model.bind(config.model_copy(update=its)), name=name, route_prefix=None)
            [handle] = serve.run_many([target], wait_for_applications_running=False)
            _until_running(name, config.replicas)
            with (
                closing(Replicas(handle)) as replicas,
                closing(JobQueue(replicas.do, config.max_waiting, config.replicas)) as queue,
            ):
                yield queue
        finally:
            serve.delete(name)


def share_of(config: ServeConfig, nodes: list[dict[str, float]]) -> tuple[float, float]:
    """CPUs and GPUs that one replica gets of nodes with these resources, so that all have room.

    Without --threads the CPUs are shared; GPUs are, where there are fewer of them than replicas. Raises InputError
    where there is no room.
    """
    count = config.replicas
    gpu = gpu_share(config.device, count, nodes)
    if config.device.startswith("cuda") and not gpu:
        raise InputError(f"--device {config.device} with --replicas: Ray has no GPU. Use --device cpu or auto.")
    all_cpus = sum(node.get("CPU", 0) for node in nodes)

    def room(cpus: float) -> bool:
        """Each replica is on one node, with its CPUs and its part of a GPU."""
        fitting = (min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpu if gpu else count) for node in nodes)
        return sum(fitting) >= count

    parts = [int(100 / part) / 100 for part in range(2, count + 1)]
    wanted = [config.threads] if config.threads else [*range(int(all_cpus / count), 0, -1), *parts]
    for cpus in wanted:
        if room(cpus):
            return cpus, gpu
    there = (f"a node of {node.get('CPU', 0):.0f} CPUs and {node.get('GPU', 0):.0f} GPUs" for node in nodes)
    threads = f" times --threads {config.threads}" if config.threads else ""
    raise InputError(f"--replicas {count}{threads}: Ray has {', '.join(there)}. Pass fewer.")
