from __future__ import annotations

from typing import Any

from pipeline.config import SearchRange, TuneConfig
from pipeline.exported_metrics import BEST_TRIAL_MIOU, TRIALS
from pipeline.tuning.progress import TrialLog
from pipeline.tuning.record import TrialRecord, TrialScore
from pipeline.workflow.progress import MAX_PARTS, Progress
from tests.pipeline.fakes import Told

TUNE = TuneConfig(num_trials=4, steps=8, report_every_steps=4, space={"loss.dice": SearchRange(log_uniform=(1.0, 6.0))})


def trial(number: int, state: Any = "running", *mious: float, cause: str | None = None) -> TrialRecord:
    scores = tuple(TrialScore(step=4 * (at + 1), miou=miou, order=at) for at, miou in enumerate(mious))
    return TrialRecord(number=number, values={"loss.dice": 1.5 + number}, state=state, scores=scores, cause=cause)


def test_lines__what_happens_to_trials_with_the_best_and_the_time_left() -> None:
    now, lines = [100.0], list[str]()
    # One was there before this start of the search: it tells nothing of the pace.
    trials = {0: trial(0, "finished", 0.2, 0.3)}
    log = TrialLog(TUNE, trials, None, log=lines.append, clock=lambda: now[0])

    def happens(seconds: float, one: TrialRecord, event: str) -> str:
        now[0] = 100.0 + seconds
        trials[one.number] = one
        getattr(log, event)(one)
        return lines.pop()

    best, ended = "  best 0.3000 (trial 0000)", "  1/4 trials ended"
    assert happens(0, trial(1), "started") == f"trial 0001  starts: dice 2.5{best}{ended}"
    assert happens(9, trial(1, "running", 0.35), "scored") == (
        f"trial 0001  step 4/8  mIoU 0.3500{best}{ended}  ETA 0:45"
    )
    # It got further, whatever the other one's score.
    assert happens(20, trial(1, "finished", 0.35, 0.31), "scored") == (
        "trial 0001  finished at step 8/8  mIoU 0.3100  best 0.3100 (trial 0001)  2/4 trials ended  ETA 0:40"
    )
    assert happens(30, trial(2, "stopped", 0.1), "scored") == (
        "trial 0002  stopped at step 4/8  mIoU 0.1000  best 0.3100 (trial 0001)  3/4 trials ended  ETA 0:15"
    )
    assert happens(31, trial(3, "running", 0.2), "started") == (
        "trial 0003  goes on after step 4: dice 4.5  best 0.3100 (trial 0001)  3/4 trials ended  ETA 0:06"
    )
    assert happens(40, trial(3, "failed", cause="out of memory"), "failed") == (
        "trial 0003  failed: out of memory  best 0.3100 (trial 0001)  4/4 trials ended"
    )


def test_progress__running_trials_first_then_the_latest() -> None:
    told: Any = Told()
    trials = {0: trial(0, "finished", 0.2, 0.3), 1: trial(1, "stopped", 0.1), 2: trial(2), 3: trial(3, "running", 0.2)}
    log = TrialLog(TUNE, trials, told, log=lambda _line: None, clock=lambda: 0.0)
    log.scored(trials[3])
    log.passed(2, 3)
    # An older word than the score's is no step back.
    log.passed(3, 2)
    progress: Progress = told.progress[-1]
    assert progress.line() == "2/4 trials  50%  best 0.3000 (trial 0000)"
    assert [(part.name, part.state, part.text) for part in progress.parts] == [
        ("trial 0002", "running", "step 3/8; dice 3.5"),
        ("trial 0003", "running", "step 4/8, mIoU 0.2000; dice 4.5"),
        ("trial 0001", "stopped", "step 4/8, mIoU 0.1000; dice 2.5"),
        ("trial 0000", "finished", "step 8/8, mIoU 0.3000; dice 1.5"),
    ]
    counts = {tags["state"]: value for metric, value, tags in told.exported if metric is TRIALS}
    assert counts == {"running": 2, "finished": 1, "stopped": 1, "failed": 0}
    assert {value for metric, value, _ in told.exported if metric is BEST_TRIAL_MIOU} == {0.3}


def test_progress__of_many_trials_the_latest() -> None:
    told: Any = Told()
    trials = {number: trial(number, "stopped", 0.1) for number in range(40)} | {40: trial(40)}
    tune = TUNE.model_copy(update={"num_trials": 50})
    TrialLog(tune, trials, told, log=lambda _line: None).started(trials[40])
    names = [part.name for part in told.progress[-1].parts]
    assert names == [f"trial {number:04d}" for number in range(40, 40 - MAX_PARTS, -1)]
