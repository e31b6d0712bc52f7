"""Who drives a run, and whether that process lives: exact on its own machine, by heartbeat elsewhere.

No two clocks are compared. A process is known by its number and its start, which no setting of a clock moves. A
heartbeat is a value that changes: a driver on another machine is dead when an observer has seen the same value for
`STALE_AFTER_S` of its own monotonic clock. When a value was first seen is kept in the user's cache folder, so that
one look can tell what two looks minutes apart have shown: `segvit runs` never waits. The first look at a far driver
therefore says that it runs, and a later one, five minutes on or more, that it is gone. Monotonic clocks are
system-wide and begin with the boot, so notes of an earlier boot do not count.

What it cannot tell: a driver that a store did not hear for so long, because the store was away, is taken for dead by
whoever looks before its next beat. It goes on, and marks its run again when it ends.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pipeline import storage

HEARTBEAT_S = 30.0
STALE_AFTER_S = 10 * HEARTBEAT_S
# Ticks and the second to which the boot's time is rounded; a process id does not come round so soon.
SAME_START_S = 2.0
MAX_SIGHTINGS = 1000

HOST_TAG = "segvit.driver.host"
PID_TAG = "segvit.driver.pid"
BOOT_TAG = "segvit.driver.boot"
STARTED_TAG = "segvit.driver.started"
HEARTBEAT_TAG = "segvit.driver.heartbeat"


def process_tags() -> dict[str, str]:
    """Tags that name this very process: host, boot and process namespace, process id and its start."""
    return {
        HOST_TAG: socket.gethostname(),
        BOOT_TAG: _boot(),
        PID_TAG: str(os.getpid()),
        STARTED_TAG: " ".join(f"{start:.2f}" for start in _starts(psutil.Process())),
    }


def identity_tags() -> dict[str, str]:
    """`process_tags` with a first heartbeat: what a driver writes."""
    return process_tags() | {HEARTBEAT_TAG: heartbeat(0)}


def heartbeat(count: int) -> str:
    """The `count`th sign of life: no two of a driver are the same. The time in it is for people to read."""
    return f"{count} at {datetime.now(UTC).isoformat(timespec='seconds')}"


def is_running(tags: Mapping[str, str]) -> bool | None:
    """Whether the process named in `tags` runs; None where it is not on this machine, so that nobody can tell."""
    pid = tags.get(PID_TAG, "?")
    if tags.get(HOST_TAG) != socket.gethostname() or tags.get(BOOT_TAG) != _boot() or not pid.isdigit():
        return None
    process = _living(int(pid))
    return process is not None and _is_same(process, tags)


def why_dead(tags: Mapping[str, str]) -> str | None:
    """Why the driver that wrote `tags` is taken for dead, or None while it is taken for alive."""
    runs_here = is_running(tags)
    if runs_here is not None:
        pid = tags[PID_TAG]
        if runs_here:
            return None
        if _living(int(pid)) is None:
            return f"its driver (process {pid}) is gone"
        return f"its driver is gone (process {pid} is another one now)"
    host = tags.get(HOST_TAG, "an unknown host")
    if HEARTBEAT_TAG not in tags:
        return f"its driver on {host} never gave a sign of life"
    silent_s = _seen_for(tags)
    if silent_s > STALE_AFTER_S:
        return f"its driver on {host} has been silent for {int(silent_s)} s"
    return None


def _living(pid: int) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return process
    return None


def _is_same(process: psutil.Process, tags: Mapping[str, str]) -> bool:
    try:
        noted = [float(start) for start in tags[STARTED_TAG].split()]
        return any(abs(one - other) < SAME_START_S for one, other in zip(noted, _starts(process), strict=False))
    except (KeyError, ValueError, psutil.NoSuchProcess):
        return False


def _starts(process: psutil.Process) -> tuple[float, float]:
    """Its start in seconds since the boot, and since 1970: one of them is the same whenever and wherever it is asked.

    Linux keeps the first; the second moves when the clock is set. macOS keeps the second, and its boot's time moves.
    """
    started = process.create_time()
    return started - psutil.boot_time(), started


@functools.cache
def _boot() -> str:
    # Containers of one machine share the boot id but not the process namespace in which pids have meaning.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    with suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return "unknown"


# When this process has first seen a heartbeat, in seconds of the monotonic clock.
_sightings: dict[str, float] = {}


def _seen_for(tags: Mapping[str, str]) -> float:
    """Seconds since this very heartbeat was first seen from here; 0 now, where it was not."""
    key = " ".join(tags.get(tag, "?") for tag in (HOST_TAG, BOOT_TAG, PID_TAG, STARTED_TAG, HEARTBEAT_TAG))
    now = time.monotonic()
    if key not in _sightings:
        file = _sightings_file()
        noted = _read_sightings(file)
        _sightings[key] = noted.get(key, now)
        if key not in noted:
            latest = sorted({**noted, key: now}.items(), key=lambda item: item[1])[-MAX_SIGHTINGS:]
            # Without a folder to write to, only this process will know.
            with suppress(OSError):
                storage.publish_json(str(file), {"boot": _boot(), "sightings": dict(latest)})
    return now - _sightings[key]


def _sightings_file() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "segvit"
    return folder / f"heartbeats-{socket.gethostname()}.json"


def _read_sightings(file: Path) -> dict[str, float]:
    try:
        noted = json.loads(file.read_text())
        of_this_boot = noted["boot"] == _boot() != "unknown"
        sightings = {str(key): float(seen) for key, seen in noted["sightings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    # A clock that has not come so far has begun anew.
    return {key: seen for key, seen in sightings.items() if of_this_boot and seen <= time.monotonic()}
