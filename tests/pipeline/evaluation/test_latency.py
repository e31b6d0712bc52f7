from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.evaluation import latency
from pipeline.evaluation.latency import machine_lock, time_prediction

HOLD = """
import sys
from pipeline.evaluation.latency import machine_lock
with machine_lock(alone=sys.argv[1] == "alone") as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this machine may evaluate meanwhile."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(latency, "LOCK_FILE", tmp_path / latency.LOCK_FILE.name)
    monkeypatch.setattr(latency, "QUIET_WAIT_S", 0.0)
    monkeypatch.setattr(latency, "POLL_S", 0.01)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the machine says of its load, and the medians that are measured in turn."""
    says: dict[str, Any] = {"percent": 5.0, "medians": [10.0, 10.5]}
    medians: Iterator[float] = iter(())

    def measure(*_: Any) -> float:
        nonlocal medians
        try:
            return next(medians)
        except StopIteration:
            medians = iter(says["medians"])
            return next(medians)

    monkeypatch.setattr(psutil, "cpu_percent", lambda **_: says["percent"])
    monkeypatch.setattr(latency, "measure_latency", measure)
    monkeypatch.setattr(latency, "MIN_WINDOW_S", 0.0)
    return says


def held_by(kind: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, kind], stdin=-1, stdout=-1, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    return holder


@pytest.mark.parametrize(
    ("holder", "alone", "expected"),
    [("beside", False, True), ("beside", True, False), ("alone", False, False), ("alone", True, False)],
)
def test_machine_lock__timing_is_alone_and_scoring_is_not(holder: str, alone: bool, expected: bool) -> None:
    other = held_by(holder)
    try:
        with machine_lock(alone=alone, wait_s=0.05) as held:
            assert held is expected
    finally:
        other.communicate()
    with machine_lock(alone=True, wait_s=0.05) as held:
        assert held


def test_machine_lock__waits_for_the_one_before() -> None:
    other = held_by("beside")
    threading.Timer(0.3, other.communicate).start()
    with machine_lock(alone=True, wait_s=30) as held:
        assert held


def test_time_prediction__on_a_quiet_machine_is_reliable(machine: dict[str, Any]) -> None:
    assert time_prediction(None, (32, 32), 3, {}) == (10.25, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"percent": 100.0}, {"medians": [10.0, 20.0]}])
def test_time_prediction__beside_other_work_is_not(machine: dict[str, Any], change: dict[str, Any]) -> None:
    machine |= change
    assert not time_prediction(None, (32, 32), 3, {}).reliable  # type: ignore[arg-type]


def test_time_prediction__without_the_lock_is_not(machine: dict[str, Any]) -> None:
    other = held_by("beside")
    try:
        assert time_prediction(None, (32, 32), 3, {}, wait_s=0.05) == (10.25, False)  # type: ignore[arg-type]
    finally:
        other.communicate()


def test_time_prediction__repeats_a_short_run_until_load_can_be_told(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def measure(*given: Any) -> float:
        asked.append(given)
        return 1.0

    monkeypatch.setattr(latency, "measure_latency", measure)
    monkeypatch.setattr(latency, "MIN_WINDOW_S", 0.05)
    time_prediction(None, (32, 48), 5, {"flip": True})  # type: ignore[arg-type]
    assert asked[0] == (None, (32, 48), 3, {"flip": True})
    assert len(asked) > 2
