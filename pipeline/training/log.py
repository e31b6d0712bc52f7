"""What training tells while it runs: progress lines, the history that checkpoints keep, reports of metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.live import LIVE, worker_figures
from pipeline.training.train_checkpoint import TrainState
from pipeline.workflow.progress import LINE_EVERY_S, Pace, eta_text, percent_text

_ROW_FIGURES = ("step", "total", "learning_rate", "images_per_s", "seconds", "data_wait_share", "mfu")

# Takes metrics of rank 0 and, on rank 0, the folder of a checkpoint when there is one.
Reporter = Callable[[dict[str, Any], Path | None], None]


class TrainingLog:
    """Rank 0 speaks; every rank keeps the same history and reports at the same steps.

    Args:
        report: receives `step`, `val_miou` (-1 where the step was not validated), the step's other metrics, and as
            `earlier` a list of rows that no report has carried yet, and as `live` this worker's figures of now.
        log: prints a line; of training steps one every few seconds, and the last.
        report_every_s: rows wait for the next validation, checkpoint or last step, but no longer than this.
        say_validations: whether validations are printed, too.
        mfu_per_image: what images a second are multiplied by for the model FLOPs utilisation; None: it is left out.
    """

    def __init__(
        self,
        job: TrainJob,
        context: DistributedContext,
        state: TrainState,
        report: Reporter,
        log: Callable[[str], None],
        report_every_s: float,
        say_validations: bool = True,
        mfu_per_image: float | None = None,
    ) -> None:
        self.job, self.context, self.state = job, context, state
        self._mfu_per_image = mfu_per_image
        self._report, self._print, self._report_every_s = report, log, report_every_s
        self._say_validations = say_validations
        self._pace = Pace(LINE_EVERY_S)
        self._seconds_left: float | None = None
        self._waited = self._wait_share = 0.0
        now = time.monotonic()
        self._started = self._log_started = self._reported = now
        self._first_step = self._log_step = state.step
        self._seconds_before = state.train_seconds
        self._validating = 0.0
        self._waiting: list[dict[str, float]] = []
        self._overdue = False

    def stamp(self) -> None:
        """Bring the state's training time up to now."""
        self.state.train_seconds = self._seconds_before + time.monotonic() - self._started

    def waited(self, seconds: float) -> None:
        """Note that a step waited so long for its images."""
        self._waited += seconds

    def log(self, terms: dict[str, Tensor], learning_rate: float) -> None:
        """Take in a step's loss terms of this rank; a collective call."""
        self.stamp()
        now, step, steps = time.monotonic(), self.state.step, self.job.train.steps
        shared, age = _mean_over_ranks(terms, now - self._reported, self.context)
        # One clock decides, so that all ranks report together.
        self._overdue = age >= self._report_every_s
        row = _summed_terms(shared)
        row["learning_rate"] = learning_rate
        row["images_per_s"] = (step - self._log_step) * self.job.train.batch_size / (now - self._log_started)
        row["seconds"] = self.state.train_seconds
        self._wait_share, self._waited = min(self._waited / (now - self._log_started), 1.0), 0.0
        row["data_wait_share"] = self._wait_share
        if self._mfu_per_image is not None:
            row["mfu"] = self._mfu_per_image * row["images_per_s"]
        self._add(row)
        seconds_a_step = (now - self._started - self._validating) / (step - self._first_step)
        self._seconds_left = seconds_a_step * (steps - step)
        if self.context.rank == 0 and (self._pace.is_due() or step == steps):
            self._print(_progress_line(self.job.variant, step, steps, row, self._seconds_left))
        self._log_started, self._log_step = time.monotonic(), step

    def validated(self, scores: dict[str, float], seconds: float) -> None:
        """Take in a validation that took so long: `val_miou` of what is saved, and what it was chosen from."""
        miou = scores["val_miou"]
        self._validating += seconds
        self._log_started += seconds
        self.state.val_miou = miou
        self.state.best_miou = max(self.state.best_miou, miou)
        self._add(scores)
        if self.context.rank == 0 and self._say_validations:
            others = [
                f"{name.removeprefix('val_miou_').replace('_', ' ')} {value:.4f}"
                for name, value in scores.items()
                if name != "val_miou"
            ]
            self._print(
                f"{self.job.variant}  step {self.state.step}/{self.job.train.steps}  val mIoU {miou:.4f}  "
                f"best {self.state.best_miou:.4f}" + (f"  ({', '.join(others)})" if others else "")
            )

    def report(self, *, saved: bool, folder: Path | None) -> None:
        """Report what waits, if this step has a checkpoint or a validation, or the rows have waited long enough."""
        state = self.state
        validated = bool(self._waiting) and "val_miou" in self._waiting[-1]
        if not (saved or validated or self._overdue):
            return
        now = [row for row in self._waiting if row["step"] == state.step]
        earlier = [row for row in self._waiting if row["step"] != state.step]
        # A checkpoint between validations never counts as the best one.
        metrics: dict[str, Any] = {"val_miou": -1.0}
        for row in now:
            metrics |= row
        metrics["step"] = float(state.step)
        if earlier:
            metrics["earlier"] = earlier
        metrics[LIVE] = worker_figures(self.context.device, self._wait_share)
        if self._seconds_left is not None:
            metrics[LIVE]["seconds_left"] = self._seconds_left
        self._waiting.clear()
        self._overdue, self._reported = False, time.monotonic()
        self._report(metrics, folder)

    def _add(self, row: dict[str, float]) -> None:
        row = {"step": self.state.step, **row}
        self.state.history.append(row)
        self._waiting.append(row)


def _mean_over_ranks(
    terms: dict[str, Tensor], age_s: float, context: DistributedContext
) -> tuple[dict[str, float], float]:
    """The terms' means over all ranks, and rank 0's `age_s`."""
    own_age = age_s if context.rank == 0 else 0.0
    values = [value.float() for value in terms.values()]
    stacked = torch.stack([*values, torch.tensor(own_age, device=values[0].device)])
    if context.world_size > 1:
        dist.all_reduce(stacked)
    *sums, age = stacked.tolist()
    return {name: value / context.world_size for name, value in zip(terms, sums, strict=True)}, age


def _summed_terms(terms: dict[str, float]) -> dict[str, float]:
    """The final prediction's terms, all auxiliary ones in one sum, and the total."""
    row = {name: value for name, value in terms.items() if not name.startswith("auxiliary.")}
    auxiliary = [value for name, value in terms.items() if name.startswith("auxiliary.")]
    return row | ({"auxiliary": sum(auxiliary)} if auxiliary else {})


def _progress_line(variant: str, step: int, steps: int, row: dict[str, float], seconds_left: float) -> str:
    # All that is no figure of the row itself is a loss term.
    terms = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in _ROW_FIGURES)
    utilisation = f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
    return (
        f"{variant}  step {step}/{steps} ({percent_text(step / steps)})  loss {row['total']:.3f} ({terms})  "
        f"lr {row['learning_rate']:.1e}  {row['images_per_s']:.1f} images/s{utilisation}  ETA {eta_text(seconds_left)}"
    )
