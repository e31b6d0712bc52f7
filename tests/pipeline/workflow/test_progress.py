from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.workflow import progress as module
from pipeline.workflow.progress import (
    MAX_PARTS,
    MAX_TEXT,
    Pace,
    Part,
    Progress,
    StepProgress,
    TagWriter,
    eta_text,
    percent_text,
)
from pipeline.workflow.tracking import MAX_TAG_LENGTH, Tag


class Store:
    """Stands for a Tracking; notes what is written, and fails where it is told to."""

    def __init__(self, failing: bool = False) -> None:
        self.written: list[tuple[str, dict[str, str]]] = []
        self.failing = failing
        self.asked = 0

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.asked += 1
        if self.failing:
            raise ConnectionError("no answer")
        self.written.append((run_id, dict(tags)))


def make(**changes: Any) -> Progress:
    return Progress(**{"done": 120, "total": 300, "unit": "steps", **changes})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "120/300 steps  40%"),
        (
            {"rate": 31.21, "rate_unit": "images", "seconds_left": 65.4, "note": "loss 0.81"},
            "120/300 steps  40%  31.2 images/s  ETA 1:05  loss 0.81",
        ),
        ({"rate": 0.5, "seconds_left": 3723}, "120/300 steps  40%  0.5 steps/s  ETA 1:02:03"),
        ({"done": 299.9}, "299.9/300 steps  99%"),
        ({"done": 0, "total": 0}, "0/0 steps"),
        ({"done": 1234567, "total": 10000000}, "1234567/10000000 steps  12%"),
    ],
)
def test_line(changes: dict[str, Any], line: str) -> None:
    assert make(**changes).line() == line


def test_texts__of_shares_and_times() -> None:
    assert [percent_text(share) for share in (0.0, 0.009, 0.999, 1.0)] == ["0%", "0%", "99%", "100%"]
    assert [eta_text(seconds) for seconds in (0.4, 59.6, 3599, 36000)] == ["0:00", "1:00", "59:59", "10:00:00"]


def test_progress__figures_that_are_none_are_nothing() -> None:
    progress = make(done=-1.0, rate=float("inf"), seconds_left=float("nan"))
    assert progress.line() == "0/300 steps  0%  0 steps/s  ETA 0:00"


def test_after__counts_down_but_not_below_nothing() -> None:
    progress = make(seconds_left=10.0)
    assert (progress.after(4).seconds_left, progress.after(11).seconds_left) == (6.0, 0.0)
    assert make().after(4).seconds_left is None


def test_tag__comes_back_as_it_was() -> None:
    parts = (Part(name="worker 0", state="host", text="GPU"), Part(name="worker 1", state="host"))
    progress = make(rate=1.5, note="loss 1", parts=parts)
    assert Progress.from_tag(progress.to_tag()) == progress


def test_tag__of_many_long_parts_fits_its_room() -> None:
    parts = tuple(Part(name=f"trial {number}", state="running", text="ü" * 1000) for number in range(100))
    assert len(parts[0].text) == MAX_TEXT
    text = make(parts=parts).to_tag()
    assert len(text) <= MAX_TAG_LENGTH
    kept = [part["name"] for part in json.loads(text)["parts"]]
    assert 0 < len(kept) < MAX_PARTS
    assert kept == [f"trial {number}" for number in range(len(kept))]
    few = tuple(Part(name=str(number), state="running") for number in range(100))
    assert len(json.loads(make(parts=few).to_tag())["parts"]) == MAX_PARTS


@pytest.mark.parametrize(
    "text", [None, "", "{", "{}", '{"done": "a"}', '{"done": 1, "total": 2, "unit": "x", "new": 3}']
)
def test_tag__that_is_none_is_no_progress(text: str | None) -> None:
    assert Progress.from_tag(text) is None


def test_text__holds_nothing_that_moves_a_terminal() -> None:
    progress = make(note="a\x1b[2Jb\nc", parts=(Part(name="\x07p", state="r\r"),))
    assert progress.note == "a [2Jb c"
    assert (progress.parts[0].name, progress.parts[0].state) == (" p", "r ")


def test_pace__the_first_time_and_then_apart() -> None:
    now = [100.0]
    pace = Pace(5.0, lambda: now[0])
    said = []
    for now[0] in (100.0, 101.0, 104.9, 105.0, 109.0, 120.0):
        said.append(pace.is_due())
    assert said == [True, False, False, True, False, True]


def test_writer__writes_the_latest_once_a_while() -> None:
    store: Any = Store()
    go_on, asleep = threading.Semaphore(0), threading.Semaphore(0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        asleep.release()
        go_on.acquire()

    writer = TagWriter(every_s=3.0, sleep=sleep)
    writer.put(store, "run", "1")
    asleep.acquire()
    for text in ("2", "3", "4"):
        writer.put(store, "run", text)
    writer.put(store, "other", "5")
    go_on.release()
    asleep.acquire()
    go_on.release()
    writer.join()
    tag = Tag.PROGRESS
    assert store.written == [("run", {tag: "1"}), ("run", {tag: "4"}), ("other", {tag: "5"})]
    assert slept == [3.0, 3.0]
    # Its thread has ended, and comes back with the next word.
    go_on.release()
    writer.put(store, "run", "6")
    writer.join()
    assert store.written[-1] == ("run", {tag: "6"})


def test_writer__a_store_that_fails_costs_the_word_alone() -> None:
    broken: Any = Store(failing=True)
    store: Any = Store()
    writer = TagWriter(sleep=lambda _seconds: None)
    writer.put(broken, "run", "1")
    writer.join()
    writer.put(store, "run", "2")
    writer.join()
    assert (broken.asked, store.written) == (1, [("run", {Tag.PROGRESS: "2"})])


def test_step_progress__is_written_on_the_step_s_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = Store()
    writer = TagWriter(sleep=lambda _seconds: None)
    monkeypatch.setattr(module, "_writer", writer)
    StepProgress(store, "step-run", "quick", "flow-run", "prepare").tell(make(note="2/4 shards"))
    writer.join()
    [(run_id, tags)] = store.written
    assert run_id == "step-run"
    assert Progress.from_tag(tags["segvit.progress"]) == make(note="2/4 shards")
