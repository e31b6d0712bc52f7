from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.evaluation import tally as module
from pipeline.evaluation.tally import RankCount, ScoreMeter, Tally, wait_for_scores
from pipeline.exported_metrics import EVALUATE_RATE, EVALUATED_IMAGES
from tests.pipeline.fakes import Told


def test_tally__of_several_workers_one_of_which_began_again() -> None:
    tally = Tally()
    for rank, count in ((0, 3), (1, 5), (0, 4), (1, 1)):
        tally.put(rank, count)
    assert tally.total() == 5


def test_rank_count__is_sent_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    actor = SimpleNamespace(put=SimpleNamespace(remote=lambda *put: sent.append(put)))
    count = RankCount(actor, 2)
    due = iter([True, False, False, True])
    monkeypatch.setattr(count, "_pace", SimpleNamespace(is_due=lambda: next(due)))
    for _ in range(4):
        count.add_one()
    assert sent == [(2, 1), (2, 4)]
    RankCount(None, 0).add_one()


def test_score_meter__tells_rate_and_time_left_from_the_first_count_on() -> None:
    now, lines = [0.0], list[str]()
    told: Any = Told()
    meter = ScoreMeter(told, "val", 48, log=lines.append, clock=lambda: now[0])
    for now[0], done in ((0.0, 0), (20.0, 8), (22.0, 8), (24.0, 24), (27.0, 36)):
        meter.tell(done)
    assert [progress.line() for progress in told.progress] == [
        "0/48 images  0%",
        "8/48 images  16%",
        "8/48 images  16%",
        "24/48 images  50%  4 images/s  ETA 0:06",
        "36/48 images  75%  4 images/s  ETA 0:03",
    ]
    assert lines == [
        "step/one  8/48 images  16%",
        "step/one  36/48 images  75%  4 images/s  ETA 0:03",
    ]
    assert (EVALUATE_RATE, 4.0, {"split": "val"}) in told.exported
    assert [value for metric, value, _ in told.exported if metric is EVALUATED_IMAGES] == [0, 8, 8, 24, 36]


def test_wait_for_scores__results_in_order_and_counts_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = iter([[], ["b"], [], ["a"]])
    totals = iter([2, ray.exceptions.GetTimeoutError("not up"), 5])

    def wait(waiting: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        done = next(ready)
        return done, [one for one in waiting if one not in done]

    def get(what: Any, timeout: float | None = None) -> Any:
        if what != "total":
            return [f"result of {one}" for one in what]
        total = next(totals)
        if isinstance(total, Exception):
            raise total
        return total

    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=wait, get=get, exceptions=ray.exceptions))
    told: Any = Told()
    actor = SimpleNamespace(total=SimpleNamespace(remote=lambda: "total"))
    results = wait_for_scores(["a", "b"], actor, ScoreMeter(told, "val", 8, log=lambda _line: None))
    assert results == ["result of a", "result of b"]
    assert [progress.done for progress in told.progress] == [2, 5]
