from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

import pytest

from pipeline.errors import UserError
from pipeline.workflow import liveness, runs
from pipeline.workflow.tracking import RECORD_FILE, RunState, Tag, Tracking


def make_flow(tracking: Tracking, tags: Mapping[str, str] | None = None) -> str:
    default = {Tag.KIND: "flow", Tag.FLOW: "quick", Tag.STATE: RunState.RUNNING.value, **liveness.identity_tags()}
    run = tracking.client().create_run(tracking.experiment_id(), run_name="quick", tags=default | dict(tags or {}))
    return str(run.info.run_id)


def make_step(tracking: Tracking, flow: str, label: str, state: RunState = RunState.RUNNING) -> str:
    tags = {
        Tag.KIND: "step",
        Tag.PARENT: flow,
        Tag.LABEL: label,
        Tag.STEP: label.partition("/")[0],
        Tag.VERSION: "2",
        Tag.STATE: state.value,
        Tag.DEPENDS_ON: '["prepare"]',
    }
    return str(tracking.client().create_run(tracking.experiment_id(), run_name=label, tags=tags).info.run_id)


def dead_pid() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_mark_abandoned__dead_driver_with_steps_and_trials(tracking: Tracking) -> None:
    flow = make_flow(tracking, {liveness.PID_TAG: dead_pid()})
    running = make_step(tracking, flow, "tune")
    trial = make_step(tracking, running, "trial")
    finished = make_step(tracking, flow, "prepare", RunState.DONE)
    tracking.end_run(finished, "FINISHED", {})
    alive = make_flow(tracking)
    assert runs.mark_abandoned(tracking) == [flow]
    client = tracking.client()
    for run_id in (flow, running, trial):
        run = client.get_run(run_id)
        assert (run.info.status, run.data.tags[Tag.STATE]) == ("KILLED", "abandoned")
        assert "is gone" in run.data.tags[Tag.ERROR]
    assert client.get_run(finished).info.status == "FINISHED"
    assert client.get_run(alive).info.status == "RUNNING"
    assert runs.mark_abandoned(tracking) == []


def test_list_runs__newest_first_with_facts(tracking: Tracking) -> None:
    first = make_flow(tracking, {Tag.COUNTS: '{"run": 2}', Tag.WORKSPACE: "/w", "mlflow.user": "ann"})
    tracking.end_run(first, "FAILED", {Tag.STATE: RunState.FAILED, Tag.ERROR: "train: boom"})
    second = make_flow(tracking)
    newest, oldest = runs.list_runs(tracking)
    assert (newest.run_id, newest.state, newest.error) == (second, RunState.RUNNING, None)
    assert (oldest.run_id, oldest.flow, oldest.state, oldest.error) == (first, "quick", RunState.FAILED, "train: boom")
    assert (oldest.steps, oldest.workspace, oldest.user) == ({"run": 2}, "/w", "ann")
    assert oldest.host == liveness.identity_tags()[liveness.HOST_TAG]
    assert oldest.started.endswith("+00:00")
    assert len(runs.list_runs(tracking, limit=1)) == 1


def test_list_runs__empty_where_there_is_no_store() -> None:
    assert runs.list_runs(Tracking("sqlite:////no/such/folder/mlflow.db")) == []


def test_run_tree__in_the_flow_s_order_with_waiting_steps_and_records(tracking: Tracking) -> None:
    flow = make_flow(tracking)
    train = make_step(tracking, flow, "train/full")
    prepare = make_step(tracking, flow, "prepare", RunState.DONE)
    tracking.client().log_text(prepare, '{"digest": "d"}', RECORD_FILE)
    tracking.end_run(prepare, "FINISHED", {})
    plan = [
        runs.PlannedStep(label=label, step=label, version=1, cached=False, depends_on=())
        for label in ("prepare", "train/full", "evaluate")
    ]
    tracking.client().log_text(flow, json.dumps([step.model_dump(mode="json") for step in plan]), "plan.json")
    tree = runs.run_tree(tracking, flow[:8], records=True)
    assert [(step.label, step.state) for step in tree.steps] == [
        ("prepare", RunState.DONE),
        ("train/full", RunState.RUNNING),
        ("evaluate", RunState.WAITING),
    ]
    assert tree.steps[0].record == {"digest": "d"}
    assert (tree.steps[1].run_id, tree.steps[1].step, tree.steps[1].version) == (train, "train", 2)
    assert tree.steps[1].depends_on == ("prepare",)
    assert tree.steps[2].run_id is None


def test_find_run__by_prefix_latest_or_told_why_not(tracking: Tracking) -> None:
    with pytest.raises(UserError, match=r"no run 'latest' in sqlite:.*; it holds none"):
        runs.find_run(tracking, "latest")
    first, second = make_flow(tracking), make_flow(tracking)
    assert runs.find_run(tracking, first).info.run_id == first
    assert runs.find_run(tracking, second[:10]).info.run_id == second
    assert runs.find_run(tracking, "latest").info.run_id == second
    with pytest.raises(UserError, match=rf"no run 'zz' in .*; the latest are {second[:12]}, {first[:12]}"):
        runs.find_run(tracking, "zz")
    with pytest.raises(UserError, match=r"run '' fits 2 runs \(.*\); give more of its id"):
        runs.find_run(tracking, "")


def test_cancel_run__of_a_dead_driver_marks_it_and_says_so(tracking: Tracking) -> None:
    flow = make_flow(tracking, {liveness.PID_TAG: dead_pid()})
    with pytest.raises(
        UserError, match=r"run .* of flow quick had no driver any more \(.* is gone\); it is marked as ab"
    ):
        runs.cancel_run(tracking, flow, "ann", log=lambda _: None)
    assert tracking.client().get_run(flow).data.tags[Tag.STATE] == "abandoned"
    with pytest.raises(UserError, match=r"has ended already \(abandoned\)"):
        runs.cancel_run(tracking, flow, "ann", log=lambda _: None)


def test_cancel_run__a_driver_that_does_not_answer_is_told_after_the_bound(tracking: Tracking) -> None:
    flow = make_flow(tracking, {liveness.HOST_TAG: "elsewhere"})
    with pytest.raises(
        UserError, match=r"has not ended after 1 s; the request stands: .* or end process \d+ on elsewhere"
    ):
        runs.cancel_run(tracking, flow, "ann", timeout_s=1.0, log=lambda _: None)
    assert tracking.client().get_run(flow).data.tags[Tag.CANCEL] == "ann"


def test_mark_abandoned__finishes_what_was_done_and_deletes_twins(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_flow(tracking, {liveness.HOST_TAG: "gone"})
    assert runs.mark_abandoned(tracking) == []
    monkeypatch.setattr(liveness, "STALE_AFTER_S", 0.0)
    done = make_step(tracking, flow, "prepare", RunState.DONE)
    tracking.set_tags(done, {Tag.DONE: "f" * 64})
    reused = make_step(tracking, flow, "train/full", RunState.REUSED)
    tracking.end_run(reused, "FINISHED", {})
    make_step(tracking, flow, "train/full", RunState.REUSED)
    running = make_step(tracking, flow, "evaluate/full")
    assert runs.mark_abandoned(tracking) == [flow]
    states = {run.info.run_id: run.info.status for run in tracking.runs(f"tags.`{Tag.PARENT}` = '{flow}'")}
    assert states == {done: "FINISHED", reused: "FINISHED", running: "KILLED"}
    assert tracking.client().get_run(done).data.tags[Tag.STATE] == "done"
    note = tracking.client().get_run(flow).data.tags[Tag.NOTE]
    assert note.startswith("abandoned: its driver on gone has been silent for ")


def test_mark_abandoned__leaves_a_flow_alone_that_ended_since_the_list_was_made(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = make_flow(tracking, {liveness.PID_TAG: dead_pid()})
    listed = list(tracking.runs(f"tags.`{Tag.KIND}` = 'flow'"))
    tracking.end_run(flow, "FINISHED", {Tag.STATE: RunState.FINISHED})
    monkeypatch.setattr(Tracking, "runs", lambda *_arguments, **_options: iter(listed))
    assert runs.mark_abandoned(tracking) == []
    run = tracking.client().get_run(flow)
    assert (run.info.status, run.data.tags[Tag.STATE]) == ("FINISHED", "finished")
