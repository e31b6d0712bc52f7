"""How many threads a worker computes with: no more than the cores that it may run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def set_cpu_threads(asked: int, log: Callable[[str], None]) -> int:
    """Let PyTorch compute with `asked` threads, or with as many as there are cores, which `log` is told."""
    cores = usable_cores()
    threads = min(asked, cores)
    if threads < asked:
        log(
            f"runtime.cpus_per_worker {asked} exceeds the {cores} CPU cores that the worker may use; it computes with "
            f"{threads} threads, lower runtime.cpus_per_worker to {cores}"
        )
    torch.set_num_threads(threads)
    return threads


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may run on: its affinity, and the quota of its control group, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(cgroup)
    return cores if quota is None else max(1, min(cores, -int(-quota // 1)))


def cgroup_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time that a container's control group is given, of either version; None: no limit."""
    try:
        if (cgroup / "cpu.max").exists():
            limit, period = (cgroup / "cpu.max").read_text().split()
        else:
            limit, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
