from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config import TuneConfig
from pipeline.tuning.record import (
    SearchRecord,
    TrialRecord,
    TrialScore,
    best_trial,
    max_failed,
    remove_folder,
    rung_steps,
    summaries,
)
from pipeline.workflow.lease import LeaseLost, take_lease

SETTINGS = TuneConfig(num_trials=4)
VALUES = {"loss.dice": 0.5, "model.decoder_layers": 2, "train.augmentation.scale_range": [0.5, 2.0]}


def taken_over(folder: Path) -> SearchRecord:
    return SearchRecord.take_over(str(folder), SETTINGS, take_lease(str(folder / "lease"), "the search"))


def trial(number: int, *mious: float, **changes: object) -> TrialRecord:
    scores = tuple(TrialScore(step=20 * index, miou=miou, order=index) for index, miou in enumerate(mious, 1))
    return TrialRecord(number=number, values=VALUES, scores=scores).model_copy(update=changes)


def test_search_record__what_was_saved_is_loaded_by_any_process(tmp_path: Path) -> None:
    record = taken_over(tmp_path)
    record.save(trial(0, 0.1, 0.123456789012345678, state="finished"))
    record.save(trial(1))
    record.change(1, seconds=2.5, attempts=1)
    loaded = SearchRecord.load(str(tmp_path))
    assert loaded.trials == record.trials
    assert loaded.trials[1].seconds == 2.5
    assert [one.number for one in loaded.in_state("finished")] == [0]
    assert loaded.next_order() == 3
    assert json.loads((tmp_path / "search.json").read_text())["num_trials"] == 4


@pytest.mark.parametrize(
    ("before", "after"), [('"step": 40', '"step": 41'), ('"running"', '"stopped"'), ("{", "["), ('"trial"', '"tiral"')]
)
def test_search_record__changed_byte_makes_the_trial_unknown(tmp_path: Path, before: str, after: str) -> None:
    record = taken_over(tmp_path)
    record.save(trial(0, 0.1, 0.2))
    record.save(trial(1, 0.3))
    file = tmp_path / "0000.json"
    file.write_text(file.read_text().replace(before, after, 1))
    assert list(SearchRecord.load(str(tmp_path)).trials) == [1]


def test_search_record__file_of_another_number_is_not_taken_for_it(tmp_path: Path) -> None:
    taken_over(tmp_path).save(trial(0, 0.1))
    (tmp_path / "0003.json").write_bytes((tmp_path / "0000.json").read_bytes())
    (tmp_path / "0001.json.12345678.partial").write_text("{")
    assert list(taken_over(tmp_path).trials) == [0]
    assert not list(tmp_path.glob("*.partial"))
    assert list(SearchRecord.load(str(tmp_path)).trials) == [0]


def test_search_record__only_the_last_owner_saves(tmp_path: Path) -> None:
    first = taken_over(tmp_path)
    first.save(trial(0))
    second = taken_over(tmp_path)
    with pytest.raises(LeaseLost, match=r"the search was taken over by another process \(lease 2 of \w+, after 1\)"):
        first.save(trial(0, 0.9))
    second.save(trial(0, 0.2))
    assert SearchRecord.load(str(tmp_path)).trials[0].miou == 0.2


def test_best_trial__what_went_further_counts_before_what_scored_higher() -> None:
    stopped = trial(0, 0.9, state="stopped")
    lower, higher, equal = trial(1, 0.1, 0.3), trial(2, 0.1, 0.4), trial(3, 0.2, 0.4)
    failed = trial(4, 0.5, 0.6, 0.7, state="failed")
    assert best_trial([stopped, lower, higher, equal, failed]) is higher
    assert best_trial([stopped, failed]) is stopped
    assert best_trial([failed, trial(5)]) is None


def test_rung_steps__are_those_of_asha() -> None:
    from pipeline.tuning.proposals import Rungs

    tune = TuneConfig(num_trials=2, steps=270, report_every_steps=10, reduction_factor=3)
    assert rung_steps(tune) == [10, 30, 90]
    rungs = Rungs(tune, [])
    stops = []
    for step in range(10, 280, 10):
        rungs.stops(0, step, 0.9)
        # A newcomer that is worse is stopped where it is compared, and nowhere else.
        if rungs.stops(step, step, 0.1):
            stops.append(step)
    assert stops[0] == 10
    assert not rungs.stops(0, 270, 0.0)
    assert rung_steps(TuneConfig(num_trials=2, steps=60, report_every_steps=20)) == [20]


@pytest.mark.parametrize(("fraction", "num_trials", "most"), [(0.3, 2, 1), (0.3, 10, 3), (0.0, 10, 0), (1.0, 4, 4)])
def test_max_failed__is_rounded_up(fraction: float, num_trials: int, most: int) -> None:
    assert max_failed(TuneConfig(num_trials=num_trials, max_failed_fraction=fraction)) == most


def test_summaries__rows_of_trials_json() -> None:
    failed = trial(7, 0.25, state="failed", cause="the loss is nan", seconds=1.23456, attempts=2)
    [row] = summaries([failed])
    assert row.model_dump(mode="json") == {
        "trial_id": "0007",
        "values": VALUES,
        "miou": 0.25,
        "steps": 20,
        "state": "failed",
        "cause": "the loss is nan",
        "seconds": 1.235,
        "attempts": 2,
        "history": [{"step": 20, "miou": 0.25, "order": 1, "stopped": False}],
    }


def test_remove_folder__removes_all_below_and_is_quiet_about_nothing(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    remove_folder(str(tmp_path / "a"))
    remove_folder(str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
