from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.evaluation import latency
from pipeline.evaluation.latency import machine_lock, time_prediction


@pytest.fixture(autouse=True)
def own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this machine may evaluate meanwhile."""
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


@pytest.mark.parametrize(
    ("holder_alone", "alone", "expected"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, False)],
)
def test_machine_lock__timing_is_alone_and_scoring_is_not(holder_alone: bool, alone: bool, expected: bool) -> None:
    with machine_lock(alone=holder_alone) as first, machine_lock(alone=alone, wait_s=0.05) as held:
        assert (first, held) == (True, expected)
    with machine_lock(alone=True, wait_s=0.05) as held:
        assert held


def test_machine_lock__waits_for_the_one_before() -> None:
    before = ExitStack()
    before.enter_context(machine_lock(alone=False))
    threading.Timer(0.3, before.close).start()
    with machine_lock(alone=True, wait_s=30) as held:
        assert held


def test_time_prediction__on_a_quiet_machine_is_reliable(machine: dict[str, Any]) -> None:
    assert time_prediction(None, (32, 32), 3, {}) == (10.25, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"percent": 100.0}, {"medians": [10.0, 20.0]}])
def test_time_prediction__beside_other_work_is_not(machine: dict[str, Any], change: dict[str, Any]) -> None:
    machine |= change
    assert not time_prediction(None, (32, 32), 3, {}).reliable  # type: ignore[arg-type]


def test_time_prediction__without_the_lock_is_not(machine: dict[str, Any]) -> None:
    with machine_lock(alone=False):
        assert time_prediction(None, (32, 32), 3, {}, wait_s=0.05) == (10.25, False)  # type: ignore[arg-type]


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
