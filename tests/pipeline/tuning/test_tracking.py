from __future__ import annotations

from typing import Any

import pytest

from pipeline.tuning.record import TrialRecord, TrialScore
from pipeline.tuning.tracking import TrialRuns
from pipeline.workflow import runs
from pipeline.workflow.tracking import RunState, Tracking

VALUES = {"loss.dice": 0.5, "model.decoder_layers": 2, "train.augmentation.scale_range": [0.5, 2.0]}


def step_run(tracking: Tracking) -> str:
    return str(tracking.client().create_run(tracking.experiment_id()).info.run_id)


def trial(number: int, count: int, **changes: Any) -> TrialRecord:
    scores = tuple(TrialScore(step=10 * index, miou=index / 10, order=index) for index in range(1, count + 1))
    return TrialRecord(number=number, values=VALUES, scores=scores).model_copy(update=changes)


def logged(tracking: Tracking) -> list[Any]:
    return list(tracking.runs("tags.`segvit.kind` = 'trial'", order_by="attributes.start_time ASC"))


def test_trial_runs__a_restored_search_goes_on_in_the_same_runs(tracking: Tracking) -> None:
    first_step, second_step = step_run(tracking), step_run(tracking)
    first = TrialRuns(tracking, first_step, "search")
    for number in (0, 1):
        first.start(trial(number, 0))
        first.score(trial(number, 1), trial(number, 1).scores[0])
    first.end(trial(0, 1, state="stopped"))
    # The driver dies; the next flow marks what it left.
    runs.end_running_children(tracking, first_step, RunState.ABANDONED, "its driver is gone")
    assert [run.info.status for run in logged(tracking)] == ["FINISHED", "KILLED"]
    second = TrialRuns(tracking, second_step, "search")
    second.settle([trial(0, 1, state="stopped"), trial(1, 1)])
    second.start(trial(1, 1))
    [ended, running] = logged(tracking)
    assert (running.info.status, running.data.tags["segvit.state"]) == ("RUNNING", "running")
    assert running.data.tags["segvit.error"] == ""
    second.score(trial(1, 2), trial(1, 2).scores[1])
    second.end(trial(1, 2, state="finished"))
    [ended, finished] = logged(tracking)
    assert [run.info.status for run in (ended, finished)] == ["FINISHED", "FINISHED"]
    assert [run.data.tags["segvit.state"] for run in (ended, finished)] == ["stopped", "finished"]
    assert {run.data.tags["mlflow.parentRunId"] for run in (ended, finished)} == {second_step}
    history = tracking.client().get_metric_history(finished.info.run_id, "val_miou")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.1), (20, 0.2)]
    assert finished.data.params == {name: str(value) for name, value in VALUES.items()}


def test_trial_runs__settle_makes_up_for_a_store_that_was_away(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = TrialRuns(tracking, step_run(tracking), "search")
    failed = trial(3, 2, state="failed", cause="the loss is nan at step 21")
    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "client", lambda self: (_ for _ in ()).throw(ConnectionError("no answer")))
        search.start(trial(3, 0))
        search.score(trial(3, 1), trial(3, 1).scores[0])
        search.end(failed)
    assert logged(tracking) == []
    for _ in range(2):
        search.settle([failed])
        [run] = logged(tracking)
        assert (run.info.status, run.data.tags["segvit.state"]) == ("FAILED", "failed")
        assert run.data.tags["segvit.error"] == "the loss is nan at step 21"
        assert len(tracking.client().get_metric_history(run.info.run_id, "val_miou")) == 2
    with monkeypatch.context() as patch:
        # All is as it should be: one look, nothing written.
        patch.setattr(search, "end", lambda trial: pytest.fail("written again"))
        search.settle([failed])


def test_trial_runs__a_run_that_is_there_twice_is_removed(tracking: Tracking) -> None:
    parent = step_run(tracking)
    TrialRuns(tracking, parent, "search").start(trial(0, 0))
    TrialRuns(tracking, parent, "other search").start(trial(0, 0))
    [kept, other] = logged(tracking)
    client = tracking.client()
    client.create_run(tracking.experiment_id(), tags=kept.data.tags)
    TrialRuns(tracking, parent, "search").settle([trial(0, 1, state="finished")])
    assert {run.info.run_id for run in logged(tracking)} == {kept.info.run_id, other.info.run_id}
    assert client.get_run(kept.info.run_id).info.status == "FINISHED"
