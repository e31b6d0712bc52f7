"""One step, executed once: looked up, claimed, run, recorded, all in the process that runs it.

Claims are Lamport's bakery over the tracking store: whoever wants to execute a fingerprint shows it on a
running step run, takes a ticket above all it sees, and goes when no earlier ticket is left. So claims span
clusters that share a store, and need no process of their own; a claim lapses with its flow's driver. They
only save work: outputs are published by rename, so even two executions at once would do no harm.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline import liveness, storage
from pipeline.errors import UserError, root_cause
from pipeline.records import Record
from pipeline.step import Step, StepContext
from pipeline.tracking import RECORD_FILE, TRACEBACK_FILE, Param, RunState, Tag, Tracking, flatten, who

if TYPE_CHECKING:
    from mlflow.entities import Run

R = TypeVar("R", bound=Record)

POLL_S = 1.0
MAX_CAUSE_LENGTH = 400
CHOOSING = "choosing"


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
        note: why a remembered result was not used.
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


class Remembered(NamedTuple):
    """A record found in the store and the run that holds it; without one, `note` may say why."""

    record: Record | None
    run_id: str | None = None
    note: str | None = None


def recall(tracking: Tracking, step: Step[..., Any], fingerprint: str) -> Remembered:
    """Look for a finished execution of a fingerprint whose record is intact and whose outputs verify."""
    note = None
    for run in tracking.first_runs(f"tags.`{Tag.DONE}` = '{fingerprint}'", 3):
        text = tracking.read_text(run.info.run_id, RECORD_FILE)
        if text is None or _sha256(text) != run.data.tags.get(Tag.RECORD_DIGEST):
            note = f"the record of run {run.info.run_id[:8]} is missing or was changed"
            continue
        try:
            record = step.record_type.from_json(text)
        except ValidationError:
            note = f"the record of run {run.info.run_id[:8]} is of another form"
            continue
        note = step.broken_outputs(record, tracking)
        if note is None:
            return Remembered(record, str(run.info.run_id))
    return Remembered(None, note=note)


def execute_step(request: StepRequest, *inputs: Outcome) -> Outcome:
    """Run a step unless an input failed or its result is remembered; its failure is told, not raised."""
    begun = time.monotonic()
    failed = next((outcome for outcome in inputs if outcome.record is None), None)
    if failed is not None:
        return record_skipped(request, failed)
    records = {outcome.label: outcome.record for outcome in inputs}
    arguments = resolve(request.arguments, lambda ref: records[ref.label])
    fingerprint = request.step.fingerprint(arguments)
    found = recall(request.tracking, request.step, fingerprint)
    if found.record is not None:
        return record_reused(request, fingerprint, found)
    run_id = _begin(request, arguments, fingerprint)
    try:
        if _wait_for_turn(request, fingerprint, run_id):
            found = recall(request.tracking, request.step, fingerprint)
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
            runtime=request.runtime,
        )
        record = request.step.run(context, arguments)
        _record_done(request.tracking, run_id, fingerprint, record)
    except Exception as error:
        return record_failed(request, run_id, one_line(error), traceback.format_exc())
    except BaseException:
        tags = {Tag.STATE: RunState.KILLED, Tag.ERROR: "interrupted"}
        request.tracking.end_run(run_id, "KILLED", tags)
        raise
    seconds = time.monotonic() - begun
    return Outcome(
        label=request.label,
        state=RunState.RUN,
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


def record_reused(request: StepRequest, fingerprint: str, found: Remembered) -> Outcome:
    """Record the step as reused from the run that holds its record."""
    tags = _tags(request, RunState.REUSED, fingerprint) | {Tag.REUSED_FROM: str(found.run_id)}
    run_id = _create_run(request, tags)
    request.tracking.client().set_terminated(run_id, "FINISHED")
    return Outcome(label=request.label, state=RunState.REUSED, record=found.record, run_id=run_id)


def record_skipped(request: StepRequest, failed: Outcome) -> Outcome:
    """Record that the step did not run because an input failed; the root cause is handed on unchanged."""
    cause = failed.error if failed.state == RunState.SKIPPED else f"{failed.label}: {failed.error}"
    tags = _tags(request, RunState.SKIPPED, None) | {Tag.ERROR: str(cause)}
    run_id = _create_run(request, tags)
    request.tracking.client().set_terminated(run_id, "FAILED")
    return Outcome(label=request.label, state=RunState.SKIPPED, run_id=run_id, error=cause)


def record_failed(request: StepRequest, run_id: str | None, cause: str, details: str) -> Outcome:
    """Record a failure on the run, created where there is none; the traceback goes there and to a file."""
    run_id = run_id or _create_run(request, _tags(request, RunState.FAILED, None))
    name = f"{request.label.replace('/', '-')}.log"
    log_uri = storage.join(request.workspace, "logs", request.flow_run_id, name)
    storage.publish_bytes(log_uri, details.encode())
    request.tracking.client().log_text(run_id, details, TRACEBACK_FILE)
    request.tracking.end_run(run_id, "FAILED", {Tag.STATE: RunState.FAILED, Tag.ERROR: cause})
    return Outcome(
        label=request.label,
        state=RunState.FAILED,
        run_id=run_id,
        error=cause,
        traceback=details,
        log_uri=log_uri,
    )


def running_run(request: StepRequest) -> str | None:
    """The run that an earlier attempt of this very step left running, or None."""
    wanted = (
        f"tags.`{Tag.PARENT}` = '{request.flow_run_id}' and tags.`{Tag.LABEL}` = '{request.label}' "
        "and attributes.status = 'RUNNING'"
    )
    found = request.tracking.first_runs(wanted, 1)
    return str(found[0].info.run_id) if found else None


def one_line(error: BaseException) -> str:
    """The cause of a failure in one line: a UserError's message, or type and message of the root cause."""
    # Ray hands on the exception of a remote task inside a wrapper that is of the same class, too.
    wrapped = getattr(error, "cause", None)
    cause = wrapped if isinstance(wrapped, UserError) else error
    if isinstance(cause, UserError):
        return _shorten(str(cause))
    cause = root_cause(cause)
    message = _shorten(str(cause))
    if isinstance(cause, UserError):
        return message
    return f"{type(cause).__name__}: {message}" if message else type(cause).__name__


def _begin(request: StepRequest, arguments: Mapping[str, Any], fingerprint: str) -> str:
    # After the death of its worker process Ray runs a step again; it goes on under the same MLflow run.
    tags = _tags(request, RunState.RUNNING, fingerprint) | {Tag.TICKET: CHOOSING}
    run_id = running_run(request)
    if run_id is not None:
        request.tracking.set_tags(run_id, tags)
        return run_id
    run_id = _create_run(request, tags)
    request.tracking.log_params(run_id, _params(arguments))
    return run_id


def _wait_for_turn(request: StepRequest, fingerprint: str, run_id: str) -> bool:
    """Wait until no earlier claim on the fingerprint is alive; returns whether there was one."""
    tickets = [_ticket(run) for run in _other_claims(request, fingerprint, run_id)]
    mine = 1 + max((ticket for ticket in tickets if ticket is not None), default=0)
    request.tracking.set_tags(run_id, {Tag.TICKET: str(mine)})
    waited = False
    while True:
        earlier = [
            run
            for run in _other_claims(request, fingerprint, run_id)
            if (_ticket(run) or 0, run.info.run_id) < (mine, run_id) and _is_alive(request, run)
        ]
        if not earlier:
            return waited
        if not waited:
            print(f"{request.label}: the same step runs in {earlier[0].info.run_id[:8]}; waiting", flush=True)
        waited = True
        time.sleep(POLL_S)


def _other_claims(request: StepRequest, fingerprint: str, run_id: str) -> Sequence[Run]:
    wanted = f"tags.`{Tag.FINGERPRINT}` = '{fingerprint}' and attributes.status = 'RUNNING'"
    return [run for run in request.tracking.runs(wanted) if run.info.run_id != run_id]


def _ticket(run: Run) -> int | None:
    ticket = run.data.tags.get(Tag.TICKET, CHOOSING)
    return int(ticket) if ticket.isdigit() else None


def _is_alive(request: StepRequest, run: Run) -> bool:
    flow_run_id = run.data.tags[Tag.PARENT]
    if flow_run_id == request.flow_run_id:
        return True
    flow = request.tracking.client().get_run(flow_run_id)
    return flow.info.status == "RUNNING" and liveness.why_dead(flow.data.tags) is None


def _record_done(tracking: Tracking, run_id: str, fingerprint: str, record: Record) -> None:
    text = record.to_json()
    tracking.client().log_text(run_id, text, RECORD_FILE)
    tracking.end_run(run_id, "FINISHED", {Tag.STATE: RunState.RUN, Tag.RECORD_DIGEST: _sha256(text)})
    tracking.client().set_tag(run_id, Tag.DONE, fingerprint)


def _finish_reused(request: StepRequest, found: Remembered, run_id: str) -> Outcome:
    tags = {Tag.STATE: RunState.REUSED, Tag.REUSED_FROM: str(found.run_id)}
    request.tracking.end_run(run_id, "FINISHED", tags)
    return Outcome(label=request.label, state=RunState.REUSED, record=found.record, run_id=run_id)


def _create_run(request: StepRequest, tags: Mapping[str, str]) -> str:
    client = request.tracking.client()
    run = client.create_run(request.tracking.experiment_id(), run_name=request.label, tags=dict(tags))
    return str(run.info.run_id)


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
        "mlflow.user": who(),
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


def _shorten(message: str) -> str:
    # Ray appends the traceback to some messages; it is kept in full elsewhere.
    lead, *_ = re.split(r"\btraceback\b[: (]", message, maxsplit=1, flags=re.IGNORECASE)
    line = " ".join((lead if lead.strip() else message).split())
    return line if len(line) <= MAX_CAUSE_LENGTH else line[: MAX_CAUSE_LENGTH - 3] + "..."
