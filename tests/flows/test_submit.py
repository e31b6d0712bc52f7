"""Jobs on a real cluster of two nodes on loopback, with token authentication on."""

from __future__ import annotations

import hashlib
import json
import os
import re
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

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "flows" / "configs" / "quickstart.yaml"
CHANGE = """
def prepare_shard(*_arguments):
    import hashlib, os
    from pipeline.errors import UserError
    seen = hashlib.sha256(os.environ["PROBE_TOKEN"].encode()).hexdigest()
    raise UserError(f"changed line of {__file__} with {seen}")
"""
START_TIMEOUT_S = 180.0


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
    # A busy machine takes longer than Ray waits for its own processes.
    environment["RAY_raylet_start_wait_time_s"] = str(int(START_TIMEOUT_S))
    # The nodes have what is installed, and its Python.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment.pop("PYTHONPATH", None)
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
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={scratch}",
        environment=environment,
    )
    nodes = [head]
    try:
        wait_for(gcs)
        agent = f"--dashboard-agent-listen-port={free_port()}"
        nodes.append(ray_start(f"--address=127.0.0.1:{gcs}", "--num-cpus=1", agent, environment=environment))
        wait_for(dashboard)
        yield f"http://127.0.0.1:{dashboard}", environment | {"SCRATCH": scratch}
    finally:
        for node in reversed(nodes):
            stop(node)
        shutil.rmtree(scratch, ignore_errors=True)


def submit(
    address: str, environment: dict[str, str], workspace: Path, *options: str, checkout: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "submit", str(CONFIG), "--address", address]
    command += ["--workspace", str(workspace), *options]
    environment = environment | {"PYTHONPATH": str(checkout)}
    return subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300)


def test_submit__a_changed_source_runs_in_workers_with_the_callers_variables(
    cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = cluster
    checkout, secret = tmp_path / "checkout", secrets.token_hex(16)
    for package in ("segvit", "pipeline", "flows"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = checkout / "pipeline" / "shards" / "shard_task.py"
    changed.write_text(changed.read_text().replace("def prepare_shard(", f"{CHANGE}\n\ndef _former(", 1))
    ended = submit(
        address,
        environment | {"PROBE_TOKEN": secret},
        tmp_path / "ws",
        "--env",
        "PROBE_TOKEN",
        "--set",
        "runtime.cpus_per_worker=1",
        checkout=checkout,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.match(r"error: job quickstart-\S+ failed: ", ended.stderr), ended.stdout + ended.stderr
    assert re.search(
        rf"changed line of \S+/working_dir_files/\S+/pipeline/shards/shard_task.py with "
        rf"{hashlib.sha256(secret.encode()).hexdigest()}",
        ended.stderr,
    )
    assert "Traceback" not in ended.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "flows.cli", "jobs", "--address", address, "--json"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    [job] = json.loads(listed.stdout)
    assert (job["state"], job["flow"]) == ("failed", "quickstart")
    assert "changed line of " in job["message"]
    # Ray keeps what it is told of a job, the variables of its runtime environment among them, in logs on every node.
    logs = [file for file in Path(environment["SCRATCH"]).glob("session_2*/logs/**/*") if file.is_file()]
    assert any(job["job"] in file.name for file in logs)
    assert not [file for file in logs if secret in file.read_text(errors="replace")]


def test_submit__without_the_token_is_refused(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = cluster
    (tmp_path / "token").write_text("wrong" * 8)
    ended = submit(address, environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}, tmp_path / "ws")
    assert ended.returncode == 1
    assert f"error: the job server at {address} refuses this user's token" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "ws").exists()
