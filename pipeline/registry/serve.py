"""A model behind `scoring_app`, in a process group of its own that ends with the block that started it."""

from __future__ import annotations

import base64
import errno
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from pipeline.errors import UserError
from pipeline.registry.model_package import save_pyfunc
from pipeline.registry.models import checkpoint_folder, model_folder, resolve_model
from pipeline.workflow.tracking import Tracking
from segvit.image_files import encode_png

ASK_EVERY_S = 0.2
STOP_WITHIN_S = 5.0


def served_folder(tracking: Tracking, model: str, cache: Path) -> Path:
    """The MLflow model of a registered version, or one packed of a checkpoint folder; raises UserError."""
    # It would show for every small file.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if model.startswith("models:"):
        return model_folder(tracking, resolve_model(tracking, model), cache)
    target = cache / "model"
    save_pyfunc(target, checkpoint_folder(tracking, model, cache / "checkpoint"))
    return target


def check_address(host: str, port: int) -> bool:
    """Whether (host, port) is reached from this machine alone; raises UserError where nothing can listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do, or the connections of one that ended a moment ago would count as use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; end what listens there or give another --port"
            ) from error
        raise UserError(
            f"nothing can listen at {host} port {port} ({error.strerror}); give another --host or --port"
        ) from error
    return ipaddress.ip_address(address[0]).is_loopback


@contextmanager
def scoring_server(folder: Path, host: str, port: int, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server of the model in `folder`, answering; its output goes to standard error.

    Raises UserError where it ends before it answers.
    """
    interpreter = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipeline.registry.scoring_app", str(folder.resolve())),
            *("--host", host, "--port", str(port)),
        ],
        # Not where the caller stands: Python would take modules from there.
        cwd=scratch,
        env={**os.environ, "PATH": interpreter, "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )
    try:
        while not _answers(f"{server_url(host, port)}/ping"):
            if process.poll() is not None:
                raise UserError(
                    f"the server ended with code {process.returncode} before it answered; see its output above"
                )
            time.sleep(ASK_EVERY_S)
        yield process
    finally:
        _stop(process)


def server_url(host: str, port: int) -> str:
    """Where the server answers on this machine."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


def curl_line(url: str) -> str:
    """A shell command that asks the server for the label map of a small grey image."""
    image = base64.b64encode(encode_png(np.full((32, 32, 3), 128, np.uint8))).decode()
    return f"""curl -s {url}/invocations -H 'Content-Type: application/json' -d '{{"inputs": ["{image}"]}}'"""


def _answers(url: str) -> bool:
    # No proxy stands between this machine and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=5).close()
    except OSError:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: asked first, then killed; also where one asks again meanwhile."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    try:
        for member in family:
            _signal(member, signal.SIGTERM)
        deadline = time.monotonic() + STOP_WITHIN_S
        while any(map(_runs, family)) and time.monotonic() < deadline:
            # Reaps it, where it has ended.
            process.poll()
            time.sleep(0.05)
    finally:
        for member in family:
            _signal(member, signal.SIGKILL)
        process.wait()


def _signal(member: psutil.Process, number: signal.Signals) -> None:
    try:
        member.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _runs(member: psutil.Process) -> bool:
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
