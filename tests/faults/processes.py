"""The processes that a fault run started, known by a mark in their environment, which their children inherit."""

from __future__ import annotations

import os
import time
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
# Ray's workers import from `tests`, too.
PYTHONPATH = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
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


def require_loopback(mark: str) -> None:
    """Raise SystemExit where a process that bears `mark` listens at an address that other machines can reach."""
    for process in marked_processes(mark):
        try:
            sockets = process.net_connections("inet")
        except psutil.Error:
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN and not _is_loopback(one.laddr.ip):
                raise SystemExit(f"{command_line(process)} listens at {one.laddr.ip}:{one.laddr.port}")


def _is_loopback(address: str) -> bool:
    found = ip_address(address)
    # An IPv6 socket that is bound to an IPv4 address.
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback


def command_line(process: psutil.Process) -> str:
    """Its command line; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
