from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import SearchRange, TuneConfig
from pipeline.errors import UserError
from pipeline.tuning.driver import RecordedScheduler, RecordedSearcher, SearchDriver, TooManyFailed, death_cause
from pipeline.tuning.record import SearchRecord, TrialRecord
from pipeline.tuning.search import require_success, retry_failed
from pipeline.workflow.lease import take_lease

CONFIGURED = {"loss.class": 1.0, "loss.focal": 20.0, "loss.dice": 1.0}
SPACE = {
    "loss.class": SearchRange(log_uniform=(0.3, 3.0)),
    "loss.focal": SearchRange(log_uniform=(5.0, 80.0)),
    "loss.dice": SearchRange(log_uniform=(0.3, 3.0)),
}
TUNE = TuneConfig(num_trials=14, steps=6, report_every_steps=1, reduction_factor=2, seed=5, space=SPACE)


class Runs:
    """Stands for the trials' runs in MLflow."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def start(self, trial: TrialRecord) -> None: ...

    def score(self, trial: TrialRecord, score: Any) -> None: ...

    def end(self, trial: TrialRecord) -> None:
        self.ended.append(trial.number)


class Killed(BaseException):
    pass


def open_driver(folder: Path, tune: TuneConfig = TUNE) -> SearchDriver:
    record = SearchRecord.take_over(str(folder), tune, take_lease(str(folder / "lease"), "the search"))
    return SearchDriver(tune, CONFIGURED, record, Runs(), ended=lambda number: None)  # type: ignore[arg-type]


def miou(values: dict[str, float], step: int) -> float:
    return (0.6 - 0.1 * abs(math.log(values["loss.dice"] / 2))) * (1 - math.exp(-step / 3))


def search(driver: SearchDriver, trained: dict[int, int], executed: list[tuple[int, int]]) -> None:
    """Run all trials; `trained` is what their checkpoints hold, `executed` every step that was computed."""
    while (trial := driver.next_trial()) is not None:
        driver.started(trial.number)
        stop = False
        for step in range(1, TUNE.steps + 1):
            if step > trained.get(trial.number, 0):
                executed.append((trial.number, step))
                trained[trial.number] = step
            stop = driver.score(trial.number, step, miou(trial.values, step))
            if stop:
                break


def outcome(folder: Path) -> list[TrialRecord]:
    trials = SearchRecord.load(str(folder)).trials
    return [trials[number].model_copy(update={"seconds": 0.0, "attempts": 0}) for number in sorted(trials)]


def test_search__killed_at_any_write_goes_on_as_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[tuple[int, int]] = []
    search(open_driver(tmp_path / "whole"), {}, whole)
    expected = outcome(tmp_path / "whole")
    assert [trial.number for trial in expected] == list(range(14))
    assert {trial.state for trial in expected} == {"finished", "stopped"}
    save = SearchRecord.save
    calls = 0

    def deadly(self: SearchRecord, trial: TrialRecord) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise Killed
        save(self, trial)
        if calls % 11 == 0:
            raise Killed

    monkeypatch.setattr(SearchRecord, "save", deadly)
    trained: dict[int, int] = {}
    executed: list[tuple[int, int]] = []
    kills = 0
    while True:
        try:
            search(open_driver(tmp_path / "killed"), trained, executed)
            break
        except Killed:
            kills += 1
    assert kills > 12
    assert outcome(tmp_path / "killed") == expected
    # Nothing was computed twice.
    assert executed == whole


def test_search__more_trials_go_on_with_those_that_there_are(tmp_path: Path) -> None:
    whole: list[tuple[int, int]] = []
    search(open_driver(tmp_path / "whole"), {}, whole)
    executed: list[tuple[int, int]] = []
    for num_trials in (5, 14):
        search(open_driver(tmp_path / "more", TUNE.model_copy(update={"num_trials": num_trials})), {}, executed)
        assert len(outcome(tmp_path / "more")) == num_trials
    assert executed == whole
    assert outcome(tmp_path / "more") == outcome(tmp_path / "whole")


def test_driver__scores_told_again_are_neither_recorded_nor_judged_again(tmp_path: Path) -> None:
    driver = open_driver(tmp_path)
    for number, value in ((0, 0.5), (1, 0.1)):
        assert driver.next_trial() is not None
        driver.started(number)
        stopped = driver.score(number, 1, value)
        assert stopped == (number == 1)
        assert driver.score(number, 1, 0.99) == stopped
    assert [score.miou for score in driver.record.trials[1].scores] == [0.1]
    assert driver.record.trials[1].state == "stopped"
    assert driver.runs.ended == [1]  # type: ignore[attr-defined]


def test_driver__failures_up_to_the_limit_are_a_result_beyond_it_the_end(tmp_path: Path) -> None:
    tune = TUNE.model_copy(update={"num_trials": 6, "max_failed_fraction": 0.3})
    driver, stopper = open_driver(tmp_path, tune), None
    stopper = TooManyFailed(driver)
    for number in range(2):
        assert driver.next_trial() is not None
        driver.failed(number, f"cause {number}")
        driver.failed(number, "a later word")
    assert not stopper.stop_all()
    require_success(tune, driver.record.in_state("failed"))
    assert driver.next_trial() is not None
    driver.score(2, 1, 0.4)
    driver.failed(2, "cause 2")
    assert stopper.stop_all()
    assert not stopper("id", {})
    assert driver.next_trial() is None
    assert RecordedSearcher(driver).suggest("id") == "FINISHED"
    message = r"^3 of 6 search trials failed, tune.max_failed_fraction 0.3 allows 2; the first one: trial 0, cause 0$"
    with pytest.raises(UserError, match=message):
        require_success(tune, driver.record.in_state("failed"))
    # The next start tries them again, and keeps what they had reached.
    record = SearchRecord.load(str(tmp_path))
    record.lease = driver.record.lease
    retry_failed(record, tune)
    assert [trial.state for trial in record.trials.values()] == ["running"] * 3
    assert record.trials[2].miou == 0.4
    assert open_driver(tmp_path, tune).num_waiting == 6


def test_retry_failed__few_enough_stay_failed_unless_nothing_else_is_left(tmp_path: Path) -> None:
    tune = TUNE.model_copy(update={"num_trials": 2, "max_failed_fraction": 1.0})
    driver = open_driver(tmp_path, tune)
    for number in range(2):
        assert driver.next_trial() is not None
        driver.failed(number, "no memory")
        if number == 0:
            retry_failed(driver.record, tune)
            assert driver.record.trials[0].state == "failed"
    with pytest.raises(UserError, match=r"^all 2 search trials failed; the first one: trial 0, no memory$"):
        require_success(tune, driver.record.in_state("failed"))
    retry_failed(driver.record, tune)
    assert {trial.state for trial in driver.record.trials.values()} == {"running"}


class TuneTrial:
    def __init__(self, number: int) -> None:
        self.config = {"trial": number}


def test_scheduler__records_what_trials_tell(tmp_path: Path) -> None:
    driver = open_driver(tmp_path)
    scheduler, searcher = RecordedScheduler(driver), RecordedSearcher(driver)
    controller: Any = None

    def tell(number: int, **result: Any) -> str:
        trial: Any = TuneTrial(number)
        return scheduler.on_trial_result(controller, trial, result)

    for number in range(4):
        assert searcher.suggest("any")["trial"] == number
    assert tell(0, step=1.0, val_miou=0.5) == "CONTINUE"
    # Training also reports between validations.
    assert tell(0, step=2.0, val_miou=-1.0) == "CONTINUE"
    assert tell(1, step=1.0, val_miou=0.2) == "STOP"
    assert tell(2, step=0.0, val_miou=-1.0, cause="the loss is nan at step 3") == "CONTINUE"
    for number in (1, 2, 3):
        trial: Any = TuneTrial(number)
        scheduler.on_trial_complete(controller, trial, {})
    states = [(trial.state, trial.steps, trial.cause) for trial in driver.record.trials.values()]
    assert states == [
        ("running", 1, None),
        ("stopped", 1, None),
        ("failed", 0, "the loss is nan at step 3"),
        ("failed", 0, "it ended before its last step"),
    ]
    for step in range(2, 7):
        tell(0, step=float(step), val_miou=0.6)
    assert driver.record.trials[0].state == "finished"


def test_death_cause__is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "error.txt"
    assert death_cause(file) == "its process died"
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\n\tpid: 7\n"
    file.write_text(f"Failure # 1 (occurred at 2026-01-01_00-00-00)\n{died}")
    assert death_cause(file) == "its process died (The actor died unexpectedly before finishing this task.)"
    with file.open("a") as appended:
        appended.write("Failure # 2 (occurred at 2026-01-01_00-01-00)\n\nOut of memory.\nmore\n")
    assert death_cause(file) == "its process died 2 times (Out of memory.)"
