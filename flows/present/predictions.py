"""Predictions as they come: a line an image, progress with the time that is left, sums."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console

from flows.present.runs import duration
from pipeline.evaluation.predict import FailedImage, Prediction, PredictionPlan

PROGRESS_EVERY_S = 5.0


class PredictionLog:
    """Predictions go to the console, failures and progress to standard error; keeps both for `facts`."""

    def __init__(self, console: Console, plan: PredictionPlan) -> None:
        self._console = console
        self._plan = plan
        self._num_remaining = len(plan.remaining)
        self._start = self._told = time.monotonic()
        self._predicted: list[Prediction] = []
        self.failed: list[FailedImage] = []
        for image in plan.failed:
            self._fail(image)

    def add(self, one: Prediction | FailedImage) -> None:
        """Tell of one image, and from time to time how far the work is."""
        if isinstance(one, FailedImage):
            self._fail(one)
        else:
            self._predicted.append(one)
            shares = ", ".join(f"{label} {share:.1%}" for label, share in one.classes.items())
            self._console.print(f"{one.overlay or one.labels}  {shares}", markup=False, soft_wrap=True)
        if time.monotonic() - self._told >= PROGRESS_EVERY_S:
            self._told = time.monotonic()
            print(self.progress(self._told - self._start), file=sys.stderr, flush=True)

    def progress(self, seconds: float) -> str:
        """How far the work is after so many seconds, and how long the rest takes at this rate."""
        num_done = len(self._predicted) + len(self.failed) - len(self._plan.failed)
        left = duration(seconds / num_done * (self._num_remaining - num_done)) if num_done else "unknown"
        rate = f"{num_done / seconds:.2g} images/s"
        return f"{num_done} of {self._num_remaining} images, {len(self.failed)} failed, {rate}, {left} left"

    def end(self) -> None:
        """Tell the sums."""
        parts = [f"{len(self._predicted)} predicted", f"{len(self.failed)} failed"]
        if self._plan.done:
            parts.insert(1, f"{len(self._plan.done)} skipped, which exist")
        print(f"images: {', '.join(parts)}", file=sys.stderr)

    def facts(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "predicted": [one.model_dump(mode="json") for one in self._predicted],
            "skipped": [task.image.uri for task in self._plan.done],
            "failed": [one.model_dump(mode="json") for one in self.failed],
        }

    def _fail(self, image: FailedImage) -> None:
        self.failed.append(image)
        print(f"failed: {image.image} {image.reason}", file=sys.stderr)
