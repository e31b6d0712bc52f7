from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Report
from pipeline.workflow import execution, liveness, runs, step_lease
from pipeline.workflow.execution import Outcome, StepRef, StepRequest, execute_step, look_up, one_line, resolve
from pipeline.workflow.lease import LeaseLost, take_lease
from pipeline.workflow.step import Step, StepContext, step
from pipeline.workflow.step_log import LOG_ARTIFACT
from pipeline.workflow.tracking import RECORD_FILE, TRACEBACK_FILE, RunState, Tag, Tracking

ReportStep = Step[..., Report]


@pytest.fixture
def make_request(tracking: Tracking, tmp_path: Path) -> Callable[..., StepRequest]:
    """A request for a step in a flow run of its own, driven by this very process."""

    def make(step: ReportStep, *args: Any, label: str = "write", **params: Any) -> StepRequest:
        tags = {Tag.KIND: "flow", **liveness.identity_tags()}
        flow = tracking.client().create_run(tracking.experiment_id(), tags=tags)
        return StepRequest(
            step=step,
            label=label,
            arguments=step.bind(args, params),
            depends_on=(),
            workspace=str(tmp_path),
            tracking=tracking,
            flow="test",
            flow_run_id=flow.info.run_id,
        )

    return make


def make_writer(calls: list[str], *, seconds: float = 0.0, error: Exception | None = None) -> ReportStep:
    @step(version=1)
    def write(context: StepContext, text: str, before: Report | None = None) -> Report:
        calls.append(context.label)
        time.sleep(seconds)
        if error is not None:
            raise error
        target = Path(context.output_uri("report.txt"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return Report(uri=str(target), digest=text)

    return write


def tags_of(outcome: Outcome, tracking: Tracking) -> dict[str, str]:
    return dict(tracking.client().get_run(str(outcome.run_id)).data.tags)


def test_execute_step__records_and_is_then_reused(make_request: Any, tracking: Tracking) -> None:
    calls: list[str] = []
    first = execute_step(make_request(make_writer(calls), "hello"))
    again = execute_step(make_request(make_writer(calls), "hello", label="other"))
    assert (first.state, again.state, calls) == (RunState.DONE, RunState.REUSED, ["write"])
    assert again.record == first.record
    tags = tags_of(first, tracking)
    assert tags[Tag.DONE] == tags[Tag.FINGERPRINT] == tags_of(again, tracking)[Tag.FINGERPRINT]
    assert tags_of(again, tracking)[Tag.REUSED_FROM] == first.run_id
    assert Tag.DONE not in tags_of(again, tracking)
    run = tracking.client().get_run(str(first.run_id))
    assert (run.info.status, run.data.params) == ("FINISHED", {"text": "hello", "before": "null"})


def test_execute_step__takes_records_for_references(make_request: Any) -> None:
    calls: list[str] = []
    before = Report(uri="/x", digest="d")
    request = make_request(make_writer(calls), "t", before=StepRef("shards", "prepare"))
    known = Outcome(label="shards", state=RunState.REUSED, record=before)
    outcome = execute_step(request, known)
    direct = execute_step(make_request(make_writer(calls), "t", before=before))
    assert (outcome.state, direct.state) == (RunState.DONE, RunState.REUSED)


def test_execute_step__failure_is_recorded_with_its_traceback(make_request: Any, tracking: Tracking) -> None:
    request = make_request(make_writer([], error=ValueError("bad\n  luck")), "t")
    outcome = execute_step(request)
    assert (outcome.state, outcome.error, outcome.record) == (RunState.FAILED, "ValueError: bad luck", None)
    assert tracking.client().get_run(str(outcome.run_id)).info.status == "FAILED"
    text = tracking.read_text(str(outcome.run_id), TRACEBACK_FILE)
    assert text is not None
    assert "raise error" in text
    assert text == outcome.traceback
    log = Path(str(outcome.log_uri)).read_text()
    # The time, two spaces, and the line.
    assert [line[21:] for line in log.splitlines()[1:]] == text.splitlines()
    assert tracking.read_text(str(outcome.run_id), LOG_ARTIFACT) == log
    assert execute_step(request).state == RunState.FAILED  # a failure is not remembered


def test_execute_step__skipped_for_a_failed_input_names_the_root(make_request: Any, tracking: Tracking) -> None:
    calls: list[str] = []
    failed = Outcome(label="prepare", state=RunState.FAILED, error="no disk")
    middle = execute_step(make_request(make_writer(calls), "t", label="train"), failed)
    last = execute_step(make_request(make_writer(calls), "t", label="evaluate"), middle)
    assert calls == []
    for outcome in (middle, last):
        assert (outcome.state, outcome.error) == (RunState.SKIPPED, "prepare: no disk")
        assert tags_of(outcome, tracking)[Tag.ERROR] == "prepare: no disk"


def test_execute_step__interrupt_is_marked_and_goes_on(make_request: Any, tracking: Tracking) -> None:
    @step(version=1)
    def stop(context: StepContext) -> Report:
        raise KeyboardInterrupt

    request = make_request(stop)
    with pytest.raises(KeyboardInterrupt):
        execute_step(request)
    (run,) = tracking.runs(f"tags.`{Tag.PARENT}` = '{request.flow_run_id}'")
    assert (run.info.status, run.data.tags[Tag.STATE]) == ("KILLED", "killed")


def test_execute_step__goes_on_under_the_run_of_a_crashed_attempt(make_request: Any, tracking: Tracking) -> None:
    request = make_request(make_writer([]), "t")
    crashed = begin(request)
    outcome = execute_step(request)
    assert (outcome.state, outcome.run_id) == (RunState.DONE, crashed)
    assert tracking.client().get_run(crashed).info.status == "FINISHED"


@pytest.mark.parametrize("damage", ["output", "record", "record is of another form"])
def test_execute_step__damaged_results_are_computed_again(make_request: Any, tracking: Tracking, damage: str) -> None:
    calls: list[str] = []
    first = execute_step(make_request(make_writer(calls), damage))
    assert isinstance(first.record, Report)
    if damage == "output":
        Path(first.record.uri).unlink()
        note = f"{first.record.uri} is gone"
    elif damage == "record":
        tracking.client().log_text(str(first.run_id), '{"uri": "/x", "digest": "forged"}', RECORD_FILE)
        note = f"the record of run {str(first.run_id)[:8]} is missing or was changed"
    else:
        text = '{"older": 1}'
        tracking.client().log_text(str(first.run_id), text, RECORD_FILE)
        tracking.client().set_tag(str(first.run_id), Tag.RECORD_DIGEST, execution._sha256(text))
        note = f"the record of run {str(first.run_id)[:8]} is of another form"
    again = execute_step(make_request(make_writer(calls), damage))
    assert (again.state, again.note, len(calls)) == (RunState.DONE, note, 2)
    assert execute_step(make_request(make_writer(calls), damage)).state == RunState.REUSED


def test_execute_step__a_kill_before_the_done_mark_means_run_again(make_request: Any, tracking: Tracking) -> None:
    calls: list[str] = []
    first = execute_step(make_request(make_writer(calls), "t"))
    tracking.client().delete_tag(str(first.run_id), Tag.DONE)
    assert execute_step(make_request(make_writer(calls), "t")).state == RunState.DONE
    assert len(calls) == 2


def test_step_lease__of_many_at_once_one_executes(
    make_request: Any, monkeypatch: pytest.MonkeyPatch, tracking: Tracking
) -> None:
    monkeypatch.setattr(step_lease, "POLL_S", 0.05)
    calls: list[str] = []
    requests = [make_request(make_writer(calls, seconds=0.3), "t", label=f"w{index}") for index in range(4)]
    outcomes: list[Outcome] = []
    threads = [threading.Thread(target=lambda one=one: outcomes.append(execute_step(one))) for one in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(outcome.state for outcome in outcomes) == ["done", "reused", "reused", "reused"]
    assert len({outcome.record.content_digest() for outcome in outcomes if outcome.record}) == 1


def begin(request: StepRequest) -> str:
    return execution._begin(request, request.arguments, request.step.fingerprint(request.arguments), None)


def test_step_lease__of_a_dead_driver_lapse_with_the_step_s_process(
    make_request: Any, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_lease, "ORPHAN_GRACE_S", 2.0)
    monkeypatch.setattr(step_lease, "POLL_S", 0.1)
    dead = make_request(make_writer([]), "t")
    orphan = begin(dead)
    tracking.client().set_tag(dead.flow_run_id, liveness.STARTED_TAG, "1")
    # Its process lives: it is given time to end.
    begun = time.monotonic()
    assert execute_step(make_request(make_writer([]), "t")).state == RunState.DONE
    assert time.monotonic() - begun > 2
    tracking.set_tags(orphan, {Tag.FINGERPRINT: "another"})


def test_step_lease__of_a_dead_process_lapse_though_its_driver_lives(make_request: Any, tracking: Tracking) -> None:
    # Else steps with one fingerprint could wait, in every slot that Ray has, for one whose next attempt finds none.
    crashed = begin(make_request(make_writer([]), "t"))
    tracking.client().set_tag(crashed, liveness.STARTED_TAG, "1")
    assert execute_step(make_request(make_writer([]), "t")).state == RunState.DONE


@pytest.mark.parametrize(("stale_after_s", "waits"), [(300.0, True), (0.0, False)])
def test_step_lease__on_another_machine_lapse_with_the_driver_s_heartbeat(
    make_request: Any, tracking: Tracking, monkeypatch: pytest.MonkeyPatch, stale_after_s: float, waits: bool
) -> None:
    class Waited(Exception):  # noqa: N818
        pass

    def sleep(_seconds: float) -> None:
        raise Waited

    far = make_request(make_writer([]), "t")
    elsewhere = {liveness.HOST_TAG: "elsewhere"}
    tracking.set_tags(begin(far), elsewhere)
    tracking.set_tags(far.flow_run_id, elsewhere)
    runs.mark_abandoned(tracking)
    monkeypatch.setattr(liveness, "STALE_AFTER_S", stale_after_s)
    monkeypatch.setattr("pipeline.workflow.lease.time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    outcome = execute_step(make_request(make_writer([]), "t"))
    assert (outcome.state, outcome.error) == ((RunState.FAILED, "Waited") if waits else (RunState.DONE, None))


def test_step_lease__what_finished_between_the_last_look_and_the_turn_is_reused(
    make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    first, second = make_request(make_writer(calls), "t"), make_request(make_writer(calls), "t")
    begin_run = execution._begin

    def begin_late(request: StepRequest, *rest: Any) -> str:
        if request is second:
            assert execute_step(first).state == RunState.DONE
        return begin_run(request, *rest)

    monkeypatch.setattr(execution, "_begin", begin_late)
    assert execute_step(second).state == RunState.REUSED
    assert len(calls) == 1


def test_step_lease__who_was_overtaken_fails_with_one_line_and_records_nothing(
    make_request: Any, tracking: Tracking
) -> None:
    checks: list[str] = []

    @step(version=1)
    def slow(context: StepContext, text: str) -> Report:
        # What a pause longer than all patience leads to: another one, anywhere, executes the same.
        take_lease(context.lease.uri, context.lease.what, key="newer")
        with pytest.raises(LeaseLost) as lost:
            context.lease.check()
        checks.append(str(lost.value))
        storage.publish_bytes(context.output_uri("text.txt"), text.encode())
        return Report(uri=context.output_uri("text.txt"), digest=text)

    request = make_request(slow, "t")
    outcome = execute_step(request)
    assert (outcome.state, outcome.error) == (RunState.FAILED, checks[0])
    assert checks == [
        f"step {request.label} was taken over by another process (lease 2 of newer, after 1); "
        "this one stops and leaves it alone"
    ]
    assert Tag.DONE not in tracking.client().get_run(str(outcome.run_id)).data.tags


def test_step_lease__numbers_grow_though_the_store_is_new(make_request: Any, tracking: Tracking) -> None:
    numbers: list[int] = []

    @step(version=1)
    def numbered(context: StepContext, text: str) -> Report:
        numbers.append(context.lease.rank.number)
        raise RuntimeError(text)

    request = make_request(numbered, "t")
    execute_step(request)
    fresh = replace(tracking, experiment=f"{tracking.experiment}-fresh")
    flow = fresh.create_run("flow", {Tag.KIND: "flow", **liveness.identity_tags()})
    execute_step(replace(request, tracking=fresh, flow_run_id=flow))
    assert numbers == [1, 2]


def test_step_lease__a_twin_of_the_own_run_is_deleted(make_request: Any, tracking: Tracking) -> None:
    # The server made it, its answer got lost, and MLflow asked again.
    request = make_request(make_writer([]), "t")
    run_id, twin = begin(request), begin(request)
    outcome = execute_step(request)
    assert (outcome.state, outcome.run_id in (run_id, twin)) == (RunState.DONE, True)
    (left,) = tracking.runs(f"tags.`{Tag.PARENT}` = '{request.flow_run_id}'")
    assert left.info.run_id == outcome.run_id


def test_execute_step__killed_after_the_done_mark_is_taken_over(make_request: Any, tracking: Tracking) -> None:
    calls: list[str] = []
    request = make_request(make_writer(calls), "t")
    first = execute_step(request)
    tracking.client().update_run(str(first.run_id), status="RUNNING")
    again = execute_step(request)
    assert (again.state, again.run_id, len(calls)) == (RunState.DONE, first.run_id, 1)
    assert tracking.client().get_run(str(first.run_id)).info.status == "FINISHED"
    # The same, with the driver dead: whoever marks what it left ends the step as finished.
    tracking.client().update_run(str(first.run_id), status="RUNNING")
    tracking.client().set_tag(request.flow_run_id, liveness.STARTED_TAG, "1")
    runs.mark_abandoned(tracking)
    run = tracking.client().get_run(str(first.run_id))
    assert (run.info.status, run.data.tags[Tag.STATE]) == ("FINISHED", "done")


@pytest.mark.parametrize("keep_times", [False, True])
def test_execute_step__one_flipped_byte_in_an_output(make_request: Any, keep_times: bool) -> None:
    calls: list[str] = []
    first = execute_step(make_request(make_writer(calls), "hello"))
    assert isinstance(first.record, Report)
    output = Path(first.record.uri)
    time.sleep(0.05)
    assert execute_step(make_request(make_writer(calls), "hello")).state == RunState.REUSED
    about = output.stat()
    output.write_text("hellp")
    if keep_times:
        os.utime(output, ns=(about.st_atime_ns, about.st_mtime_ns))
    again = execute_step(make_request(make_writer(calls), "hello"))
    assert (again.state, again.note, len(calls)) == (RunState.DONE, f"{output} has changed", 2)
    assert output.read_text() == "hello"
    assert execute_step(make_request(make_writer(calls), "hello")).state == RunState.REUSED


def test_record_failed__tells_the_cause_though_nothing_can_be_written(
    make_request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    request = make_request(make_writer([], error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/x")), "t")
    monkeypatch.setattr(storage, "publish_bytes", refuse)
    monkeypatch.setattr(execution, "append_text", refuse)
    monkeypatch.setattr(Tracking, "set_tags", refuse)
    outcome = execute_step(request)
    full = "the disk is full{}; free some space or choose another workspace, then run again"
    assert (outcome.state, outcome.error, outcome.log_uri) == (RunState.FAILED, full.format(""), None)
    monkeypatch.undo()
    outcome = execute_step(request)
    assert outcome.error == full.format(" at /w/x")


def test_look_up__says_nothing_where_nothing_was_done(tracking: Tracking) -> None:
    assert look_up(tracking, make_writer([]), "f" * 64, {}) == (None, None, None)


def test_resolve__at_any_depth() -> None:
    ref: StepRef[Report] = StepRef("a", "a")
    tree = {"x": [ref, (1, {"y": ref})], "z": "a"}
    assert resolve(tree, lambda one: one.label.upper()) == {"x": ["A", (1, {"y": "A"})], "z": "a"}


class WrappedError(RuntimeError):
    """As Ray hands on the exception of a remote task."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("ray::task()\nTraceback ...")
        self.cause = cause


def chained(outer: Exception, inner: Exception) -> Exception:
    try:
        raise outer from inner
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("crop 500 is too large;\n  use 496"), "crop 500 is too large; use 496"),
        (WrappedError(UserError("no disk")), "no disk"),
        (WrappedError(KeyError("x")), "KeyError: 'x'"),
        (chained(UserError("training failed: boom"), ValueError("boom")), "training failed: boom"),
        (
            RuntimeError("System error: gone\ntraceback: Traceback (most recent call last):\n  File"),
            "RuntimeError: System error: gone",
        ),
        (TimeoutError(), "TimeoutError"),
        (ValueError("x" * 1000), "ValueError: " + "x" * 397 + "..."),
    ],
)
def test_one_line(error: Exception, expected: str) -> None:
    assert one_line(error) == expected
