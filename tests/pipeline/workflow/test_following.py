from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.workflow import following, runs
from pipeline.workflow.following import Look, follow_run
from pipeline.workflow.progress import Progress
from pipeline.workflow.runs import run_tree
from pipeline.workflow.tracking import RunState, Tag, Tracking
from tests.pipeline.workflow.test_runs import make_flow, make_step

HALF = Progress(done=3, total=6, unit="images", note="half")


def test_follow_run__until_it_has_ended_with_progress_while_a_step_runs(tracking: Tracking) -> None:
    flow = make_flow(tracking)
    step = make_step(tracking, flow, "prepare")
    seen: list[Look] = []

    def meanwhile(seconds: float) -> None:
        assert seconds == 7.0
        if len(seen) == 1:
            tracking.set_tags(step, {Tag.PROGRESS: HALF.to_tag()})
        elif len(seen) == 2:
            tracking.end_run(step, "FINISHED", {Tag.STATE: RunState.DONE})
        else:
            tracking.end_run(flow, "FINISHED", {Tag.STATE: RunState.FINISHED})

    for look in follow_run(tracking, flow[:20], every_s=7.0, sleep=meanwhile):
        seen.append(look)
    shown = [(look.tree.run.state, look.tree.steps[0].state, look.tree.steps[0].progress) for look in seen]
    assert shown == [
        (RunState.RUNNING, RunState.RUNNING, None),
        (RunState.RUNNING, RunState.RUNNING, HALF),
        (RunState.RUNNING, RunState.DONE, None),
        (RunState.FINISHED, RunState.DONE, None),
    ]
    assert run_tree(tracking, flow).steps[0].progress is None


def test_follow_run__one_that_has_ended_is_looked_at_once(tracking: Tracking) -> None:
    flow = make_flow(tracking)
    tracking.end_run(flow, "FAILED", {Tag.STATE: RunState.FAILED, Tag.ERROR: "train: boom"})
    [look] = follow_run(tracking, "latest", sleep=lambda _seconds: pytest.fail("nothing to wait for"))
    assert (look.tree.run.state, look.tree.run.error) == (RunState.FAILED, "train: boom")


def test_follow_run__no_such_run_is_a_mistake(tracking: Tracking) -> None:
    with pytest.raises(UserError, match="no run 'abc'"):
        next(follow_run(tracking, "abc"))


def test_follow_run__a_silent_store_is_asked_again(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_flow(tracking)
    looks: list[Look] = []
    tree_of: Any = runs.tree_of

    def broken(*_: Any) -> Any:
        raise ConnectionError("reset by peer")

    def meanwhile(_seconds: float) -> None:
        if len(looks) == 1:
            monkeypatch.setattr(following, "tree_of", broken)
        else:
            monkeypatch.setattr(following, "tree_of", tree_of)
            tracking.end_run(flow, "FINISHED", {Tag.STATE: RunState.FINISHED})

    for look in follow_run(tracking, flow, sleep=meanwhile):
        looks.append(look)
    assert [look.silence for look in looks] == [None, "ConnectionError: reset by peer", None]
    assert [look.tree.run.state.value for look in looks] == ["running", "running", "finished"]
