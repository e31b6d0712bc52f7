"""How far a running step is: told by the step, kept as one tag on its run, read by whoever follows the flow.

Telling costs the step nothing: the latest word is written by a thread of its own, every few seconds at most, and a
store that does not answer costs the word, never the work. The same figures go to Ray's exporter
(pipeline.workflow.exported).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import AfterValidator, ValidationError

from pipeline.records import Record
from pipeline.workflow import exported
from pipeline.workflow.tracking import MAX_TAG_LENGTH, Tag, Tracking

WRITE_EVERY_S = 3.0
LINE_EVERY_S = 5.0
MAX_TEXT = 160
MAX_PARTS = 16


def _one_line(text: str) -> str:
    # It is shown in terminals: neither line breaks nor escape sequences.
    line = "".join(sign if sign.isprintable() else " " for sign in text)
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."


Line = Annotated[str, AfterValidator(_one_line)]


def _amount(value: float) -> float:
    # A rate over no time, or a loss of nothing, shall not end the work that it is a figure of.
    return max(value, 0.0) if math.isfinite(value) else 0.0


Amount = Annotated[float, AfterValidator(_amount)]


class Part(Record):
    """One of several things that a step does at the same time: a worker, a trial."""

    name: Line
    state: Line
    text: Line = ""


class Progress(Record):
    """How far a step is.

    Attributes:
        done, total: in `unit`, which is a plural: images, steps, trials.
        rate: in `rate_unit` a second; None before it is known.
        rate_unit: `unit` where it is empty.
        seconds_left: as the step expects it; None before it can.
        note: the step's own figures in a few words.
        parts: the latest `MAX_PARTS` at most are kept.
    """

    done: Amount
    total: Amount
    unit: Line
    rate: Amount | None = None
    rate_unit: Line = ""
    seconds_left: Amount | None = None
    note: Line = ""
    parts: tuple[Part, ...] = ()

    @property
    def fraction(self) -> float:
        """Share that is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def line(self) -> str:
        """All but the parts: "120/300 steps  40%  31.2 images/s  ETA 1:05  loss 0.81"."""
        words = [f"{self.done:.10g}/{self.total:.10g} {self.unit}"]
        if self.total:
            words.append(percent_text(self.fraction))
        if self.rate is not None:
            words.append(f"{self.rate:.3g} {self.rate_unit or self.unit}/s")
        if self.seconds_left is not None:
            words.append(f"ETA {eta_text(self.seconds_left)}")
        return "  ".join([*words, self.note] if self.note else words)

    def after(self, seconds: float) -> Self:
        """The same told so long ago: less is left."""
        if self.seconds_left is None:
            return self
        return self.model_copy(update={"seconds_left": max(self.seconds_left - seconds, 0.0)})

    def to_tag(self) -> str:
        """JSON that a tag has room for: of many parts the first."""
        parts = self.parts[:MAX_PARTS]
        while len(text := self.model_copy(update={"parts": parts}).to_json()) > MAX_TAG_LENGTH and parts:
            parts = parts[:-1]
        return text

    @classmethod
    def from_tag(cls, text: str | None) -> Self | None:
        """What `to_tag` wrote; None for what this release cannot read."""
        with suppress(ValidationError):
            return cls.from_json(text) if text else None
        return None


def percent_text(fraction: float) -> str:
    """A share as whole percent; 100 only for all of it."""
    return f"{int(fraction * 100)}%"


def eta_text(seconds: float) -> str:
    """A time to wait, as a clock shows it: 0:07, 12:30, 1:02:03."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


class Pace:
    """Bounds how often something is said: the first time, then `every_s` apart."""

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._last: float | None = None

    def is_due(self) -> bool:
        """Whether it is time; it counts as said then."""
        now = self._clock()
        if self._last is not None and now - self._last < self._every_s:
            return False
        self._last = now
        return True


class TagWriter:
    """Writes the latest of each run's tags in the background; the thread lives while there is something to write."""

    def __init__(self, every_s: float = WRITE_EVERY_S, sleep: Callable[[float], None] = time.sleep) -> None:
        self._every_s, self._sleep = every_s, sleep
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[Tracking, str]] = {}
        self._thread: threading.Thread | None = None

    def put(self, tracking: Tracking, run_id: str, text: str) -> None:
        """Hand over the text; what the run had waiting is forgotten."""
        with self._lock:
            self._waiting[run_id] = (tracking, text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="step-progress", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until all is written."""
        if (thread := self._thread) is not None:
            thread.join()

    def _write(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, {}
                if not batch:
                    self._thread = None
                    return
            for run_id, (tracking, text) in batch.items():
                with suppress(Exception):
                    tracking.set_tags(run_id, {Tag.PROGRESS: text})
            self._sleep(self._every_s)


_writer = TagWriter()


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Where a step tells how far it is; serialisable, so that whatever process knows may tell.

    Attributes:
        run_id: the step's own MLflow run.
        flow, flow_run_id, label: what its figures are tagged with in Ray's exporter.
    """

    tracking: Tracking
    run_id: str
    flow: str
    flow_run_id: str
    label: str

    def tell(self, progress: Progress) -> None:
        """Show the progress to whoever follows the flow; returns at once, raises nothing, may be called often."""
        _writer.put(self.tracking, self.run_id, progress.to_tag())
        unit = {"unit": progress.unit}
        self.export(exported.PROGRESS_DONE, progress.done, unit)
        self.export(exported.PROGRESS_GOAL, progress.total, unit)
        if progress.seconds_left is not None:
            self.export(exported.PROGRESS_SECONDS_LEFT, progress.seconds_left)

    def export(self, metric: exported.Metric, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Record a figure of this step where Ray runs; `tags` beyond flow, run and step."""
        metric.record(value, exported.step_tags(self.flow, self.flow_run_id, self.label) | dict(tags or {}))
