"""A Ray cluster on this machine whose nodes come and go: Ray's fake multi-node provider under its real autoscaler.

The head has no CPU and no GPU for work; a node of type `cpu` or `gpu` (with a GPU in name only) is started by the
autoscaler when something asks for it, and ended when it is idle. Every node is a raylet with its workers; whoever
kills those takes a node away as a provider reclaims it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Self

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.faults.processes import MARK, command_line, marked_processes

START_LIMIT_S = 120.0
HEAD_TYPE = "ray.head.default"  # the provider's own name
NODE_TYPES: dict[str, dict[str, Any]] = {
    "cpu": {"resources": {"CPU": 2}, "min_workers": 0, "max_workers": 2, "node_config": {}},
    "gpu": {"resources": {"CPU": 2, "GPU": 1}, "min_workers": 0, "max_workers": 1, "node_config": {}},
}
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
# What a head runs; each of them alone takes the head with it, as in a pod.
HEAD_SERVICES = {
    "control service": "gcs_server",
    "autoscaler": "/monitor.py",
    "dashboard": "/dashboard/dashboard.py",
    "head's raylet": "raylet/raylet",
}


class FakeCluster:
    """The head with its autoscaler; a context manager that ends all nodes.

    Args:
        folder: where its token, its configuration and its logs lie.
        node_types: the autoscaler's `available_node_types` without the head.
        idle_minutes: after which a node without work is ended.
        redis: address of a Redis server that keeps the control service's state, so that nodes outlive a dead head.
    """

    def __init__(
        self,
        folder: Path,
        node_types: dict[str, dict[str, Any]] | None = None,
        *,
        idle_minutes: float = 1.0,
        redis: str | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.dashboard_port = free_port()
        self.mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        # Short, for the names of Ray's sockets.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="fc", dir="/tmp"))
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        # Of those who talk to the cluster.
        self.access = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
        }
        self._head = {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        if redis is not None:
            self._head |= {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": self.mark}
        config = {
            "cluster_name": "fake",
            "max_workers": 4,
            "idle_timeout_minutes": idle_minutes,
            "provider": {
                # As `fake_multinode` it would want an example file that Ray's wheel lacks.
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "launch_multiple": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "gcs_address": f"127.0.0.1:{self.port}",
            },
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{commands}_commands": [] for commands in COMMANDS},
            "head_node_type": HEAD_TYPE,
            "available_node_types": {
                HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                **(NODE_TYPES if node_types is None else node_types),
            },
        }
        (folder / "cluster.json").write_text(json.dumps(config))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a program that uses the cluster."""
        return os.environ | self.access

    @property
    def is_up(self) -> bool:
        """Whether the head runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the head and wait until it takes drivers; raises SystemExit with its log where it does not."""
        ray = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())"]
        options = {
            "port": self.port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": self.dashboard_port,
            "node-ip-address": "127.0.0.1",
            "num-cpus": 0,
            "num-gpus": 0,
            "object-store-memory": 200_000_000,
            "temp-dir": self.ray_folder,
            "autoscaling-config": self.folder / "cluster.json",
        }
        command = [*ray, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
        environment = os.environ | self.access | self._head | {MARK: self.mark}
        # Else it would look for the cluster that it is to start.
        del environment["RAY_ADDRESS"]
        with (self.folder / "head.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.is_up:
            if listens(self.port) and listens(self.dashboard_port) and self.head_processes("autoscaler"):
                return
            time.sleep(0.2)
        self.stop()
        raise SystemExit(f"the head did not start:\n{(self.folder / 'head.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """End the head and every node."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        kill(marked_processes(self.mark))

    def restart_head(self, keep_nodes: bool) -> None:
        """Start the head again after its death; nodes that it had go with it unless they are to be kept."""
        if self._process is not None:
            self._process.wait(timeout=60)
            self._process = None
        nodes = {process.pid for group in self.nodes().values() for process in group} if keep_nodes else set()
        kill([process for process in marked_processes(self.mark) if process.pid not in nodes])
        self.start()

    def head_processes(self, service: str) -> list[psutil.Process]:
        """The processes of one of the head's services."""
        found = [one for one in marked_processes(self.mark) if HEAD_SERVICES[service] in command_line(one)]
        return [one for one in found if _node_id(one) in (None, FAKE_HEAD_NODE_ID)]

    def nodes(self) -> dict[str, list[psutil.Process]]:
        """The raylet of each node but the head with all that it started, by the node's id."""
        found: dict[str, list[psutil.Process]] = {}
        for process in marked_processes(self.mark):
            node = _node_id(process)
            if node not in (None, FAKE_HEAD_NODE_ID) and HEAD_SERVICES["head's raylet"] in command_line(process):
                with contextlib.suppress(psutil.Error):
                    found[str(node)] = [process, *process.children(recursive=True)]
        return found

    def node_type(self, node: str) -> str:
        """Its type, a key of `node_types`; empty where it is gone."""
        for process in self.nodes().get(node, []):
            try:
                return process.environ().get("RAY_NODE_TYPE_NAME", "")
            except psutil.Error:
                continue
        return ""


def kill(processes: list[psutil.Process]) -> int:
    """SIGKILL to each of them; how many there were."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return len(processes)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _node_id(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING")
    except psutil.Error:
        return None
