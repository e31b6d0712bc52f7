"""The processes that a fault run started, known by a mark in their environment, which their children inherit."""

from __future__ import annotations

import time

import psutil

MARK = "SEGVIT_FAULT_RUN"
ORPHAN_LIMIT_S = 30


def marked_processes(mark: str) -> list[psutil.Process]:
    """All living processes that bear `mark`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(mark: str) -> None:
    """Raise SystemExit, naming them, where processes that bear `mark` live on for half a minute."""
    deadline = time.monotonic() + ORPHAN_LIMIT_S
    while left := marked_processes(mark):
        if time.monotonic() > deadline:
            raise SystemExit(f"processes outlived the one that was killed: {[command_line(one) for one in left]}")
        time.sleep(0.2)


def command_line(process: psutil.Process) -> str:
    """Its command line; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
