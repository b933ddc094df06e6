"""The one place that talks to MLflow: a run is found again by its key, and whoever opens one closes it."""

import fcntl
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException as TrackingError

from la.errors import InputError
from pipelines.tracking.run_contents import source_tags
from pipelines.training.stop import Stopped
from pipelines.workspace import Workspace

Status = Literal["FINISHED", "FAILED", "KILLED"]
KEY, ERROR, KIND = "la.key", "la.error", "la.kind"  # tags
BATCH = 1000  # most metrics MLflow takes in one request
TAG_LENGTH = 5000  # characters MLflow keeps of a tag
MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # MLflow shows runs, not traces

logger = logging.getLogger(__name__)
# They announce every table of a new database, every start, and every check.
for name, level in (("store.db.utils", "WARNING"), ("system_metrics", "WARNING"), ("pyfunc", "WARNING")):
    logging.getLogger(f"mlflow.{name}").setLevel(level)
# A model that needs a file when it is loaded cannot be tried beforehand.
logging.getLogger("mlflow.models.model").setLevel("ERROR")


class Tracker:
    """The workspace's MLflow database, or the server of `uri` or MLFLOW_TRACKING_URI.

    Only one process of a job logs, the driver. The database is made here, behind a lock, because processes that race
    to create it crash. Raises InputError where `uri` does not answer; every method raises TrackingError where the
    tracker fails later.
    """

    def __init__(self, workspace: Workspace, uri: str | None = None):
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or workspace.mlflow_uri
        self._workspace = workspace
        self._local = self.uri == workspace.mlflow_uri
        self._experiments: dict[str, str] = {}
        try:
            with self._alone(), _impatient():
                self._client = MlflowClient(tracking_uri=self.uri)
                self._client.search_experiments(max_results=1)
        except TrackingError as error:
            raise InputError(
                f"MLflow at {self.uri} does not answer ({_first_line(error)}). Expected a database or a running "
                "server: check the tracking URI and MLFLOW_TRACKING_URI, or unset them to use the workspace's own."
            ) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._local:
            yield
            return
        self._workspace.root.mkdir(parents=True, exist_ok=True)
        with open(self._workspace.root / ".mlflow.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def experiment(self, study: str) -> str:
        """Id of the experiment `study`, created or brought back from the bin where need be."""
        if study not in self._experiments:
            with self._alone():
                experiment = self._client.get_experiment_by_name(study)
                if experiment is None:
                    location = str(self._workspace.artifacts / study) if self._local else None
                    try:
                        self._experiments[study] = self._client.create_experiment(study, location, MODEL_TRAINING)
                        return self._experiments[study]
                    except TrackingError:
                        # On a server, another job may have created it since.
                        experiment = self._client.get_experiment_by_name(study)
                        if experiment is None:
                            raise
                if experiment.lifecycle_stage == "deleted":
                    self._client.restore_experiment(experiment.experiment_id)
                for tag in MODEL_TRAINING.items() - experiment.tags.items():
                    self._client.set_experiment_tag(experiment.experiment_id, *tag)
                self._experiments[study] = experiment.experiment_id
        return self._experiments[study]

    def find(self, study: str, key: str) -> "Run | None":
        """The run of that key, whatever its status."""
        runs = self._client.search_runs([self.experiment(study)], f"tags.`{KEY}` = '{key}'", max_results=1)
        return Run(self._client, runs[0].info.run_id, runs[0].info.status) if runs else None

    def open(
        self, study: str, key: str, name: str, kind: str, params: Mapping | None = None, parent: "Run | None" = None
    ) -> "Run":
        """The run of that key, taken up again where an earlier, killed job left it, else a new one. It is RUNNING."""
        run = self.find(study, key)
        if run is None:
            tags = source_tags() | {KEY: key, KIND: kind} | ({"mlflow.parentRunId": parent.id} if parent else {})
            made = self._client.create_run(self.experiment(study), tags=tags, run_name=name)
            run = Run(self._client, made.info.run_id, "RUNNING")
        elif run.status != "RUNNING":
            self._client.update_run(run.id, status="RUNNING")
            run.status = "RUNNING"
        run.params(params or {})
        return run

    @contextmanager
    def watched(self, run: "Run") -> Iterator[None]:
        """Log what this machine's CPUs, memory, disks, network and GPUs do meanwhile, every ten seconds.

        Of a cluster that is the driver's machine alone: workers do not talk to MLflow.
        """
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run.id, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()


class Run:
    """An MLflow run. As a context manager it closes itself: FINISHED, FAILED with the error, or KILLED."""

    def __init__(self, client: MlflowClient, run_id: str, status: str):
        self._client = client
        self.id = run_id
        self.status = status
        self._steps: set[int] | None = None

    def params(self, params: Mapping) -> None:
        """Log what is not there yet: MLflow refuses to change a param, and a job taken up again keeps its first."""
        known = self._client.get_run(self.id).data.params
        new = [Param(key, str(value)) for key, value in params.items() if key not in known]
        if new:
            self._client.log_batch(self.id, params=new)

    def curve(self, points: Iterable[Mapping]) -> None:
        """Log reports, each with its `step`; steps already logged are left out, so a resumed job may repeat them."""
        if self._steps is None:
            self._steps = {m.step for m in self._client.get_metric_history(self.id, "loss")}
        now, batch = _milliseconds(), []
        for point in points:
            step = int(point["step"])
            if step in self._steps:
                continue
            self._steps.add(step)
            batch += [Metric(key, float(v), now, step) for key, v in point.items() if key != "step" and _number(v)]
        for start in range(0, len(batch), BATCH):
            self._client.log_batch(self.id, metrics=batch[start : start + BATCH])

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Log final numbers; those that are there already with the same value are left out."""
        known = self._client.get_run(self.id).data.metrics
        new = {key: float(v) for key, v in metrics.items() if _number(v) and not _same(known.get(key), float(v))}
        if new:
            self._client.log_batch(self.id, metrics=[Metric(k, v, _milliseconds(), 0) for k, v in new.items()])

    def text(self, text: str, file: str) -> None:
        self._client.log_text(self.id, text, file)

    def file(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file with the run."""
        self._client.log_artifact(self.id, str(path), folder)

    def settings(self, settings: Mapping) -> None:
        """Keep everything that was asked for as `config.json`; params are for what tells runs apart."""
        self.text(json.dumps(settings, indent=1, default=str), "config.json")

    def inputs(self, datasets: Iterable[DatasetInput]) -> None:
        """Log the data sets that were used; those that are there already are left out."""
        self._client.log_inputs(self.id, list(datasets))

    def model(self, uri: str) -> None:
        """Name a model that another run logged."""
        self._client.log_outputs(self.id, [LoggedModelOutput(uri.removeprefix("models:/"), step=0)])

    def tag(self, key: str) -> str | None:
        return self._client.get_run(self.id).data.tags.get(key)

    def set_tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.id, key, value)

    def describe(self, markdown: str) -> None:
        """What the run's page begins with."""
        self.set_tag("mlflow.note.content", markdown)

    def close(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """End the run. A FAILED run carries `error` as tag and artifact; a run that succeeds later loses the tag."""
        if error is not None:
            self._client.log_batch(self.id, tags=[RunTag(ERROR, error.strip().splitlines()[-1][:TAG_LENGTH])])
            self.text(error, "error.txt")
        elif ERROR in self._client.get_run(self.id).data.tags:
            self._client.delete_tag(self.id, ERROR)
        self._client.set_terminated(self.id, status)
        self.status = status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception) and not isinstance(error, Stopped):
            self.close("FAILED", f"{type(error).__name__}: {error}")
        else:
            self.close("KILLED")


class Tolerant:
    """Calls MLflow while work goes on that a tracker's failure must not end: the first one is a warning."""

    def __init__(self):
        self._warned = False

    def __call__(self, log: Callable, *arguments: object) -> None:
        try:
            log(*arguments)
        except (TrackingError, OSError, ImportError) as error:
            if not self._warned:
                logger.warning("MLflow did not take a record (%s); work goes on and logs it at its end.", error)
            self._warned = True


def ui_command(workspace: Workspace, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves the workspace's runs. Raises InputError where nothing was tracked there yet."""
    if not (workspace.root / "mlflow.db").exists():
        raise InputError(
            f"--workspace {workspace.root} has no mlflow.db, so there are no runs to show. Run `python cli.py train` "
            "or a sweep there first, or pass the workspace of one."
        )
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", workspace.mlflow_uri]
    return [*command, "--host", host, "--port", str(port), "--workers", "1"]


def serve_ui(
    workspace: Workspace, host: str = "127.0.0.1", port: int = 5000, say: Callable[[str], None] = print
) -> int:
    """Serve MLflow's web pages until Ctrl-C; returns the server's exit code. `say` gets their addresses.

    Raises InputError where nothing was tracked yet and where the port is taken.
    """
    command = ui_command(workspace, host, port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--port {port} on {host} cannot be used ({error.strerror}). Pass another.") from error
    for name, address in pages(workspace, f"http://{host}:{port}"):
        say(f"{name}: {address}")
    # Job execution starts a second set of processes that nothing here uses: 24 s to the first page instead of 7 s.
    server = subprocess.Popen(command, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    try:
        return server.wait()
    except KeyboardInterrupt:
        return server.wait()


def pages(workspace: Workspace, server: str) -> Iterator[tuple[str, str]]:
    """Title and address of the pages worth opening, as links: MLflow itself begins with those for language models.

    The runs of each experiment and, of its newest sweep, the charts that compare the variants, one for each fold.
    """
    client = MlflowClient(workspace.mlflow_uri)
    for experiment in client.search_experiments(filter_string="name != 'Default'"):
        page = f"{server}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
        yield experiment.name, page
        for sweep in client.search_runs([experiment.experiment_id], f"tags.`{KIND}` = 'sweep'", max_results=1):
            key = next((key for key in sweep.data.metrics if key.startswith("miou/")), "best_seen_miou")
            variants = quote(f"tags.mlflow.parentRunId = '{sweep.info.run_id}'")
            # the best first; ordered by time, MLflow hides them below the sweep
            order = f"orderByKey={quote(f'metrics.`{key}`')}&orderByAsc=false"
            chart = f"compareRunsMode=CHART&searchFilter={variants}&{order}"
            yield f"{sweep.info.run_name} by variant", f"{page}&{chart}"


@contextmanager
def _impatient() -> Iterator[None]:
    """For the first request: MLflow's own retries would hide a wrong address for four minutes."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "2"
    try:
        yield
    finally:
        del os.environ[name]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(known: float | None, value: float) -> bool:
    return known == value or (known is not None and math.isnan(known) and math.isnan(value))


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
