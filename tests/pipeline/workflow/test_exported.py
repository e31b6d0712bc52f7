from __future__ import annotations

import subprocess
import sys
import threading
from types import ModuleType
from typing import Any, ClassVar

import pytest

from pipeline.workflow import exported
from pipeline.workflow.exported import GaugeHolder, Metric, record_step
from pipeline.workflow.tracking import RunState

TAGS = {"flow": "quick", "run": "0123456789ab", "step": "train/full"}


class Instrument:
    """Stands for Ray's gauges and counters."""

    made: ClassVar[list[Instrument]] = []

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.description, self.tag_keys = name, description, tag_keys
        self.values: list[tuple[float, dict[str, str]]] = []
        Instrument.made.append(self)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.values.append((value, tags))

    inc = set


class Ray(ModuleType):
    running = True

    def is_initialized(self) -> bool:
        return self.running


class Holder:
    def __init__(self) -> None:
        self.held: list[tuple[str, float]] = []

    def hold(self, metric: Metric, value: float, tags: Any) -> None:
        self.held.append((metric.name, value))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    fake, util, metrics = Ray("ray"), ModuleType("ray.util"), ModuleType("ray.util.metrics")
    vars(metrics).update(Gauge=Instrument, Counter=Instrument)
    vars(util).update(metrics=metrics)
    for name, module in (("ray", fake), ("ray.util", util), ("ray.util.metrics", metrics)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(exported, "_instruments", {})
    monkeypatch.setattr(exported, "_holder", Holder())
    monkeypatch.setattr(Instrument, "made", [])
    return fake


def test_record__without_ray_imports_nothing() -> None:
    code = (
        "import sys; from pipeline.workflow.exported import STEPS; STEPS.record(1, {}); "
        "import pipeline.exported_metrics; print([name for name in ('ray', 'mlflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_record__where_ray_does_not_run_makes_no_instrument(ray: Ray) -> None:
    ray.running = False
    exported.STEPS.record(1, TAGS | {"state": "done"})
    assert Instrument.made == []


def test_record__gauges_are_set_and_held_counters_add_up(ray: Ray) -> None:
    gauge, counter = Metric("a_gauge", "gauge", "A gauge."), Metric("a_counter", "counter", "Counts.", ("split",))
    for value in (0.0, 2.5):
        gauge.record(value, TAGS)
        counter.record(value, {"split": "val"})
    first, second = Instrument.made
    assert (first.name, first.description, first.tag_keys) == ("a_gauge", "A gauge.", ("flow", "run", "step"))
    assert first.values == [(0.0, TAGS), (2.5, TAGS)]
    assert second.values == [(2.5, {"split": "val"})]
    assert exported._holder.held == [("a_gauge", 0.0), ("a_gauge", 2.5)]  # type: ignore[attr-defined]
    assert (gauge.series, counter.series) == ("ray_a_gauge", "ray_a_counter_total")


def test_record__a_failure_of_the_exporter_stays_there(ray: Ray) -> None:
    gauge = Metric("a_gauge", "gauge", "A gauge.")
    gauge.record(1.0, {"unknown": "tag"})
    gauge.record(2.0, TAGS)
    assert Instrument.made[0].values == [(2.0, TAGS)]


def test_record_step__running_then_how_it_ended(ray: Ray) -> None:
    for state, seconds in ((RunState.RUNNING, 0.0), (RunState.DONE, 12.5)):
        record_step("quick", "0123456789abcdef", "train/full", state, seconds)
    record_step("quick", "0123456789abcdef", "prepare", RunState.REUSED, 0.0)
    values = {instrument.name: instrument.values for instrument in Instrument.made}
    prepare = TAGS | {"step": "prepare"}
    assert values == {
        "segvit_step_running": [(1.0, TAGS), (0.0, TAGS), (0.0, prepare)],
        "segvit_steps": [(1, TAGS | {"state": "done"}), (1, prepare | {"state": "reused"})],
        "segvit_step_seconds": [(12.5, TAGS)],
    }


def test_holder__sets_again_until_its_time_or_ray_s_is_over(ray: Ray) -> None:
    now, rounds = [0.0], threading.Semaphore(0)
    done = threading.Semaphore(0)

    def sleep(seconds: float) -> None:
        done.release()
        rounds.acquire()
        now[0] += seconds

    def wait_rounds(count: int) -> None:
        for _ in range(count):
            rounds.release()
            done.acquire()

    short = Metric("short", "gauge", "Held for two rounds.", hold_s=11.0)
    long = Metric("long", "gauge", "Held as long as Ray runs.", hold_s=float("inf"))
    holder = GaugeHolder(sleep, lambda: now[0])
    holder.hold(short, 1.0, TAGS)
    holder.hold(long, 2.0, TAGS)
    done.acquire()
    wait_rounds(2)
    holder.hold(long, 3.0, TAGS)
    wait_rounds(2)
    ray.running = False
    rounds.release()
    holder.join()
    values = {instrument.name: [value for value, _ in instrument.values] for instrument in Instrument.made}
    assert values == {"short": [1.0, 1.0], "long": [2.0, 2.0, 3.0, 3.0]}
