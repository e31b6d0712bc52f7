"""Flow runs as people see them: a list, a tree of steps, and the marking of what dead drivers left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.records import Record
from pipeline.workflow import liveness
from pipeline.workflow.moved_store import at_its_place
from pipeline.workflow.progress import Progress
from pipeline.workflow.tracking import PLAN_FILE, RECORD_FILE, RunState, Tag, Tracking, note_tag

if TYPE_CHECKING:
    from mlflow.entities import Run

CANCEL_TIMEOUT_S = 90.0
CANCEL_POLL_S = 0.5


class RunSummary(Record):
    """One run of a flow.

    Attributes:
        started: UTC, ISO 8601.
        seconds: duration, up to now for a running one.
        error: the root causes of its failure in a line each.
        steps: number of steps by state.
        host, pid: its driver.
        num_bytes: what it left in storage; None where nobody asked (pipeline.workflow.run_sizes).
    """

    run_id: str
    flow: str
    state: RunState
    started: str
    seconds: float
    error: str | None
    steps: dict[str, int]
    workspace: str
    host: str
    pid: int | None
    user: str
    num_bytes: int | None = None


class StepSummary(Record):
    """One step of a flow's run.

    Attributes:
        run_id: its own MLflow run; None while it waits for its inputs.
        reused_from: the run that computed the record, where it was reused.
        error: the cause in one line.
        progress: how far it is, as it told last; None unless it runs.
        record: what it returned, where asked for.
        cleaned: when its outputs were removed, UTC, ISO 8601; None where they were not.
    """

    run_id: str | None
    label: str
    step: str
    version: int
    state: RunState
    depends_on: tuple[str, ...]
    started: str | None
    seconds: float | None
    fingerprint: str | None
    reused_from: str | None
    error: str | None
    progress: Progress | None = None
    record: dict[str, Any] | None = None
    cleaned: str | None = None


class RunTree(Record):
    """A run of a flow with its steps, in the order in which the flow names them."""

    run: RunSummary
    steps: tuple[StepSummary, ...]


class PlannedStep(Record):
    """A step as a plan shows it.

    Attributes:
        cached: whether a cached result will be used.
        run_id: the run that holds the cached result.
        note: why a cached result cannot be used.
    """

    label: str
    step: str
    version: int
    cached: bool
    depends_on: tuple[str, ...]
    fingerprint: str | None = None
    run_id: str | None = None
    note: str | None = None


def list_runs(tracking: Tracking, limit: int = 50) -> list[RunSummary]:
    """The latest flow runs, newest first; what dead drivers left running is marked first."""
    mark_abandoned(tracking)
    found = tracking.first_runs(f"tags.`{Tag.KIND}` = 'flow'", limit)
    return [_run_summary(run) for run in found]


def run_tree(tracking: Tracking, run_id: str, *, records: bool = False) -> RunTree:
    """A flow's run, found as `find_run` does, with its steps; `records` adds what they returned."""
    mark_abandoned(tracking)
    return tree_of(tracking, find_run(tracking, run_id), records=records)


def tree_of(tracking: Tracking, run: Run, *, records: bool = False) -> RunTree:
    """`run_tree` of a flow's run that is known."""
    steps = {}
    for child in tracking.runs(_steps_filter(run), order_by="attributes.start_time ASC"):
        step = _step_summary(child)
        if records and step.state in (RunState.DONE, RunState.REUSED):
            holder = tracking.client().get_run(step.reused_from) if step.reused_from else child
            step = step.model_copy(update={"record": _record_of(tracking, holder)})
        steps[step.label] = step
    summary = _run_summary(run)
    pending = RunState.WAITING if summary.state == RunState.RUNNING else RunState.SKIPPED
    ordered = {
        planned.label: steps.get(planned.label) or _pending(planned, pending) for planned in _plan(tracking, run)
    }
    return RunTree(run=summary, steps=tuple((ordered | steps).values()))


def find_run(tracking: Tracking, run_id: str) -> Run:
    """The flow run whose id begins with `run_id`, or the newest for "latest"; raises UserError otherwise."""
    flows = f"tags.`{Tag.KIND}` = 'flow'"
    if run_id == "latest":
        found = list(tracking.first_runs(flows, 1))
    else:
        found = [run for run in tracking.runs(flows) if str(run.info.run_id).startswith(run_id)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(str(run.info.run_id)[:12] for run in found[:5])
        raise UserError(f"run {run_id!r} fits {len(found)} runs ({choices}, ...); give more of its id")
    latest = ", ".join(str(run.info.run_id)[:12] for run in tracking.first_runs(flows, 5))
    raise UserError(
        f"no run {run_id!r} in {tracking.uri}; " + (f"the latest are {latest}" if latest else "it holds none")
    )


def mark_abandoned(tracking: Tracking) -> list[str]:
    """Mark flow runs left running by dead drivers, and what runs below them; returns the flows' run ids.

    A driver on another machine is found dead by its second look or a later one (see pipeline.workflow.liveness).
    """
    marked = []
    running = f"tags.`{Tag.KIND}` = 'flow' and attributes.status = 'RUNNING'"
    for found in list(tracking.runs(running)):
        if liveness.why_dead(found.data.tags) is None:
            continue
        # It may have ended, or given a sign of life, since the list was made.
        run = tracking.client().get_run(found.info.run_id)
        reason = liveness.why_dead(run.data.tags)
        if run.info.status == "RUNNING" and reason is not None:
            end_running_children(tracking, run.info.run_id, RunState.ABANDONED, reason)
            tags = {Tag.STATE: RunState.ABANDONED, Tag.ERROR: reason, **note_tag(RunState.ABANDONED, reason)}
            tracking.end_run(run.info.run_id, "KILLED", tags)
            marked.append(str(run.info.run_id))
    return marked


def end_running_children(tracking: Tracking, run_id: str, state: RunState, reason: str) -> None:
    """Mark all runs below `run_id` that MLflow shows as running, steps and their trials alike.

    A step that was done, but for its run's end, is ended as such.
    """
    below = f"tags.`{Tag.PARENT}` = '{run_id}'"
    running = list(tracking.runs(f"{below} and attributes.status = 'RUNNING'"))
    if not running:
        return
    # A label whose run has ended has no other: what runs is a twin, made by a request whose answer was lost.
    ended = {run.data.tags.get(Tag.LABEL) for run in tracking.runs(f"{below} and attributes.status != 'RUNNING'")}
    for child in running:
        tags = child.data.tags
        end_running_children(tracking, child.info.run_id, state, reason)
        if Tag.DONE in tags:
            tracking.client().set_terminated(child.info.run_id, "FINISHED")
        elif tags.get(Tag.LABEL, "") and tags[Tag.LABEL] in ended:
            tracking.client().delete_run(child.info.run_id)
        else:
            marks = {Tag.STATE: state, Tag.ERROR: reason, **note_tag(state, reason)}
            tracking.end_run(child.info.run_id, "KILLED", marks)


def cancel_run(
    tracking: Tracking, run_id: str, user: str, *, timeout_s: float = CANCEL_TIMEOUT_S, log: Callable[[str], None]
) -> RunSummary:
    """Ask the driver of a running flow to end, wherever it is, and wait until its run is marked.

    The driver polls for the request; one on this machine gets a SIGTERM, too. Raises UserError for a run that has
    ended, whose driver is gone, or that has not ended after `timeout_s` seconds.
    """
    abandoned = mark_abandoned(tracking)
    run = find_run(tracking, run_id)
    name = f"run {run.info.run_id[:12]} of flow {run.data.tags.get(Tag.FLOW, run.info.run_name)}"
    if run.info.run_id in abandoned:
        raise UserError(f"{name} had no driver any more ({run.data.tags.get(Tag.ERROR)}); it is marked as abandoned")
    if run.info.status != "RUNNING":
        raise UserError(f"{name} has ended already ({_run_summary(run).state}); there is nothing to cancel")
    tracking.set_tags(run.info.run_id, {Tag.CANCEL: user})
    if liveness.is_running(run.data.tags):
        # Gone in this very moment, or another user's: the request stands all the same.
        with suppress(ProcessLookupError, PermissionError):
            os.kill(int(run.data.tags[liveness.PID_TAG]), signal.SIGTERM)
    log(
        f"asked the driver of {name} to end (process {run.data.tags.get(liveness.PID_TAG)} on "
        f"{run.data.tags.get(liveness.HOST_TAG)})"
    )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        mark_abandoned(tracking)
        run = tracking.client().get_run(run.info.run_id)
        if run.info.status != "RUNNING":
            return _run_summary(run)
        time.sleep(CANCEL_POLL_S)
    raise UserError(
        f"{name} has not ended after {timeout_s:.0f} s; the request stands: look again with `segvit show`, "
        f"or end process {run.data.tags.get(liveness.PID_TAG)} on {run.data.tags.get(liveness.HOST_TAG)}"
    )


def count_states(states: Iterable[RunState]) -> dict[str, int]:
    """How many steps are in each state, in the order of RunState."""
    listed = list(states)
    return {state.value: listed.count(state) for state in RunState if state in listed}


def _steps_filter(run: Run) -> str:
    return f"tags.`{Tag.PARENT}` = '{run.info.run_id}' and tags.`{Tag.KIND}` = 'step'"


def _run_summary(run: Run) -> RunSummary:
    tags = run.data.tags
    pid = tags.get(liveness.PID_TAG, "")
    return RunSummary(
        run_id=run.info.run_id,
        flow=tags.get(Tag.FLOW, run.info.run_name),
        state=RunState(tags.get(Tag.STATE, RunState.RUNNING)),
        started=_utc_text(run.info.start_time),
        seconds=_seconds(run),
        error=tags.get(Tag.ERROR),
        steps=json.loads(tags.get(Tag.COUNTS, "{}")),
        workspace=tags.get(Tag.WORKSPACE, ""),
        host=tags.get(liveness.HOST_TAG, ""),
        pid=int(pid) if pid.isdigit() else None,
        user=tags.get("mlflow.user", ""),
    )


def _step_summary(run: Run) -> StepSummary:
    tags = run.data.tags
    state = RunState(tags[Tag.STATE])
    return StepSummary(
        run_id=run.info.run_id,
        label=tags[Tag.LABEL],
        step=tags[Tag.STEP],
        version=int(tags[Tag.VERSION]),
        state=state,
        depends_on=tuple(json.loads(tags.get(Tag.DEPENDS_ON, "[]"))),
        started=_utc_text(run.info.start_time),
        seconds=_seconds(run),
        fingerprint=tags.get(Tag.FINGERPRINT),
        reused_from=tags.get(Tag.REUSED_FROM),
        error=tags.get(Tag.ERROR),
        progress=Progress.from_tag(tags.get(Tag.PROGRESS)) if state == RunState.RUNNING else None,
        cleaned=tags.get(Tag.CLEANED),
    )


def _record_of(tracking: Tracking, run: Run) -> Any:
    text = tracking.read_text(run.info.run_id, RECORD_FILE, run.info.artifact_uri)
    return json.loads(at_its_place(text, run.data.tags)) if text else None


def _plan(tracking: Tracking, run: Run) -> list[PlannedStep]:
    text = tracking.read_text(run.info.run_id, PLAN_FILE)
    return [PlannedStep.model_validate(planned) for planned in json.loads(text)] if text else []


def _pending(planned: PlannedStep, state: RunState) -> StepSummary:
    return StepSummary(
        run_id=None,
        label=planned.label,
        step=planned.step,
        version=planned.version,
        state=state,
        depends_on=planned.depends_on,
        started=None,
        seconds=None,
        fingerprint=None,
        reused_from=None,
        error=None,
    )


def _utc_text(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _seconds(run: Run) -> float:
    end = run.info.end_time or datetime.now(UTC).timestamp() * 1000
    return round(float(end - run.info.start_time) / 1000, 3)
