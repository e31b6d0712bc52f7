"""One step, executed once: looked up, claimed, run, summed, recorded, all in the process that runs it.

What is written, in this order: the run, which waits in line for its lease (pipeline.workflow.step_lease), the outputs,
the record, and then in one request everything that makes it count (`segvit.done` among it); MLflow's own state comes
last. A kill at any instant leaves a step that has not run, or one that has and is reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.causes import one_line
from pipeline.masking import masked
from pipeline.records import Record
from pipeline.storage.file_stamps import folder_bytes
from pipeline.workflow.moved_store import at_its_place
from pipeline.workflow.output_checksum import changed_outputs, output_checksums
from pipeline.workflow.step import Step, StepContext
from pipeline.workflow.step_lease import StepLine, in_line_tags, take_step_lease
from pipeline.workflow.step_log import append_text, keep_with_run, recording
from pipeline.workflow.step_log import log_uri as log_uri_of
from pipeline.workflow.tracking import (
    RECORD_FILE,
    TRACEBACK_FILE,
    Param,
    RunState,
    Tag,
    Tracking,
    current_user,
    flatten,
    note_tag,
)

if TYPE_CHECKING:
    from mlflow.entities import Run

R = TypeVar("R", bound=Record)

__all__ = ["CacheLookup", "Outcome", "StepRef", "StepRequest", "execute_step", "look_up", "one_line", "resolve"]


@dataclass(frozen=True, slots=True)
class StepRef(Generic[R]):
    """Stands for the record a step will return; pass it to later steps."""

    label: str
    step: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a step ended.

    Attributes:
        record: what it returned; None where it failed or was skipped.
        error: one line: the cause of a failure, for a skipped step the root cause.
        note: why a cached result was not used.
        log_uri: where the full traceback lies.
    """

    label: str
    state: RunState
    record: Record | None = None
    run_id: str | None = None
    error: str | None = None
    traceback: str | None = None
    log_uri: str | None = None
    note: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRequest:
    """A step with its arguments (StepRefs among them stand for records) and the flow's run it belongs to."""

    step: Step[..., Any]
    label: str
    arguments: Mapping[str, Any]
    depends_on: tuple[str, ...]
    workspace: str
    tracking: Tracking
    flow: str
    flow_run_id: str
    runtime: Any = None


class CacheLookup(NamedTuple):
    """A record found in the store and the run that holds it; without one, `note` may say why."""

    record: Record | None
    run_id: str | None = None
    note: str | None = None


def look_up(
    tracking: Tracking,
    step: Step[..., Any],
    fingerprint: str,
    arguments: Mapping[str, Any],
    flow_run_id: str | None = None,
) -> CacheLookup:
    """Look for a finished execution of a fingerprint whose record is intact and whose outputs verify.

    With the run of a flow that will use it, that is noted there before a last look: whoever removes outputs first
    takes the mark of a finished step away and then looks for such notes, so that one of both sees the other.
    """
    note = None
    used = False
    for run in tracking.first_runs(f"tags.`{Tag.DONE}` = '{fingerprint}'", 3):
        text = tracking.read_text(run.info.run_id, RECORD_FILE, run.info.artifact_uri)
        if text is None or _sha256(text) != run.data.tags.get(Tag.RECORD_DIGEST):
            note = f"the record of run {run.info.run_id[:8]} is missing or was changed"
            continue
        try:
            record = step.record_type.from_json(at_its_place(text, run.data.tags))
        except ValidationError:
            note = f"the record of run {run.info.run_id[:8]} is of another form"
            continue
        if flow_run_id is not None:
            if not used:
                tracking.client().set_tag(flow_run_id, f"{Tag.USES}.{fingerprint[:16]}", "")
            used = True
            if Tag.DONE not in tracking.client().get_run(run.info.run_id).data.tags:
                note = f"the outputs of run {run.info.run_id[:8]} were removed"
                continue
        note = step.broken_outputs(record, tracking, arguments) or _changed_outputs(run)
        if note is None:
            return CacheLookup(record, str(run.info.run_id))
    return CacheLookup(None, note=note)


def execute_step(request: StepRequest, *inputs: Outcome) -> Outcome:
    """Run a step unless an input failed or its result is cached; its failure is told, not raised."""
    begun = time.monotonic()
    failed = next((outcome for outcome in inputs if outcome.record is None), None)
    if failed is not None:
        return record_skipped(request, failed)
    run_id: str | None = None
    try:
        records = {outcome.label: outcome.record for outcome in inputs}
        arguments = resolve(request.arguments, lambda ref: records[ref.label])
        fingerprint = request.step.fingerprint(arguments)
        left = running_run(request)
        # Without inputs to wait for, the driver has looked a moment ago.
        if inputs or left is not None:
            found = look_up(request.tracking, request.step, fingerprint, arguments, request.flow_run_id)
            if found.record is not None:
                return _take_over(request, fingerprint, found, left)
        run_id = _begin(request, arguments, fingerprint, left)
        line = StepLine(request.tracking, run_id, request.label, request.flow_run_id, fingerprint)
        lease = take_step_lease(line, request.workspace, request.step.name)
        # Another may have finished it since the last look, with or without a wait.
        found = look_up(request.tracking, request.step, fingerprint, arguments, request.flow_run_id)
        if found.record is not None:
            return _finish_reused(request, found, run_id)
        context = StepContext(
            workspace=request.workspace,
            tracking=request.tracking,
            flow_run_id=request.flow_run_id,
            run_id=run_id,
            step=request.step.name,
            label=request.label,
            fingerprint=fingerprint,
            lease=lease,
            runtime=request.runtime,
            flow=request.flow,
        )
        heading = f"{request.label} begins in process {os.getpid()} on {socket.gethostname()}, run {run_id}"
        with recording(_log_uri(request), heading):
            record = request.step.run(context, arguments)
        keep_with_run(request.tracking, run_id, _log_uri(request))
        checksums = output_checksums(record, context.output_uri())
        # Whoever overtook this execution has its own record of what lies there.
        lease.check()
        _record_done(request.tracking, run_id, fingerprint, record, checksums, folder_bytes(context.output_uri()))
    except Exception as error:
        return record_failed(request, run_id, one_line(error), traceback.format_exc())
    except BaseException:
        if run_id is not None:
            tags = {Tag.STATE: RunState.KILLED, Tag.ERROR: "interrupted", **note_tag(RunState.KILLED, "interrupted")}
            request.tracking.end_run(run_id, "KILLED", tags)
            keep_with_run(request.tracking, run_id, _log_uri(request))
        raise
    seconds = time.monotonic() - begun
    return Outcome(
        label=request.label,
        state=RunState.DONE,
        record=record,
        run_id=run_id,
        note=found.note,
        seconds=seconds,
    )


def resolve(value: Any, get: Callable[[StepRef[Any]], Any]) -> Any:
    """`value` with every StepRef in it, at any depth of lists, tuples and dicts, replaced by `get(ref)`."""
    match value:
        case StepRef():
            return get(value)
        case dict():
            return {key: resolve(item, get) for key, item in value.items()}
        case list():
            return [resolve(item, get) for item in value]
        case tuple() if not hasattr(value, "_fields"):
            return tuple(resolve(item, get) for item in value)
    return value


def record_reused(request: StepRequest, fingerprint: str, found: CacheLookup) -> Outcome:
    """Record the step as reused from the run that holds its record."""
    tags = _tags(request, RunState.REUSED, fingerprint) | {Tag.REUSED_FROM: str(found.run_id)}
    run_id = _create_run(request, tags | note_tag(RunState.REUSED, f"from run {found.run_id}"))
    request.tracking.client().set_terminated(run_id, "FINISHED")
    return Outcome(label=request.label, state=RunState.REUSED, record=found.record, run_id=run_id)


def record_skipped(request: StepRequest, failed: Outcome) -> Outcome:
    """Record that the step did not run because an input failed; the root cause is handed on unchanged."""
    cause = str(failed.error if failed.state == RunState.SKIPPED else f"{failed.label}: {failed.error}")
    run_id = None
    # What broke the input may stand in the way of records, too; the cause is what counts.
    with suppress(Exception):
        if request.tracking.is_reachable():
            tags = _tags(request, RunState.SKIPPED, None) | {Tag.ERROR: cause}
            run_id = _create_run(request, tags | note_tag(RunState.SKIPPED, cause))
            request.tracking.client().set_terminated(run_id, "FAILED")
    return Outcome(label=request.label, state=RunState.SKIPPED, run_id=run_id, error=cause)


def record_failed(request: StepRequest, run_id: str | None, cause: str, details: str) -> Outcome:
    """Record a failure on the run, created where there is none; the traceback goes there and to the step's log.

    On a full disk or without its server nothing of that may be possible; the outcome tells the cause all the same.
    """
    log_uri: str | None = _log_uri(request)
    try:
        append_text(str(log_uri), details)
    except OSError:
        log_uri = None
    with suppress(Exception):
        if request.tracking.is_reachable():
            run_id = run_id or _create_run(request, _tags(request, RunState.FAILED, None))
            tags = {Tag.STATE: RunState.FAILED, Tag.ERROR: cause, **note_tag(RunState.FAILED, cause)}
            try:
                request.tracking.client().log_text(run_id, masked(details), TRACEBACK_FILE)
                keep_with_run(request.tracking, run_id, _log_uri(request))
            finally:
                request.tracking.end_run(run_id, "FAILED", tags)
    return Outcome(
        label=request.label,
        state=RunState.FAILED,
        run_id=run_id,
        error=cause,
        traceback=details,
        log_uri=log_uri,
    )


def running_run(request: StepRequest) -> Run | None:
    """The run that an earlier attempt of this very step left running, or None."""
    wanted = (
        f"tags.`{Tag.PARENT}` = '{request.flow_run_id}' and tags.`{Tag.LABEL}` = '{request.label}' "
        "and attributes.status = 'RUNNING'"
    )
    return next(iter(request.tracking.first_runs(wanted, 1)), None)


def _begin(request: StepRequest, arguments: Mapping[str, Any], fingerprint: str, left: Run | None) -> str:
    # After the death of its worker process Ray runs a step again; it goes on under the same MLflow run.
    tags = _tags(request, RunState.RUNNING, fingerprint) | in_line_tags()
    if left is not None:
        run_id = str(left.info.run_id)
        request.tracking.set_tags(run_id, tags)
    else:
        run_id = _create_run(request, tags)
    request.tracking.log_params(run_id, _params(arguments))
    return run_id


def _record_done(
    tracking: Tracking, run_id: str, fingerprint: str, record: Record, checksums: Mapping[str, str], num_bytes: int
) -> None:
    text = record.to_json()
    tracking.client().log_text(run_id, text, RECORD_FILE)
    tags = {
        Tag.STATE: RunState.DONE,
        Tag.RECORD_DIGEST: _sha256(text),
        Tag.OUTPUTS: json.dumps(checksums),
        Tag.BYTES: str(num_bytes),
        Tag.DONE: fingerprint,
        **note_tag(RunState.DONE),
    }
    # All at once, and before the run's end, with which the claim lapses: nobody shall see it ended and not done.
    tracking.end_run(run_id, "FINISHED", tags)


def _take_over(request: StepRequest, fingerprint: str, found: CacheLookup, left: Run | None) -> Outcome:
    if left is None:
        return record_reused(request, fingerprint, found)
    if found.run_id != left.info.run_id:
        return _finish_reused(request, found, left.info.run_id)
    # An earlier attempt had done everything but to end its run.
    request.tracking.client().set_terminated(left.info.run_id, "FINISHED")
    return Outcome(label=request.label, state=RunState.DONE, record=found.record, run_id=found.run_id)


def _finish_reused(request: StepRequest, found: CacheLookup, run_id: str) -> Outcome:
    tags = {
        Tag.STATE: RunState.REUSED,
        Tag.REUSED_FROM: str(found.run_id),
        **note_tag(RunState.REUSED, f"from run {found.run_id}"),
    }
    request.tracking.end_run(run_id, "FINISHED", tags)
    return Outcome(label=request.label, state=RunState.REUSED, record=found.record, run_id=run_id)


def _log_uri(request: StepRequest) -> str:
    return log_uri_of(request.workspace, request.flow_run_id, request.label)


def _changed_outputs(run: Run) -> str | None:
    try:
        return changed_outputs(json.loads(run.data.tags.get(Tag.OUTPUTS, "{}")))
    except (OSError, ValueError) as error:
        return f"its outputs cannot be verified ({error})"


def _create_run(request: StepRequest, tags: Mapping[str, str]) -> str:
    return request.tracking.create_run(request.label, tags)


def _tags(request: StepRequest, state: RunState, fingerprint: str | None) -> dict[str, str]:
    tags = {
        Tag.KIND: "step",
        Tag.PARENT: request.flow_run_id,
        Tag.FLOW: request.flow,
        Tag.STEP: request.step.name,
        Tag.VERSION: str(request.step.version),
        Tag.LABEL: request.label,
        Tag.STATE: state.value,
        Tag.DEPENDS_ON: json.dumps(request.depends_on),
        "mlflow.user": current_user(),
    }
    return tags | ({Tag.FINGERPRINT: fingerprint} if fingerprint is not None else {})


def _params(arguments: Mapping[str, Any]) -> list[Param]:
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Record):
            plain[name] = value.content_digest()[:16]
        else:
            plain[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return flatten(plain)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
