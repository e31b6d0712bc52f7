"""A batch script for Slurm that starts Ray on the job's nodes and runs one experiment on it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flows.cluster.options import SlurmOptions

_END_EARLY_S = 120

_SCRIPT = r"""
# Partition, account and time limit are yours: sbatch --partition=P --account=A --time=12:00:00 THIS_FILE
# Where the time limit nears, or the nodes are taken away, it is queued again and goes on where it was.
set -euo pipefail

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
if [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    echo "error: no token for Ray in the home directory; make one, once: ray get-auth-token --generate" >&2
    exit 1
fi

# Ray's own choice among the node's addresses; HEAD_IP overrules it, for the faster of two networks.
head_ip=${HEAD_IP:-$(python -c 'import ray; print(ray.util.get_node_ip_address())')}
head=$head_ip:6379
temp=/tmp/ray-$SLURM_JOB_ID
step=(srun --quiet --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE")

trap 'kill $(jobs -p) 2> /dev/null; wait; srun --quiet --ntasks-per-node=1 rm -rf "$temp"' EXIT

"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" bash -c '
    ulimit -n "$(ulimit -Hn)"
    exec ray start --head --block --node-ip-address="$0" --port=6379 --dashboard-host="$0" --temp-dir="$1" \
        --num-cpus="$SLURM_CPUS_ON_NODE" > /dev/null' "$head_ip" "$temp" &
ray_head=$!
until ray health-check --address "$head" > /dev/null 2>&1; do
    kill -0 "$ray_head" || { echo "error: Ray did not start on $SLURMD_NODENAME" >&2; exit 1; }
    sleep 2
done

workers=$((SLURM_JOB_NUM_NODES - 1))
if [ "$workers" -gt 0 ]; then
    "${step[@]}" --nodes="$workers" --ntasks="$workers" --exclude="$SLURMD_NODENAME" bash -c '
        ulimit -n "$(ulimit -Hn)"
        exec ray start --block --address="$0" --num-cpus="$SLURM_CPUS_ON_NODE" > /dev/null' "$head" &
fi

export RAY_ADDRESS=$head
until python -c '
import sys, ray
ray.init(logging_level="ERROR")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))' "$SLURM_JOB_NUM_NODES" 2> /dev/null; do
    kill -0 "$ray_head" || { echo "error: Ray ended on $SLURMD_NODENAME" >&2; exit 1; }
    sleep 5
done

"${flow[@]}" &
running=$!
again=
trap 'again=1; kill -TERM "$running"' USR1
code=0
wait "$running" || code=$?
if [ "$again" ]; then
    # The signal ended the wait above, not yet the flow.
    code=0
    wait "$running" || code=$?
    [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def batch_script(options: SlurmOptions, config: str, overrides: Sequence[str]) -> str:
    """The script; `config` is the experiment file's path as the nodes see it.

    Ray listens on the nodes' own addresses and asks everyone for the user's token. The nodes are the job's alone, for
    Ray takes fixed ports and all cores.
    """
    directives = [
        f"--job-name={options.name}",
        f"--output={options.name}-%j.log",
        "--open-mode=append",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--mem=0",
        "--requeue",
        f"--signal=B:USR1@{_END_EARLY_S}",
    ]
    if options.gpus_per_worker:
        directives.append(f"--gpus-per-node={options.gpus_per_worker}")
    command = ["segvit", "run", config, "--workspace", options.workspace]
    command += ["--tracking-uri", options.mlflow_uri] if options.mlflow_uri else []
    command += [word for override in overrides for word in ("--set", override)]
    lines = ["#!/bin/bash", *(f"#SBATCH {directive}" for directive in directives)]
    body = _SCRIPT.replace("set -euo pipefail\n", f"set -euo pipefail\n\nflow=({shlex.join(command)})\n", 1)
    return "\n".join(lines) + body
