"""Who drives a run, and whether that process lives: exact on its own machine, by heartbeat elsewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

HEARTBEAT_S = 30.0
STALE_AFTER = timedelta(seconds=10 * HEARTBEAT_S)

HOST_TAG = "segvit.driver.host"
PID_TAG = "segvit.driver.pid"
BOOT_TAG = "segvit.driver.boot"
STARTED_TAG = "segvit.driver.started"
HEARTBEAT_TAG = "segvit.driver.heartbeat"


def process_tags() -> dict[str, str]:
    """Tags that name this very process: host, boot and process namespace, process id and its start time."""
    pid = os.getpid()
    return {
        HOST_TAG: socket.gethostname(),
        BOOT_TAG: _boot(),
        PID_TAG: str(pid),
        STARTED_TAG: _start_time(pid),
    }


def identity_tags() -> dict[str, str]:
    """`process_tags` with a first heartbeat: what a driver writes."""
    return process_tags() | {HEARTBEAT_TAG: now_text()}


def now_text() -> str:
    """The time now, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_running(tags: Mapping[str, str]) -> bool | None:
    """Whether the process named in `tags` runs; None where it is not on this machine, so that nobody can tell."""
    pid = tags.get(PID_TAG, "?")
    if tags.get(HOST_TAG) != socket.gethostname() or tags.get(BOOT_TAG) != _boot() or not pid.isdigit():
        return None
    return _exists(int(pid)) and tags.get(STARTED_TAG) == _start_time(int(pid))


def why_dead(tags: Mapping[str, str]) -> str | None:
    """Why the driver that wrote `tags` is taken for dead, or None while it is taken for alive."""
    runs_here = is_running(tags)
    if runs_here is not None:
        pid = tags[PID_TAG]
        if runs_here:
            return None
        if not _exists(int(pid)):
            return f"its driver (process {pid}) is gone"
        return f"its driver is gone (process {pid} is another one now)"
    host = tags.get(HOST_TAG, "an unknown host")
    try:
        silent = datetime.now(UTC) - datetime.fromisoformat(tags[HEARTBEAT_TAG])
    except (KeyError, ValueError):
        return f"its driver on {host} never gave a sign of life"
    if silent > STALE_AFTER:
        return f"its driver on {host} has been silent for {int(silent.total_seconds())} s"
    return None


def _boot() -> str:
    # Containers of one machine share the boot id but not the process namespace in which pids have meaning.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return "unknown"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] not in (["Z"], ["X"])


def _start_time(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else "unknown"


def _stat(pid: int) -> list[str]:
    # Fields from the third on; the second, the name in parentheses, may itself hold blanks and parentheses.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
