"""Figures for Prometheus, through the exporter that every Ray node has; nothing where Ray does not run.

Ray puts `ray_` before each name, and `_total` behind a counter's. Instruments are made when they are first used in a
process that Ray knows; without Ray a record costs a look-up, and no import. Ray drops a gauge that was not set for two
of its export intervals, so that what is told less often is set again meanwhile.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.workflow.tracking import RunState

STEP_TAGS = ("flow", "run", "step")
SET_AGAIN_S = 5.0
HOLD_S = 300.0

_instruments: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure by name.

    Attributes:
        kind: a gauge has a value, a counter adds up.
        tags: the labels that each record has to give.
        hold_s: how long a gauge keeps a value that is not told anew, in a process that lives so long.
    """

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    tags: tuple[str, ...] = STEP_TAGS
    hold_s: float = HOLD_S

    @property
    def series(self) -> str:
        """Its name as Prometheus sees it."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"

    def record(self, value: float, tags: Mapping[str, str]) -> None:
        """Set the gauge or add to the counter; a figure that cannot be recorded is lost, and nothing else."""
        try:
            if not _ray_runs():
                return
            if self.kind == "gauge":
                self.set(value, tags)
                _holder.hold(self, value, tags)
            elif value > 0:
                self._instrument().inc(value, dict(tags))
        except Exception:
            # Ray may be half-way down; a figure is not worth a step.
            return

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        """Set the gauge, once; raises what Ray does."""
        self._instrument().set(value, dict(tags))

    def _instrument(self) -> Any:
        return _instruments.get(self.name) or self._make()

    def _make(self) -> Any:
        from ray.util import metrics

        kind = metrics.Gauge if self.kind == "gauge" else metrics.Counter
        _instruments[self.name] = kind(self.name, description=self.description, tag_keys=self.tags)
        return _instruments[self.name]


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


class GaugeHolder:
    """Sets gauges again as long as they hold; the thread lives while there is one, and Ray."""

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()
        self._held: dict[tuple[Any, ...], tuple[Metric, float, dict[str, str], float]] = {}
        self._thread: threading.Thread | None = None

    def hold(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Keep the gauge at the value."""
        key = (metric.name, *sorted(tags.items()))
        with self._lock:
            self._held[key] = (metric, value, dict(tags), self._clock() + metric.hold_s)
            if self._thread is None:
                self._thread = threading.Thread(target=self._set_again, name="gauges", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until nothing is held."""
        if (thread := self._thread) is not None:
            thread.join()

    def _set_again(self) -> None:
        while True:
            self._sleep(SET_AGAIN_S)
            with self._lock:
                now = self._clock()
                running = _ray_runs()
                self._held = {key: held for key, held in self._held.items() if running and held[3] > now}
                held = list(self._held.values())
                if not held:
                    self._thread = None
                    return
            for metric, value, tags, _ in held:
                try:
                    metric.set(value, tags)
                except Exception:
                    # As with the first time.
                    break


_holder = GaugeHolder()

# The driver lives as long as its flow.
STEP_RUNNING = Metric("segvit_step_running", "gauge", "1 while the step runs, else 0.", hold_s=math.inf)
STEP_SECONDS = Metric("segvit_step_seconds", "gauge", "How long the step took, if it was executed.", hold_s=math.inf)
STEPS = Metric("segvit_steps", "counter", "Steps that ended, by state.", (*STEP_TAGS, "state"))
PROGRESS_DONE = Metric("segvit_progress_done", "gauge", "How much of a running step is done.", (*STEP_TAGS, "unit"))
PROGRESS_GOAL = Metric("segvit_progress_goal", "gauge", "How much a running step has to do.", (*STEP_TAGS, "unit"))
PROGRESS_SECONDS_LEFT = Metric("segvit_progress_seconds_left", "gauge", "The time that the step expects to need still.")

STEP_METRICS = (STEP_RUNNING, STEP_SECONDS, STEPS, PROGRESS_DONE, PROGRESS_GOAL, PROGRESS_SECONDS_LEFT)


def step_tags(flow: str, flow_run_id: str, label: str) -> dict[str, str]:
    """The tags of a step's figures: `run` as far as people write it."""
    return {"flow": flow, "run": flow_run_id[:12], "step": label}


def record_step(flow: str, flow_run_id: str, label: str, state: RunState, seconds: float) -> None:
    """Record that a step starts (RUNNING) or how it ended."""
    tags = step_tags(flow, flow_run_id, label)
    STEP_RUNNING.record(float(state == RunState.RUNNING), tags)
    if state == RunState.RUNNING:
        return
    STEPS.record(1, tags | {"state": state.value})
    if seconds > 0:
        STEP_SECONDS.record(seconds, tags)
