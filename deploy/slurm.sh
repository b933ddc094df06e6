#!/bin/bash
# One job of this project on a Ray cluster of its own, on as many Slurm nodes as you ask for.
#
#   sbatch deploy/slurm.sh featurize --coco-dir /shared/coco --workers 8
#   sbatch --nodes=4 deploy/slurm.sh train --fold 0 --preset paper --workers 16
#   sbatch --time=48:00:00 deploy/slurm.sh sweep ablations --folds 0,1,2,3 --gpus 1
#
# What follows the script's name is a verb and its options, as after cli.py; options before it are sbatch's and win over
# the lines below. Submit from the checkout. Checkout, .venv, workspace and photos must lie on storage that all nodes see.
#
# Change these to your cluster; `sinfo` lists partitions, `scontrol show node` what a node has.
#SBATCH --job-name=label-anything
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=label-anything-%j.log
#SBATCH --open-mode=append
# A job that is preempted, or whose node fails, waits for its turn again and goes on where it was.
#SBATCH --requeue
# 60 s before its time is over this script gets SIGTERM (B: the script alone, not Ray), and training checkpoints. For
# the same notice at a preemption, the cluster needs PreemptParameters=send_user_signal or a GraceTime.
#SBATCH --signal=B:TERM@60

set -euo pipefail

# Settings with a default; set them in the environment before sbatch.
: "${LA_PYTHON:=.venv/bin/python}"           # python of the environment the project is installed in
: "${LA_RAY:=$(dirname "$LA_PYTHON")/ray}"   # ray of the same
: "${LA_WAIT_SECONDS:=300}"                  # for all nodes to join; a shared file system may be slow at first
# MLFLOW_TRACKING_URI: an MLflow server; without it the workspace's own database is used.
# LA_WORKSPACE: the workspace, in place of --workspace.

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch [sbatch's options] deploy/slurm.sh VERB [options of cli.py VERB]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} # this script runs on the first node
# The head's address as the last node sees it: on the head itself its name often stands for 127.0.1.1.
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[-1]}" getent ahostsv4 "$head" | awk 'NR == 1 {print $1}')
address="$head_ip:$((20000 + SLURM_JOB_ID % 10000))" # a port of its own: two jobs may share a node
echo "nodes: ${nodes[*]}; Ray at $address"

steps=()
trap 'kill "${steps[@]}" 2>/dev/null || true' EXIT

start_ray() { # start_ray NODE ray's options...: a Ray node that lives as long as its srun
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        "$LA_RAY" start "$@" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats --block &
    steps+=($!)
}

joined() { # joined N: wait until so many nodes are in the cluster
    "$LA_PYTHON" - "$address" "$1" "$LA_WAIT_SECONDS" <<'PYTHON'
import sys, time
import ray

address, wanted, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
limit = time.monotonic() + seconds
alive = 0
while time.monotonic() < limit:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive >= wanted:
            sys.exit(0)
    except (ConnectionError, TimeoutError):
        pass
    time.sleep(2)
sys.exit(f"{alive} of {wanted} nodes joined Ray at {address} within {seconds:.0f} s; see the log above")
PYTHON
}

start_ray "$head" --head --node-ip-address="$head_ip" --port="${address##*:}" --include-dashboard=false
joined 1 # workers that come before the head give up
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$address"
done
joined "${#nodes[@]}"

"$LA_PYTHON" cli.py "$@" --address "$address" &
driver=$!
noticed=false
trap 'noticed=true; kill -TERM "$driver" 2>/dev/null || true' TERM

# `wait` returns early when the signal comes, so it is asked again until the driver is gone.
status=0
while kill -0 "$driver" 2>/dev/null; do
    wait "$driver" && status=0 || status=$?
done

# Ended on notice: back into the queue. The same command goes on from the last checkpoint. (Where Slurm requeues the
# job itself, as at a preemption, this changes nothing.)
if $noticed && [[ $status -ne 0 && $status -ne 2 ]]; then
    echo "stopped on notice with exit code $status; requeued"
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
