"""Jobs on a real cluster of two nodes on loopback, with token authentication on."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

CONFIG = Path(__file__).parents[2] / "flows" / "configs" / "quickstart.yaml"
START_TIMEOUT_S = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ray_start(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def stop(node: subprocess.Popen[bytes]) -> None:
    """End a node and everything it started, by force where asking is not enough."""
    started = [*psutil.Process(node.pid).children(recursive=True)]
    node.terminate()
    _, alive = psutil.wait_procs(started, timeout=20)
    for process in alive:
        process.kill()
    node.kill()
    node.wait()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The job server's address and the environment that carries the token."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEGVIT_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    gcs, dashboard = free_port(), free_port()
    # A short path, for the names of the sockets in it; and no trace where others look for a running cluster.
    scratch = tempfile.mkdtemp(prefix="ray-")
    head = ray_start(
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        "--num-cpus=1",
        f"--temp-dir={scratch}",
        environment=environment,
    )
    nodes = [head]
    try:
        wait_for(gcs)
        nodes.append(ray_start(f"--address=127.0.0.1:{gcs}", "--num-cpus=1", environment=environment))
        wait_for(dashboard)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        for node in reversed(nodes):
            stop(node)
        shutil.rmtree(scratch, ignore_errors=True)


def submit(
    address: str, environment: dict[str, str], workspace: Path, *overrides: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "submit", str(CONFIG), "--address", address]
    command += ["--workspace", str(workspace), *(word for value in overrides for word in ("--set", value))]
    return subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )


def test_submit__failed_job_exits_1_with_its_cause(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = cluster
    ended = submit(address, environment, tmp_path / "ws", "data.dataset=camvid", "data.root=/no/such/folder")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "error: job " in ended.stderr, ended.stdout + ended.stderr
    message = ended.stderr[ended.stderr.index("error: job ") :]
    assert "/no/such/folder" in message
    assert "Traceback" not in ended.stderr


def test_submit__without_the_token_is_refused(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = cluster
    (tmp_path / "token").write_text("wrong" * 8)
    ended = submit(address, environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, tmp_path / "ws")
    assert ended.returncode == 1
    assert "error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "ws").exists()
