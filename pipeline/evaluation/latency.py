"""Timing a model on a machine that may be busy with other work, and telling whether the figure can be relied on."""

from __future__ import annotations

import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from segvit.inference.latency import measure_latency
from segvit.model import SegViT

# Evaluations of one user share the file; what others run shows in the load.
LOCK_FILE = Path(tempfile.gettempdir()) / f"segvit-latency-{os.getuid()}.lock"
LOCK_WAIT_S = 60.0
QUIET_WAIT_S = 5.0
POLL_S = 0.5
# What daemons of Ray and MLflow take now and then.
MAX_OTHER_LOAD = 0.15
MAX_SPREAD = 1.25
# The kernel counts CPU time in hundredths of a second.
MIN_WINDOW_S = 0.5


class Latency(NamedTuple):
    """Median milliseconds of one prediction; `reliable` unless other work kept the machine busy meanwhile."""

    milliseconds: float
    reliable: bool


@contextmanager
def machine_lock(*, alone: bool, wait_s: float = LOCK_WAIT_S) -> Iterator[bool]:
    """Score beside others, or time `alone`: no scoring and no other timing on this machine within the block.

    Gives False where the lock was not to be had within `wait_s`; the work goes on without it.
    """
    with LOCK_FILE.open("a") as file:
        deadline = time.monotonic() + wait_s
        while not (held := _try_lock(file.fileno(), alone)) and time.monotonic() < deadline:
            time.sleep(min(POLL_S, wait_s))
        try:
            yield held
        finally:
            # Loader processes that were forked meanwhile have the file open, too.
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def time_prediction(
    model: SegViT, size: tuple[int, int], repeats: int, inference: Mapping[str, Any], *, wait_s: float = LOCK_WAIT_S
) -> Latency:
    """Time the prediction of one image (height, width) in `repeats` runs or more, alone where possible.

    Reliable are runs of about the same length during which all other processes together took less than 15 % of the
    machine's CPUs.
    """
    with machine_lock(alone=True, wait_s=wait_s) as held:
        _wait_for_quiet()
        process, begin = psutil.Process(), time.perf_counter()
        own_before = _cpu_seconds(process)
        psutil.cpu_percent()
        medians: list[float] = []
        while len(medians) < 2 or time.perf_counter() - begin < MIN_WINDOW_S:
            medians.append(measure_latency(model, size, (repeats + 1) // 2, inference))
        machine_load = psutil.cpu_percent() / 100
        own_load = (_cpu_seconds(process) - own_before) / (time.perf_counter() - begin) / (psutil.cpu_count() or 1)
    latency = statistics.median(medians)
    quiet = machine_load - own_load < MAX_OTHER_LOAD and latency < MAX_SPREAD * min(medians)
    return Latency(latency, held and quiet)


def _wait_for_quiet() -> None:
    deadline = time.monotonic() + QUIET_WAIT_S
    while psutil.cpu_percent(interval=POLL_S) / 100 >= MAX_OTHER_LOAD and time.monotonic() < deadline:
        pass


def _try_lock(descriptor: int, alone: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
