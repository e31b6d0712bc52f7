"""Signals at any instant of a flow: what is marked is what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.workflow import runs
from pipeline.workflow.driver_watch import FlowTerminated
from pipeline.workflow.flow import Flow
from pipeline.workflow.tracking import RunState, Tag, Tracking

STRIKES = 40


@pytest.fixture
def signals_outside() -> Iterator[list[int]]:
    """The signals that met no flow."""
    met: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, _frame: met.append(number))
    yield met
    for number, handler in before.items():
        signal.signal(number, handler)


def state_of(tracking: Tracking, flow: Flow) -> tuple[str, str | None, str | None]:
    run = tracking.client().get_run(flow.run_id)
    return run.info.status, run.data.tags.get(Tag.STATE), run.data.tags.get(Tag.ERROR)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_flow__that_is_being_marked_as_finished_is_finished(
    tracking: Tracking,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals_outside: list[int],
    number: signal.Signals,
) -> None:
    end_children = runs.end_running_children

    def struck(*arguments: Any) -> None:
        os.kill(os.getpid(), number)
        end_children(*arguments)

    monkeypatch.setattr(runs, "end_running_children", struck)
    flow = Flow(str(tmp_path), tracking, "test")
    with pytest.raises(KeyboardInterrupt) as caught, flow:
        pass
    assert isinstance(caught.value, FlowTerminated) == (number == signal.SIGTERM)
    assert state_of(tracking, flow) == ("FINISHED", "finished", None)
    assert signals_outside == []
    os.kill(os.getpid(), number)
    assert signals_outside == [number]


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_flow__struck_while_its_run_is_created_is_killed(
    tracking: Tracking,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals_outside: list[int],
    number: signal.Signals,
    reason: str,
) -> None:
    create_run = Tracking.create_run

    def struck(self: Tracking, *arguments: Any) -> str:
        run_id = create_run(self, *arguments)
        os.kill(os.getpid(), number)
        return run_id

    monkeypatch.setattr(Tracking, "create_run", struck)
    flow = Flow(str(tmp_path), tracking, "test")
    with pytest.raises(KeyboardInterrupt), flow:
        time.sleep(20)
    assert state_of(tracking, flow) == ("KILLED", "killed", reason)
    assert signals_outside == []


def test_flow__that_cannot_keep_its_configuration_is_failed(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any) -> None:
        raise OSError(28, os.strerror(28), "config.yaml")

    monkeypatch.setattr(Tracking, "log_params", full)
    flow = Flow(str(tmp_path), tracking, "test", {"a": 1})
    with pytest.raises(OSError, match="No space left"), flow:
        pass
    status, state, error = state_of(tracking, flow)
    assert (status, state) == ("FAILED", "failed")
    assert str(error).startswith("the disk is full at config.yaml")


def test_flow__asks_again_when_a_library_has_swallowed_the_request(
    tracking: Tracking, tmp_path: Path, signals_outside: list[int]
) -> None:
    def work() -> None:
        # As a callback of C code does.
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        time.sleep(20)

    flow = Flow(str(tmp_path), tracking, "test")
    with pytest.raises(FlowTerminated, match="terminated"), flow:
        work()
    assert state_of(tracking, flow) == ("KILLED", "killed", "terminated")
    assert signals_outside == []


def test_flow__struck_at_any_instant_is_marked_for_what_it_was(
    tracking: Tracking, tmp_path: Path, signals_outside: list[int]
) -> None:
    with Flow(str(tmp_path), tracking, "warm"):
        pass
    begun = time.monotonic()
    with Flow(str(tmp_path), tracking, "timed", {"a": 1}):
        pass
    seconds = time.monotonic() - begun
    seen: set[str | None] = set()
    for strike in range(STRIKES):
        delay_s = 1.2 * seconds * strike / STRIKES
        kill = f"sleep {delay_s:.4f}; kill -{('TERM', 'INT')[strike % 2]} {os.getpid()}"
        met = len(signals_outside)
        killer = subprocess.Popen(["sh", "-c", kill])
        flow = Flow(str(tmp_path), tracking, "struck", {"a": 1})
        ended = interrupted = False
        try:
            with flow:
                pass
            ended = True
            killer.wait()
        except KeyboardInterrupt:
            interrupted = True
        killer.wait()
        if flow.run_id:
            status, state, _ = state_of(tracking, flow)
            seen.add(state)
            assert (status, state) in (("FINISHED", "finished"), ("KILLED", "killed")), f"struck after {delay_s:.4f} s"
            assert state == RunState.FINISHED or interrupted
        assert interrupted or (ended and len(signals_outside) == met + 1), "the signal was lost"
    assert {"finished", "killed"} <= seen
