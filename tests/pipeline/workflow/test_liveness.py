from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.workflow import liveness


class Clock:
    """This machine's monotonic clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(liveness, "time", clock)
    forget(monkeypatch)
    return clock


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that has just begun."""
    monkeypatch.setattr(liveness, "_sightings", {})


def far(beat: int = 3) -> dict[str, str]:
    """Tags of a driver on another machine whose clock is years off."""
    elsewhere = {liveness.HOST_TAG: "elsewhere", liveness.HEARTBEAT_TAG: f"{beat} at 2001-01-01T00:00:00+00:00"}
    return liveness.identity_tags() | elsewhere


def finished_pid() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_why_dead__own_process_lives_whatever_its_heartbeat(clock: Clock) -> None:
    tags = liveness.identity_tags()
    assert liveness.why_dead(tags) is None
    clock.now += 3600
    assert liveness.why_dead(tags) is None


def test_why_dead__process_is_gone() -> None:
    pid = finished_pid()
    assert (
        liveness.why_dead(liveness.identity_tags() | {liveness.PID_TAG: pid}) == f"its driver (process {pid}) is gone"
    )


def test_why_dead__process_id_was_given_to_another() -> None:
    tags = liveness.identity_tags() | {liveness.STARTED_TAG: "1"}
    assert "is another one now" in str(liveness.why_dead(tags))


def test_why_dead__zombie_counts_as_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    try:
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        tags = liveness.identity_tags() | {liveness.PID_TAG: str(process.pid)}
        assert liveness.why_dead(tags) == f"its driver (process {process.pid}) is gone"
    finally:
        process.wait()


@pytest.mark.parametrize("moves", ["boot_time", "create_time"])
def test_is_running__though_the_clock_was_set_meanwhile(monkeypatch: pytest.MonkeyPatch, moves: str) -> None:
    # Linux finds the start of a process an hour later then; macOS finds the boot an hour later.
    tags = liveness.identity_tags()
    create_time, boot_time = psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_time() + 3600)
    if moves == "create_time":
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
    assert liveness.is_running(tags) is True
    assert liveness.is_running(tags | {liveness.STARTED_TAG: "1.00 1.00"}) is False


def test_why_dead__without_proc_a_process_id_in_other_hands_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoProc:
        def __init__(self, *_parts: Any) -> None:
            raise FileNotFoundError("/proc")

    def no_sysctl(*_command: Any, **_options: Any) -> None:
        raise FileNotFoundError("sysctl")

    liveness._boot.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(liveness, "Path", NoProc)
        patch.setattr(subprocess, "run", no_sysctl)
        tags = liveness.identity_tags()
        assert tags[liveness.BOOT_TAG] == "unknown"
        assert liveness.why_dead(tags) is None
        other = tags | {liveness.STARTED_TAG: "1.00 1.00"}
        assert liveness.why_dead(other) == f"its driver is gone (process {os.getpid()} is another one now)"
    liveness._boot.cache_clear()


def test_boot__of_macos_is_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoProc:
        def __init__(self, *_parts: Any) -> None:
            raise FileNotFoundError("/proc")

    def sysctl(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.CompletedProcess(command, 0, "8E3C-41\n", "")

    liveness._boot.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(liveness, "Path", NoProc)
        patch.setattr(subprocess, "run", sysctl)
        assert liveness.process_tags()[liveness.BOOT_TAG] == "8E3C-41"
    liveness._boot.cache_clear()


def test_why_dead__elsewhere_a_beat_that_changes_lives_whatever_its_clock_says(clock: Clock) -> None:
    for beat in range(5):
        assert liveness.why_dead(far(beat)) is None
        clock.now += 250
    assert liveness.why_dead(far(4)) is None


def test_why_dead__elsewhere_a_beat_that_stays_the_same_is_dead(clock: Clock) -> None:
    assert liveness.why_dead(far()) is None
    clock.now += 200
    assert liveness.why_dead(far()) is None
    clock.now += 200
    assert liveness.why_dead(far()) == "its driver on elsewhere has been silent for 400 s"
    # Two drivers have a silence each.
    assert liveness.why_dead(far() | {liveness.PID_TAG: "77"}) is None


def test_why_dead__is_told_at_once_when_an_earlier_process_has_looked(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert liveness.why_dead(far()) is None
    assert liveness.why_dead(far(4)) is None
    clock.now += 400
    forget(monkeypatch)
    assert liveness.why_dead(far()) == "its driver on elsewhere has been silent for 400 s"
    assert liveness.why_dead(far(5)) is None


@pytest.mark.parametrize("reason", ["another boot", "a clock that began anew", "no file"])
def test_why_dead__what_was_noted_before_the_boot_does_not_count(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    assert liveness.why_dead(far()) is None
    clock.now += 400
    forget(monkeypatch)
    file = liveness._sightings_file()
    if reason == "another boot":
        file.write_text(file.read_text().replace(liveness._boot(), "another"))
    elif reason == "a clock that began anew":
        clock.now = 400
    else:
        file.write_text("{}")
    assert liveness.why_dead(far()) is None
    clock.now += 301
    assert liveness.why_dead(far()) == "its driver on elsewhere has been silent for 301 s"


def test_why_dead__same_host_after_a_reboot_counts_by_heartbeat(clock: Clock) -> None:
    before = liveness.identity_tags() | {liveness.BOOT_TAG: "another boot"}
    assert liveness.why_dead(before) is None
    clock.now += 301
    assert liveness.why_dead(before) is not None


def test_why_dead__no_sign_of_life_at_all() -> None:
    assert liveness.why_dead({}) == "its driver on an unknown host never gave a sign of life"
