"""What a recipe is written against, and the plan: a recipe's steps looked up, nothing executed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from pipeline import storage
from pipeline.records import Record
from pipeline.workflow import execution
from pipeline.workflow.execution import CacheLookup, Outcome, StepRef
from pipeline.workflow.runs import PlannedStep
from pipeline.workflow.step import Step
from pipeline.workflow.tracking import RunState, Tracking

R = TypeVar("R", bound=Record)


@dataclass(eq=False)
class Node:
    """A step within a flow: its arguments, what it waits for, and how it ended."""

    step: Step[..., Any]
    arguments: dict[str, Any]
    ref: StepRef[Any]
    index: int
    inputs: list[Node]
    fingerprint: str | None = None
    outcome: Outcome | None = None
    object_ref: Any = None
    announced: bool = False
    at_once: int | None = None
    found: CacheLookup = field(default=CacheLookup(None))

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Labels of the steps whose records it takes."""
        return tuple(node.ref.label for node in self.inputs)

    @property
    def failed_input(self) -> Outcome | None:
        """The outcome of an input that gave no record, if one has ended so."""
        ended = (node.outcome for node in self.inputs if node.outcome is not None)
        return next((outcome for outcome in ended if outcome.record is None), None)

    @property
    def is_under_way(self) -> bool:
        """Whether its task was submitted and has not been collected."""
        return self.object_ref is not None and self.outcome is None

    @property
    def is_waiting(self) -> bool:
        """Whether its task has still to be submitted."""
        return self.object_ref is None and self.outcome is None

    @property
    def inputs_known(self) -> bool:
        """Whether every input has its record."""
        return all(node.outcome is not None and node.outcome.record is not None for node in self.inputs)


class Graph(ABC):
    """What a recipe is written against: a Flow runs its steps, a Plan only looks them up.

    Args:
        workspace: folder or URI under which steps keep their outputs.
        tracking: the MLflow store that keeps runs and records.
    """

    def __init__(self, workspace: str, tracking: Tracking) -> None:
        self.workspace = str(storage.local_path(workspace).absolute()) if storage.is_local(workspace) else workspace
        self.tracking = tracking
        self._nodes: dict[str, Node] = {}

    def step(self, step: Step[..., R], *args: Any, label: str | None = None, **params: Any) -> StepRef[R]:
        """Add a step to the flow.

        Args:
            step: a function decorated with `pipeline.workflow.step.step`.
            args, params: its arguments after the context; StepRefs, alone or in lists, tuples and dicts,
                stand for the records of earlier steps.
            label: its name within the flow; needed where a step is used twice.

        Raises:
            ValueError: the label is taken, or a reference belongs to another flow.
            TypeError: the arguments do not fit the step, or one has no canonical form.
        """
        name = label or step.name
        if name in self._nodes:
            raise ValueError(f"label {name!r} is taken in this flow; give this use of {step.name} its own label")
        arguments = step.bind(args, params)
        inputs: list[Node] = []

        def note(ref: StepRef[Any]) -> StepRef[Any]:
            node = self._nodes.get(ref.label)
            if node is None or node.ref is not ref:
                raise ValueError(f"step {name!r} was given a reference to {ref.label!r} of another flow")
            if node not in inputs:
                inputs.append(node)
            return ref

        # With names in place of records: an argument of no canonical form is told here, not in a task.
        step.fingerprint(execution.resolve(arguments, lambda ref: note(ref).label))
        node = Node(step, arguments, StepRef(name, step.name), len(self._nodes) + 1, inputs)
        self._nodes[name] = node
        if node.inputs_known:
            known = execution.resolve(arguments, self._record_of)
            node.fingerprint = step.fingerprint(known)
            node.found = self._look_up(step, node.fingerprint, known)
        self._added(node)
        return cast("StepRef[R]", node.ref)

    def find(self, label: str) -> StepRef[Any] | None:
        """The step of that label, where the flow has one already."""
        node = self._nodes.get(label)
        return node.ref if node else None

    @abstractmethod
    def result(self, ref: StepRef[R]) -> R:
        """The record of a step, waited for; a Plan ends where it is not known."""

    @abstractmethod
    def _added(self, node: Node) -> None: ...

    def _look_up(self, step: Step[..., Any], fingerprint: str, arguments: dict[str, Any]) -> CacheLookup:
        return execution.look_up(self.tracking, step, fingerprint, arguments)

    def _record_of(self, ref: StepRef[Any]) -> Record:
        outcome = self._nodes[ref.label].outcome
        assert outcome is not None
        assert outcome.record is not None
        return outcome.record

    def _planned(self) -> tuple[PlannedStep, ...]:
        return tuple(
            PlannedStep(
                label=node.ref.label,
                step=node.step.name,
                version=node.step.version,
                cached=node.found.record is not None,
                depends_on=node.depends_on,
                fingerprint=node.fingerprint,
                run_id=node.found.run_id,
                note=node.found.note,
            )
            for node in self._nodes.values()
        )


class _BeyondPlan(Exception):  # noqa: N818 - not an error: a plan ends here
    """The recipe asks for a record that only running would give."""


class Plan(Graph):
    """Looks up which steps are cached; executes nothing and writes nothing.

    Use it as a context manager around the recipe: a recipe that asks for the record of a step yet to run ends
    there, and `complete` is then False.
    """

    def __init__(self, workspace: str, tracking: Tracking) -> None:
        super().__init__(workspace, tracking)
        self.complete = True

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """The steps in the order in which the recipe names them."""
        return self._planned()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.complete = not isinstance(error, _BeyondPlan)
        return not self.complete

    def result(self, ref: StepRef[R]) -> R:
        """The cached record; ends the plan where there is none."""
        node = self._nodes[ref.label]
        if node.outcome is None:
            raise _BeyondPlan
        return cast("R", self._record_of(ref))

    def _look_up(self, step: Step[..., Any], fingerprint: str, arguments: dict[str, Any]) -> CacheLookup:
        # Looked for first, so that planning in a fresh workspace neither imports MLflow nor creates anything.
        return super()._look_up(step, fingerprint, arguments) if self.tracking.exists() else CacheLookup(None)

    def _added(self, node: Node) -> None:
        if node.found.record is not None:
            node.outcome = Outcome(label=node.ref.label, state=RunState.REUSED, record=node.found.record)
