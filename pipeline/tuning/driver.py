"""The search as Ray Tune sees it: a searcher, a scheduler and a stopper that read and write the search's own record.

Ray Tune starts the trials, watches them and stops them. What it keeps itself is thrown away with its session: its
snapshots are pickles, and of no use to another Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune import Callback, Stopper
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.config import TuneConfig
from pipeline.tuning.progress import TrialLog
from pipeline.tuning.proposals import METRIC, STEP, Rungs, propose
from pipeline.tuning.record import SearchRecord, TrialRecord, TrialScore, TrialState, max_failed
from pipeline.tuning.tracking import TrialRuns
from pipeline.tuning.trial import CAUSE, NUMBER, VALUES
from pipeline.workflow.progress import StepProgress
from pipeline.workflow.tracking import MAX_TAG_LENGTH

PROCESS_DIED = "its process died"


class SearchDriver:
    """Proposes, judges and records trials; whatever it decides is on storage before Ray Tune hears of it.

    Args:
        tune: space and budget.
        configured: the values to beat, of every path of the space.
        record: what is known so far, with the right to save.
        runs: the trials' MLflow runs.
        ended: called with the number of each trial that has ended.
        progress: where to tell how far the search is.
    """

    def __init__(
        self,
        tune: TuneConfig,
        configured: Mapping[str, Any],
        record: SearchRecord,
        runs: TrialRuns,
        ended: Callable[[int], None],
        progress: StepProgress | None = None,
    ) -> None:
        self.tune = tune
        self.configured = configured
        self.record = record
        self.runs = runs
        self._ended = ended
        self._log = TrialLog(tune, record.trials, progress)
        self._rungs = Rungs(tune, record.trials.values())
        self._waiting = [
            number
            for number in range(tune.num_trials)
            if number not in record.trials or record.trials[number].state == "running"
        ]
        self._since: dict[int, float] = {}

    @property
    def num_waiting(self) -> int:
        """How many trials have not been started by this driver."""
        return len(self._waiting)

    @property
    def too_many_failed(self) -> bool:
        """Whether more trials have failed than may."""
        return len(self.record.in_state("failed")) > max_failed(self.tune)

    def next_trial(self) -> TrialRecord | None:
        """The next trial to run, the lowest number first: an unfinished one as it is, or a new proposal."""
        if not self._waiting or self.too_many_failed:
            return None
        number = self._waiting.pop(0)
        if number not in self.record.trials:
            values = propose(self.tune, self.configured, list(self.record.trials.values()), number)
            self.record.save(TrialRecord(number=number, values=values))
        return self.record.trials[number]

    def started(self, number: int) -> None:
        """A process for the trial has started."""
        self._since[number] = time.monotonic()
        trial = self.record.change(number, attempts=self.record.trials[number].attempts + 1)
        self.runs.start(trial)
        self._log.started(trial)

    def score(self, number: int, step: int, miou: float) -> bool:
        """Record a score; whether the trial is to stop."""
        trial = self.record.trials[number]
        known = trial.score_at(step)
        if known is not None:
            # A trial that continues from a checkpoint tells its scores again.
            return known.stopped
        stopped = self._rungs.stops(number, step, miou)
        score = TrialScore(step=step, miou=miou, order=self.record.next_order(), stopped=stopped)
        state: TrialState = "finished" if step >= self.tune.steps else "stopped" if stopped else "running"
        trial = self.record.change(number, scores=(*trial.scores, score), seconds=self._seconds(trial), state=state)
        self.runs.score(trial, score)
        self._log.scored(trial)
        if state != "running":
            self._end(trial)
        return stopped

    def passed(self, number: int, step: int) -> None:
        """Note how far a trial is between two scores; nothing depends on it."""
        self._log.passed(number, step)

    def failed(self, number: int, cause: str) -> None:
        """Record a failure, unless the trial had already ended."""
        trial = self.record.trials[number]
        if trial.state == "running":
            cause = cause[:MAX_TAG_LENGTH]
            trial = self.record.change(number, state="failed", cause=cause, seconds=self._seconds(trial))
            self._log.failed(trial)
            self._end(trial)

    def _end(self, trial: TrialRecord) -> None:
        self.runs.end(trial)
        self._ended(trial.number)

    def _seconds(self, trial: TrialRecord) -> float:
        now = time.monotonic()
        begun = self._since.get(trial.number, now)
        self._since[trial.number] = now
        return trial.seconds + now - begun


class RecordedSearcher(Searcher):
    """Hands out the driver's trials."""

    def __init__(self, driver: SearchDriver) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.driver = driver

    def suggest(self, trial_id: str) -> Any:
        """The next trial's number and values."""
        trial = self.driver.next_trial()
        return Searcher.FINISHED if trial is None else {NUMBER: trial.number, VALUES: trial.values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the scheduler has recorded it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record is on storage."""


class RecordedScheduler(FIFOScheduler):
    """Starts trials in their order and stops those that the rungs give up."""

    def __init__(self, driver: SearchDriver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Record a score or a failure, or how far the trial is."""
        number = int(trial.config[NUMBER])
        if CAUSE in result:
            self.driver.failed(number, str(result[CAUSE]))
        elif result[METRIC] < 0:
            self.driver.passed(number, int(result[STEP]))
        elif self.driver.score(number, int(result[STEP]), float(result[METRIC])):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial that ended of itself has told so by its scores; one that has not is a failure."""
        self.driver.failed(int(trial.config[NUMBER]), "it ended before its last step")


class TrialWatch(Callback):
    """Records that trials started, and deaths of their processes."""

    def __init__(self, driver: SearchDriver) -> None:
        self.driver = driver

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Count the attempt."""
        self.driver.started(int(trial.config[NUMBER]))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """All attempts of the trial ended with the death of its process."""
        self.driver.failed(int(trial.config[NUMBER]), death_cause(Path(trial.local_path or "") / "error.txt"))


class TooManyFailed(Stopper):
    """Ends the search once more trials have failed than may."""

    def __init__(self, driver: SearchDriver) -> None:
        self.driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the limit is passed."""
        return self.driver.too_many_failed


def death_cause(error_file: Path) -> str:
    """What Ray says of a dead process, in one line, from the file in which Ray Tune collects a trial's failures."""
    lines = error_file.read_text().splitlines() if error_file.is_file() else []
    heads = [index for index, line in enumerate(lines) if line.startswith("Failure #")]
    said = next((line.strip() for line in lines[heads[-1] + 1 :] if line.strip()), "") if heads else ""
    times = f" {len(heads)} times" if len(heads) > 1 else ""
    return f"{PROCESS_DIED}{times} ({said})" if said else f"{PROCESS_DIED}{times}"


def run_trials(
    driver: SearchDriver,
    trainable: Callable[..., None],
    *,
    resources: dict[str, float],
    trials_at_once: int,
    share_processes: bool,
    session_uri: str,
    session_name: str,
) -> None:
    """Run all trials that wait; `session_uri` and `session_name`: where Ray Tune keeps what it needs meanwhile.

    With `share_processes` a trial takes over the process of one that has ended, its libraries loaded.
    """
    # It tells where its own state lies, which is removed at the end, and of failures, which are told in one line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, resources),
        tune_config=ray.tune.TuneConfig(
            num_samples=driver.num_waiting,
            max_concurrent_trials=trials_at_once,
            reuse_actors=share_processes,
            search_alg=RecordedSearcher(driver),
            scheduler=RecordedScheduler(driver),
        ),
        run_config=ray.tune.RunConfig(
            name=session_name,
            storage_path=session_uri,
            stop=TooManyFailed(driver),
            failure_config=ray.tune.FailureConfig(max_failures=driver.tune.trial_retries),
            callbacks=[TrialWatch(driver)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError:
        # It holds the text of a traceback; where another process has the search, that is all there is to tell.
        driver.record.check_lease()
        raise
