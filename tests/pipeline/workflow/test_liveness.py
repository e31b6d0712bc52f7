from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

from pipeline.workflow import liveness


def finished_pid() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_why_dead__own_process_lives_whatever_its_heartbeat() -> None:
    tags = liveness.identity_tags() | {liveness.HEARTBEAT_TAG: "2001-01-01T00:00:00+00:00"}
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
        assert process.stdout is None
        while liveness._stat(process.pid)[:1] != ["Z"]:
            pass
        tags = liveness.identity_tags() | {liveness.PID_TAG: str(process.pid)}
        assert liveness.why_dead(tags) == f"its driver (process {process.pid}) is gone"
    finally:
        process.wait()


def test_why_dead__other_host_counts_by_heartbeat() -> None:
    def tags(silent: timedelta) -> dict[str, str]:
        beat = (datetime.now(UTC) - silent).isoformat(timespec="seconds")
        return liveness.identity_tags() | {liveness.HOST_TAG: "elsewhere", liveness.HEARTBEAT_TAG: beat}

    assert liveness.why_dead(tags(timedelta(seconds=200))) is None
    assert str(liveness.why_dead(tags(timedelta(seconds=400)))).startswith(
        "its driver on elsewhere has been silent for 40"
    )


def test_why_dead__same_host_after_a_reboot_counts_by_heartbeat() -> None:
    fresh = liveness.identity_tags() | {liveness.BOOT_TAG: "another boot"}
    assert liveness.why_dead(fresh) is None
    assert liveness.why_dead(fresh | {liveness.HEARTBEAT_TAG: "2001-01-01T00:00:00+00:00"}) is not None


def test_why_dead__no_sign_of_life_at_all() -> None:
    assert liveness.why_dead({}) == "its driver on an unknown host never gave a sign of life"
