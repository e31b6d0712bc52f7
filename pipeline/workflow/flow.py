"""Flows: plain functions that call steps and pass references on; finished steps are cached by MLflow.

    def recipe(flow: Graph, config: Config) -> StepRef[Evaluation]:
        shards = flow.step(prepare, config.data)
        checkpoint = flow.step(train, shards, config.train, label="train/full")
        return flow.step(evaluate, checkpoint, shards)

    with Flow(workspace, tracking, "quickstart", config) as flow:
        recipe(flow, config)

A step whose inputs are known and whose result is cached costs a query. Any other becomes a Ray task that
waits for its inputs as object references; Ray starts with the first such task. Independent branches run in
parallel because nothing orders them.
"""

from __future__ import annotations

import json
import logging
import textwrap
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import yaml
from pydantic import BaseModel

from pipeline.errors import UserError
from pipeline.masking import masked
from pipeline.records import Record
from pipeline.workflow import execution, exported, liveness, ray_session, runs
from pipeline.workflow.driver_watch import DriverWatch, FlowTerminated
from pipeline.workflow.execution import CacheLookup, Outcome, StepRef, StepRequest
from pipeline.workflow.graph import Graph, Node, Plan
from pipeline.workflow.step import Step
from pipeline.workflow.tracking import PLAN_FILE, RunState, Tag, Tracking, current_user, note_tag
from pipeline.workflow.workspace_format import enter_workspace, store_name

R = TypeVar("R", bound=Record)

RETRIES_AFTER_CRASH = 2
POLL_S = 1.0

__all__ = [
    "Flow",
    "FlowEvent",
    "FlowFailed",
    "FlowTerminated",
    "Graph",
    "Plan",
    "StepFailure",
    "StepRef",
]


@dataclass(frozen=True, slots=True)
class FlowEvent:
    """Something a person watching a flow wants to know.

    Attributes:
        state: RUNNING when the inputs are there and the step is about to start, else how it ended.
        message: cause of a failure, or why a cached result was not used.
        index: position in the flow, from 1.
    """

    label: str
    state: RunState
    index: int
    message: str | None = None
    seconds: float = 0.0
    run_id: str | None = None
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A root cause: the step that failed of itself, the cause in one line, and where the traceback lies."""

    label: str
    cause: str
    run_id: str | None
    log_uri: str | None
    traceback: str | None


class FlowFailed(UserError):  # noqa: N818 - reads as what happened, like KeyboardInterrupt
    """Steps of the flow failed; the message names each root cause in one line."""

    def __init__(self, flow: str, failures: tuple[StepFailure, ...]) -> None:
        self.failures = failures
        self.causes = "\n".join(f"{failure.label}: {failure.cause}" for failure in failures)
        super().__init__(f"flow {flow} failed\n" + textwrap.indent(self.causes, "  "))


class Flow(Graph):
    """Runs a recipe; a context manager around it. Leaving the block waits for all steps.

    Args:
        workspace: folder or URI under which steps keep their outputs.
        tracking: the MLflow store that keeps runs and records.
        name: the flow's name.
        config: what the flow was made from, kept with its run.
        runtime: given to every step as `context.runtime`; never part of a fingerprint.
        ray_options: arguments of `ray.init`, asked for when Ray has to start.
        on_event: called in the driver whenever a step starts or ends.

    Raises:
        FlowFailed: on leaving, when steps failed; independent branches have run to their end by then.
    """

    def __init__(
        self,
        workspace: str,
        tracking: Tracking,
        name: str,
        config: BaseModel | Mapping[str, Any] | None = None,
        *,
        runtime: Any = None,
        ray_options: Callable[[], dict[str, Any]] = ray_session.default_options,
        on_event: Callable[[FlowEvent], None] | None = None,
    ) -> None:
        super().__init__(workspace, tracking)
        self.name = name
        self.config = config
        self.runtime = runtime
        self.run_id = ""
        self._ray_options = ray_options
        self._on_event = on_event
        self._started_ray = False
        self._planned_steps = 0
        self._watch = DriverWatch(tracking)

    def __enter__(self) -> Self:
        enter_workspace(self.workspace, store_name(self.workspace, self.tracking.uri, self.tracking.experiment))
        runs.mark_abandoned(self.tracking)
        self.tracking.experiment_id()
        # What comes before leaves nothing behind, and may be ended by a signal as it likes.
        self._watch = DriverWatch(self.tracking, (Flow.__enter__.__code__, Flow.__exit__.__code__))
        self._watch.take_signals()
        try:
            self._create_run()
            self._watch.start(self.run_id)
        except BaseException as error:
            if self.run_id:
                self._finish(RunState.FAILED, "FAILED", execution.one_line(error))
            self._watch.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # In the lines of this function itself a signal is only noted; what they call is broken off until a cause for
        # the end is known.
        try:
            if error is None or isinstance(error, FlowFailed):
                self.wait()
            else:
                raise error
            self._watch.interruptible = False
        except FlowFailed as failed:
            self._watch.interruptible = False
            self._finish(RunState.FAILED, "FAILED", failed.causes)
            raise failed from None
        except Exception as mistake:
            self._watch.interruptible = False
            self._cancel(f"the flow failed: {execution.one_line(mistake)}")
            self._finish(RunState.FAILED, "FAILED", execution.one_line(mistake))
            if mistake is not error:
                raise
        except BaseException as stop:
            self._watch.interruptible = False
            reason = self._watch.stop_reason()
            self._cancel(reason)
            self._finish(RunState.KILLED, "KILLED", reason)
            # Ray turns whatever a signal handler raises while it waits into a KeyboardInterrupt.
            if self._watch.terminated:
                raise FlowTerminated(reason) from None
            if stop is not error:
                raise
        else:
            self._finish(RunState.FINISHED, "FINISHED", None)
        finally:
            if self._started_ray:
                ray_session.stop()
            self._watch.release()
        if error is None:
            # Asked while the run was being marked as finished, which it was.
            self._watch.check()

    def result(self, ref: StepRef[R]) -> R:
        """The record of a step, waited for; raises FlowFailed naming its root cause."""
        node = self._nodes[ref.label]
        self._drain(until=node)
        assert node.outcome is not None
        if node.outcome.record is None:
            raise FlowFailed(self.name, self._failures())
        return cast("R", node.outcome.record)

    def wait(self) -> dict[str, Record]:
        """Wait for all steps; their records by label. Raises FlowFailed naming every root cause."""
        self._drain(until=None)
        if failures := self._failures():
            raise FlowFailed(self.name, failures)
        return {label: self._record_of(node.ref) for label, node in self._nodes.items()}

    def _look_up(self, step: Step[..., Any], fingerprint: str, arguments: dict[str, Any]) -> CacheLookup:
        return execution.look_up(self.tracking, step, fingerprint, arguments, self.run_id)

    def _added(self, node: Node) -> None:
        if node.failed_input is not None:
            self._settled(node, execution.record_skipped(self._request(node), node.failed_input))
        elif node.found.record is not None:
            self._settled(node, execution.record_reused(self._request(node), str(node.fingerprint), node.found))
        else:
            self._start_ray()
            node.at_once = node.step.at_once(self.runtime) if node.step.at_once else None
            self._submit_ready()

    def _submit_ready(self) -> None:
        """Submit steps in their order: none before its inputs, nor before its turn among the uses of its step."""
        for node in self._nodes.values():
            if not node.is_waiting or any(one.is_waiting for one in node.inputs):
                continue
            if node.failed_input is not None:
                self._settled(node, execution.record_skipped(self._request(node), node.failed_input))
                continue
            if node.at_once is not None:
                # What waits for its inputs takes no turn.
                under_way = sum(one.step is node.step and one.is_under_way for one in self._nodes.values())
                if not node.inputs_known or under_way >= node.at_once:
                    continue
            # A task without its reference could not be cancelled.
            with self._watch.uninterrupted():
                node.object_ref = ray_session.submit(
                    execution.execute_step,
                    self._request(node),
                    *(one.object_ref or one.outcome for one in node.inputs),
                    name=node.ref.label,
                    max_retries=RETRIES_AFTER_CRASH,
                )
        self._announce_ready()

    def _start_ray(self) -> None:
        try:
            self._started_ray |= ray_session.start(self._ray_options)
            self._watch.take_signals()
        except SystemExit:
            # Ray ends the process by itself where SIGTERM strikes while it starts.
            self._watch.terminate()

    def _drain(self, until: Node | None) -> None:
        self._watch.check()
        self._log_plan()
        while pending := [node for node in self._nodes.values() if node.outcome is None]:
            if until is not None and until.outcome is not None:
                return
            self._watch.check()
            ready = ray_session.wait([node.object_ref for node in pending if node.is_under_way], POLL_S)
            if not ready:
                ray_session.require_cluster()
            for node in pending:
                if node.is_under_way and node.object_ref in ready:
                    self._collect(node)
            self._submit_ready()

    def _collect(self, node: Node) -> None:
        if node.outcome is not None:
            return
        for one in node.inputs:
            # A crashed task takes its dependants with it at once; the root has to be told from them.
            if one.outcome is None and ray_session.wait([one.object_ref], 0.0):
                self._collect(one)
        try:
            outcome = cast("Outcome", ray_session.get(node.object_ref))
        except Exception as error:
            request = self._request(node)
            failed = node.failed_input
            if failed is not None:
                outcome = execution.record_skipped(request, failed)
            else:
                outcome = execution.record_failed(
                    request,
                    self._left_running(request),
                    f"its process died or could not start ({execution.one_line(error)})",
                    "".join(traceback.format_exception(error)),
                )
        self._settled(node, outcome)
        self._announce_ready()

    def _settled(self, node: Node, outcome: Outcome) -> None:
        node.outcome = outcome
        message = outcome.error or outcome.note
        self._emit(node, outcome.state, message, outcome.seconds, outcome.run_id, outcome.traceback)

    def _announce_ready(self) -> None:
        for node in self._nodes.values():
            if node.is_under_way and node.inputs_known and not node.announced:
                node.announced = True
                self._emit(node, RunState.RUNNING, node.found.note)

    def _emit(
        self,
        node: Node,
        state: RunState,
        message: str | None = None,
        seconds: float = 0.0,
        run_id: str | None = None,
        details: str | None = None,
    ) -> None:
        exported.record_step(self.name, self.run_id, node.ref.label, state, seconds)
        if self._on_event is not None:
            self._on_event(FlowEvent(node.ref.label, state, node.index, message, seconds, run_id, details))

    def _failures(self) -> tuple[StepFailure, ...]:
        outcomes = [node.outcome for node in self._nodes.values() if node.outcome is not None]
        return tuple(
            StepFailure(one.label, one.error or "", one.run_id, one.log_uri, one.traceback)
            for one in outcomes
            if one.state == RunState.FAILED
        )

    def _request(self, node: Node) -> StepRequest:
        # References to known records are replaced here; those that remain reach the task as Ray objects.
        def known(ref: StepRef[Any]) -> Any:
            one = self._nodes[ref.label]
            return ref if one.object_ref is not None or one.outcome is None else one.outcome.record or ref

        return StepRequest(
            step=node.step,
            label=node.ref.label,
            arguments=cast("dict[str, Any]", execution.resolve(node.arguments, known)),
            depends_on=node.depends_on,
            workspace=self.workspace,
            tracking=self.tracking.patient(),
            flow=self.name,
            flow_run_id=self.run_id,
            runtime=self.runtime,
        )

    def _create_run(self) -> None:
        tags = {
            Tag.KIND: "flow",
            Tag.FLOW: self.name,
            Tag.STATE: RunState.RUNNING.value,
            Tag.WORKSPACE: self.workspace,
            Tag.TOKEN: uuid.uuid4().hex,
            "mlflow.user": current_user(),
            **liveness.identity_tags(),
        }
        self.run_id = self.tracking.create_run(self.name, tags)
        config = self.config.model_dump(mode="json") if isinstance(self.config, BaseModel) else self.config
        if config:
            text = masked(yaml.safe_dump(dict(config), sort_keys=False))
            self.tracking.client().log_text(self.run_id, text, "config.yaml")
            self.tracking.log_params(self.run_id, config)

    def _log_plan(self) -> None:
        if len(self._nodes) > self._planned_steps:
            self._planned_steps = len(self._nodes)
            plan = [planned.model_dump(mode="json") for planned in self._planned()]
            self.tracking.client().log_text(self.run_id, json.dumps(plan), PLAN_FILE)

    def _cancel(self, reason: str) -> None:
        pending = [node.object_ref for node in self._nodes.values() if node.outcome is None]
        ray_session.cancel(pending)
        self._write(lambda: runs.end_running_children(self.tracking, self.run_id, RunState.KILLED, reason))

    def _finish(self, state: RunState, status: str, error: str | None) -> None:
        self._watch.stop_beating()
        outcomes = [node.outcome for node in self._nodes.values() if node.outcome is not None]
        counts = runs.count_states(outcome.state for outcome in outcomes)
        tags = {Tag.STATE: state.value, Tag.COUNTS: json.dumps(counts), **note_tag(state, error)}

        def end() -> None:
            runs.end_running_children(self.tracking, self.run_id, RunState.KILLED, "left over when its flow ended")
            self.tracking.end_run(self.run_id, status, tags | ({Tag.ERROR: error} if error else {}))

        self._write(end)

    def _write(self, write: Callable[[], None]) -> None:
        """Write how things ended; where the store is full or away, the next flow finds and marks what is left."""
        try:
            if self.tracking.is_reachable():
                write()
        except Exception as error:
            logging.getLogger(__name__).warning(
                "the end of run %s could not be recorded: %s", self.run_id[:12], execution.one_line(error)
            )

    def _left_running(self, request: StepRequest) -> str | None:
        with suppress(Exception):
            left = execution.running_run(request)
            return str(left.info.run_id) if left is not None else None
        return None
