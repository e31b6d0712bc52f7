"""How many images the workers of an evaluation have scored, for whoever waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from pipeline import exported_metrics
from pipeline.workflow.progress import LINE_EVERY_S, Pace, Progress, StepProgress

COUNT_EVERY_S = 1.0
LOOK_EVERY_S = 2.0
ANSWER_WITHIN_S = 1.0


class Tally:
    """Holds each worker's count; an actor."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def put(self, rank: int, count: int) -> None:
        """A worker has scored so many."""
        self._counts[rank] = count

    def total(self) -> int:
        """What all of them have scored, as far as they told."""
        return sum(self._counts.values())


class RankCount:
    """One worker's count, sent every second at most; nothing waits for it."""

    def __init__(self, tally: Any, rank: int) -> None:
        self._tally, self._rank = tally, rank
        self._count = 0
        self._pace = Pace(COUNT_EVERY_S)

    def add_one(self) -> None:
        """One image more; without a tally nobody is told."""
        self._count += 1
        if self._tally is not None and self._pace.is_due():
            self._tally.put.remote(self._rank, self._count)


class ScoreMeter:
    """Tells how far an evaluation is: to its step, and by a line every few seconds.

    Args:
        step: where to tell it; None: nowhere.
        split: what is scored.
        num_images: of all workers.
    """

    def __init__(
        self,
        step: StepProgress | None,
        split: str,
        num_images: int,
        *,
        log: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step, self._split, self._num_images, self._log, self._clock = step, split, num_images, log, clock
        self._pace = Pace(LINE_EVERY_S, clock)
        self._first: tuple[float, int] | None = None

    def tell(self, done: int) -> None:
        """So many images are scored."""
        if self._step is None:
            return
        now = self._clock()
        rate = None
        # Of the time since the first count: before, the workers started and loaded the model.
        if done and self._first is None:
            self._first = (now, done)
        elif self._first is not None and now > self._first[0] and done > self._first[1]:
            rate = (done - self._first[1]) / (now - self._first[0])
        progress = Progress(
            done=done,
            total=self._num_images,
            unit="images",
            rate=rate,
            seconds_left=(self._num_images - done) / rate if rate else None,
        )
        split = {"split": self._split}
        self._step.export(exported_metrics.EVALUATED_IMAGES, done, split)
        if rate is not None:
            self._step.export(exported_metrics.EVALUATE_RATE, rate, split)
        self._step.tell(progress)
        if done and self._pace.is_due():
            self._log(f"{self._step.label}  {progress.line()}")


def wait_for_scores(parts: Sequence[Any], tally: Any, meter: ScoreMeter) -> list[Any]:
    """The results of the tasks `parts`, in order, telling meanwhile how far they are; raises what a task raised."""
    waiting, results = list(parts), dict[Any, Any]()
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK_EVERY_S)
        # The first one that fails ends it.
        results |= zip(done, ray.get(done), strict=True)
        if waiting and (count := _total(tally)) is not None:
            meter.tell(count)
    return [results[part] for part in parts]


def _total(tally: Any) -> int | None:
    try:
        return int(ray.get(tally.total.remote(), timeout=ANSWER_WITHIN_S))
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        # Not up yet, or lost; only the figure depends on it.
        return None
