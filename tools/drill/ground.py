"""The ground a failure drill is held on: a small featurized workspace, real processes to end, results to compare."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from la.predictor.checkpoint import BUNDLED_WEIGHTS
from pipelines.cluster import CODE
from pipelines.config import TrainConfig
from pipelines.demo.scenes import draw_scenes
from pipelines.runs.checkpoints import LAST, load
from pipelines.runs.identity import run_dir_of
from pipelines.store.reader import FeatureStore, read_info
from pipelines.workspace import Workspace

T = TypeVar("T")
WEIGHTS = BUNDLED_WEIGHTS["vit_demo_patch8_128"]
FEATURIZE = ("--backbone", "vit_demo_patch8_128", "--weights", str(WEIGHTS), "--threads", "1")
PIXELS, SLOW_PIXELS = 128, 256  # sides of photos: of most cases, and of those where the ViT should work for seconds
STEPS, EVERY = 240, 40  # of a training, and between its checkpoints
TRAIN = ("--preset", "debug", "--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--batch-scale", "0.25")
TRAIN += ("--val-every", "120", "--val-episodes", "5", "--warmup-steps", "5", "--threads", "1")
PATIENCE = 300  # seconds that anything waited for may take, on a busy machine


class DrillError(Exception):
    """Something did not happen that should have."""


class Job:
    """A process of its own that runs a verb, or `tools.drill.train_recorded`; what it prints goes to a file."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        self.log = log
        with open(log, "w") as out:
            # not in the checkout: workers must find the code without their driver's working directory
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=log.parent, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def wait(self, *expected: int) -> str:
        """What it printed, once it has ended with one of the exit codes."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise DrillError(f"{self.log} did not end within {PATIENCE} s") from error
        if code not in expected:
            raise DrillError(f"{self.log} ended with {code}, expected {expected}: {self.log.read_text()[-600:]}")
        return " ".join(self.log.read_text().split())

    def until(self, condition: Callable, what: str):
        """The first true answer of `condition` while the job runs."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if answer := condition():
                return answer
            if self.process.poll() is not None:
                raise DrillError(f"{self.log} ended before {what}: {self.log.read_text()[-600:]}")
            time.sleep(0.03)
        raise DrillError(f"{self.log}: no {what} within {PATIENCE} s")


class Ground:
    """Workspaces to break, each a copy of one that is whole, and the results of the undisturbed run."""

    def __init__(self, root: Path):
        self.root = root
        self.base = root / "base"
        self.address: str | None = None  # of the Ray cluster, once there is one
        self._jobs: list[Job] = []
        self._contexts = ExitStack()

    def prepare(self) -> None:
        """Draw scenes, featurize them, train once: what everything later is compared with."""
        draw_scenes(self.root / "scenes", train_images=160, val_images=48)
        self.featurize(self.base, "base-featurize").wait(0)
        self.verb("train", *TRAIN, workspace=self.base, name="base-train").wait(0)

    @cached_property
    def slow_base(self) -> Path:
        """As `base`, of larger photos and without a training."""
        self.featurize(self.root / "slow-base", "slow-base-featurize", pixels=SLOW_PIXELS).wait(0)
        return self.root / "slow-base"

    def featurize(
        self, workspace: Path, name: str, workers: int = 0, features: str | None = None, pixels: int = PIXELS
    ) -> Job:
        options = ("--coco-dir", self.root / "scenes", *FEATURIZE, "--image-size", pixels, "--workers", workers)
        options += ("--features", features) if features else ()
        return self.verb("featurize", *options, workspace=workspace, name=name)

    def copy(self, name: str) -> Path:
        """A workspace with the features and episodes, and no run."""
        return Path(
            shutil.copytree(self.base, self.root / name, ignore=lambda folder, names: {"runs", "mlflow.db"} & {*names})
        )

    def verb(self, *arguments: object, workspace: Path, name: str) -> Job:
        """Start `cli.py` with these arguments."""
        words = [str(CODE / "cli.py"), *map(str, arguments), "--workspace", str(workspace)]
        return self._start(words, name)

    def train(self, config: TrainConfig, name: str) -> Job:
        """Start training with its reports written down."""
        config.workspace.mkdir(exist_ok=True)
        file = self.root / f"{name}.json"
        file.write_text(config.model_dump_json())
        return self._start(["-m", "tools.drill.train_recorded", str(file), str(reports_of(config))], name)

    def _start(self, words: list[str], name: str) -> Job:
        environment = os.environ | {
            "PYTHONPATH": str(CODE),
            "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": self.address or "",
            "MLFLOW_TRACKING_URI": "",
            "COLUMNS": "200",
        }
        job = Job(words, self.root / f"{name}.log", environment)
        self._jobs.append(job)
        return job

    def enter(self, context: AbstractContextManager[T]) -> T:
        """What a context gives; it is left when the case has ended."""
        return self._contexts.enter_context(context)

    def end(self) -> None:
        """End what a case leaves behind, and what still runs after one that went wrong."""
        self._contexts.close()
        for job in self._jobs:
            if job.process.poll() is None:
                job.process.kill()
                job.process.wait()
        self._jobs.clear()

    def need_cluster(self) -> None:
        """A Ray cluster of this drill's own on this machine: a head without CPUs, and one node that works."""
        if self.address:
            return
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ["PYTHONPATH"] = str(CODE)
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.worker_node = self.cluster.add_node(num_cpus=2)
        self.address = self.cluster.address

    def leave_cluster(self) -> None:
        if self.address:
            self.cluster.shutdown()

    @cached_property
    def config(self) -> TrainConfig:
        """Of the undisturbed training."""
        return TrainConfig(**json.loads(next(self.base.glob("runs/*/config.json")).read_text()))

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return weights_of(run_dir_of(self.config))

    def same_weights(self, config: TrainConfig) -> bool:
        return same(weights_of(run_dir_of(config)), self.weights)

    def same_features(self, workspace: Path, base: Path | None = None) -> bool:
        """Whether a store holds the bytes of the undisturbed one: by its checksums, each compared with its file."""
        ours, theirs = (Workspace(root).find_store() for root in (workspace, base or self.base))
        shards = read_info(ours).shards
        return shards == read_info(theirs).shards and list(FeatureStore(ours).verify()) == sorted(shards)


def reports_of(config: TrainConfig) -> Path:
    return config.workspace / "reports.jsonl"


def reported_step(config: TrainConfig) -> int:
    """The last step that training told of, every tenth being told."""
    try:
        return int(reports_of(config).read_text().split()[-1])
    except (FileNotFoundError, IndexError):
        return 0


def saved_step(run_dir: Path) -> int:
    """Step of the last checkpoint; 0 without one."""
    try:
        return load(run_dir / LAST)["step"]
    except FileNotFoundError:
        return 0


def starts_of(run_dir: Path) -> list[int]:
    """The steps that a finished run started and went on from."""
    return json.loads((run_dir / "result.json").read_text())["starts"]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights under training, their average, and the best average."""
    last, best = load(run_dir / LAST), load(run_dir / "best.pt")
    parts = {"training": last["training"], "average": last["state"], "best": best["state"]}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def processes(*words: str) -> list[int]:
    """Processes below this one whose title is Ray's and has one of `words`; only they can be of this drill."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
        except (OSError, ValueError, IndexError):
            continue
    family, found = [os.getpid()], []
    for pid in family:
        family += children.get(pid, [])
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if title.startswith("ray::") and any(word in title for word in words):
            found.append(pid)
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """Mount a disk of that size on `folder`; says whether the system let us."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def forbid_large_files(pid: int, limit: int) -> None:
    """Let a running process write no file beyond so many bytes: what it sees is much like a full disk."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
