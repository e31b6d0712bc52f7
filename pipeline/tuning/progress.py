"""A search's trials while they run: a line for each thing that happens to one, and the search's progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pipeline import exported_metrics
from pipeline.config import TuneConfig
from pipeline.tuning.record import TrialRecord, best_trial, trial_name
from pipeline.tuning.space import values_text
from pipeline.workflow.progress import MAX_PARTS, Part, Progress, StepProgress, eta_text

STATES = ("running", "finished", "stopped", "failed")


class TrialLog:
    """Prints what happens to trials and tells the step how far the search is.

    Args:
        tune: the budget.
        trials: the record's own, by number; it changes meanwhile.
        step: where to tell the progress; None: nowhere.
        log: prints a line.
    """

    def __init__(
        self,
        tune: TuneConfig,
        trials: Mapping[int, TrialRecord],
        step: StepProgress | None,
        *,
        log: Callable[[str], None] = lambda line: print(line, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tune, self._trials, self._step, self._log, self._clock = tune, trials, step, log, clock
        self._steps: dict[int, int] = {}
        self._begun = clock()
        self._kept = self._trials_done()

    def started(self, trial: TrialRecord) -> None:
        """A process for the trial has started; a trial that was interrupted starts again."""
        again = f"goes on after step {trial.steps}" if trial.steps else "starts"
        self._say(trial, f"{again}: {values_text(trial.values)}")

    def passed(self, number: int, step: int) -> None:
        """A trial has come so far, without a score; no line says so, for the trial prints its own."""
        self._steps[number] = step
        self._tell(self._seconds_left())

    def scored(self, trial: TrialRecord) -> None:
        """It was validated, and is finished or stopped or goes on."""
        at = f"step {trial.steps}/{self._tune.steps}"
        words = {"running": at, "finished": f"finished at {at}", "stopped": f"stopped at {at}"}[trial.state]
        self._say(trial, f"{words}  mIoU {trial.miou or 0.0:.4f}")

    def failed(self, trial: TrialRecord) -> None:
        """It failed."""
        self._say(trial, f"failed: {trial.cause}")

    def _say(self, trial: TrialRecord, text: str) -> None:
        words = [f"trial {trial_name(trial.number)}  {text}"]
        if best := self._best_text():
            words.append(best)
        words.append(f"{self._num_ended()}/{self._tune.num_trials} trials ended")
        left = self._seconds_left()
        if left:
            words.append(f"ETA {eta_text(left)}")
        self._log("  ".join(words))
        self._tell(left)

    def _tell(self, seconds_left: float | None) -> None:
        if self._step is None:
            return
        best = best_trial(self._trials.values())
        self._step.tell(
            Progress(
                done=self._num_ended(),
                total=self._tune.num_trials,
                unit="trials",
                seconds_left=seconds_left,
                note=self._best_text(),
                parts=self._parts(),
            )
        )
        for state in STATES:
            count = sum(trial.state == state for trial in self._trials.values())
            self._step.export(exported_metrics.TRIALS, count, {"state": state})
        if best is not None and best.miou is not None:
            self._step.export(exported_metrics.BEST_TRIAL_MIOU, best.miou)

    def _parts(self) -> tuple[Part, ...]:
        """Those that run, then the others, the latest first."""
        running = [trial for trial in self._trials.values() if trial.state == "running"]
        ended = [trial for trial in self._trials.values() if trial.state != "running"]
        latest = sorted(ended, key=lambda trial: -trial.number)
        ordered = [*sorted(running, key=lambda trial: trial.number), *latest]
        return tuple(
            Part(name=f"trial {trial_name(trial.number)}", state=trial.state, text=self._part_text(trial))
            for trial in ordered[:MAX_PARTS]
        )

    def _part_text(self, trial: TrialRecord) -> str:
        score = f", mIoU {trial.miou:.4f}" if trial.miou is not None else ""
        return f"step {self._step_of(trial)}/{self._tune.steps}{score}; {values_text(trial.values)}"

    def _best_text(self) -> str:
        best = best_trial(self._trials.values())
        return f"best {best.miou:.4f} (trial {trial_name(best.number)})" if best and best.miou is not None else ""

    def _num_ended(self) -> int:
        return sum(trial.state != "running" for trial in self._trials.values())

    def _seconds_left(self) -> float | None:
        """At the pace of this start of the search; None before it has come anywhere."""
        done, seconds = self._trials_done(), self._clock() - self._begun
        if done <= self._kept or not seconds:
            return None
        return (self._tune.num_trials - done) * seconds / (done - self._kept)

    def _trials_done(self) -> float:
        """Those that ended, however early, and the shares of those that run."""
        running = [trial for trial in self._trials.values() if trial.state == "running"]
        return self._num_ended() + sum(self._step_of(trial) / self._tune.steps for trial in running)

    def _step_of(self, trial: TrialRecord) -> int:
        return max(trial.steps, self._steps.get(trial.number, 0) if trial.state == "running" else 0)
