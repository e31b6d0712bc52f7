"""Steps: plain functions with a fingerprint of everything that can change what they return.

The rule is short: all arguments of a step are part of its fingerprint, and nothing in its StepContext is.
So data, configuration and input records are arguments; the workspace, the tracking server, and settings that
change speed but never results come with the context.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from pydantic import BaseModel

from pipeline import storage
from pipeline.records import Record
from pipeline.workflow.lease import Lease
from pipeline.workflow.progress import StepProgress

if TYPE_CHECKING:
    from pipeline.workflow.tracking import Tracking

P = ParamSpec("P")
R = TypeVar("R", bound=Record)

RESERVED_PARAMETERS = ("label",)


class NotFingerprinted:
    """Marks a field of a pydantic model, `Annotated[int, NotFingerprinted]`, that changes no result of any step."""


class CountedWhenSet:
    """Marks a field of a pydantic model that was added later: None is as if the model did not have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """Where a step runs. None of it is part of the fingerprint, so none of it may change the step's result.

    Attributes:
        workspace: folder or URI under which steps keep their outputs.
        tracking: the MLflow store; pass it on explicitly, workers inherit no environment.
        flow_run_id: the flow's MLflow run.
        run_id: the step's own MLflow run, for metrics and artifacts.
        step: the step's name.
        label: the step's name within the flow.
        fingerprint: the step's fingerprint.
        lease: the right to write its outputs; check it before each write that another execution could follow.
        runtime: worker counts, devices and the like, as given to the flow.
        flow: the flow's name.
    """

    workspace: str
    tracking: Tracking
    flow_run_id: str
    run_id: str
    step: str
    label: str
    fingerprint: str
    lease: Lease
    runtime: Any = None
    flow: str = ""

    @property
    def run_name(self) -> str:
        """A name that belongs to this work alone: the same fingerprint gives it again after a crash."""
        return f"{self.step}-{self.fingerprint[:16]}"

    @property
    def progress(self) -> StepProgress:
        """Where to tell how far the step is; it can be handed to other processes."""
        return StepProgress(self.tracking, self.run_id, self.flow, self.flow_run_id, self.label)

    def output_uri(self, *parts: str) -> str:
        """A place for outputs that belongs to this fingerprint alone: executing again does no harm."""
        return storage.join(self.workspace, self.step, self.fingerprint[:16], *parts)


def missing_outputs(record: Record) -> str | None:
    """Why the outputs a record names no longer hold, or None: each `uri` and `*_uri` field must exist."""
    for name in type(record).model_fields:
        value = getattr(record, name)
        is_uri = name == "uri" or name.endswith("_uri")
        # A model URI is resolved by the registry, not by storage; steps that return one verify it themselves.
        if is_uri and isinstance(value, str) and not value.startswith("models:") and not storage.exists(value):
            return f"{value} is gone"
        if isinstance(value, Record) and (reason := missing_outputs(value)) is not None:
            return reason
    return None


@dataclass(frozen=True, eq=False)
class Step(Generic[P, R]):
    """A function made a step by `step`; called directly it simply runs.

    Attributes:
        fn: the function; its first parameter is a StepContext, it returns a Record.
        name: part of the fingerprint.
        version: part of the fingerprint; raise it when the code changes what the step returns.
        verify: why a cached record no longer holds for the arguments, or None; it runs before every reuse, so be quick.
        returns: the record class; None means the return annotation's.
        at_once: of the runtime, how many uses of the step a flow runs at the same time, the others waiting; None:
            as many as a driver's node bears (ray_session.submit). Asked where Ray runs.
    """

    fn: Callable[Concatenate[StepContext, P], R]
    name: str
    version: int
    verify: Callable[[R, Tracking, Mapping[str, Any]], str | None] | None = None
    returns: type[R] | None = None
    at_once: Callable[[Any], int] | None = None

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError(f"step {self.name}: version must be >= 1, got {self.version}")
        for name in RESERVED_PARAMETERS:
            if name in self.signature.parameters:
                raise ValueError(f"step {self.name}: parameter {name!r} is a keyword of Flow.step; rename it")
        object.__setattr__(self, "__doc__", self.fn.__doc__)

    def __call__(self, context: StepContext, *args: P.args, **params: P.kwargs) -> R:
        """Run the function, without fingerprint or record."""
        return self.fn(context, *args, **params)

    def __reduce__(self) -> tuple[Any, ...]:
        # By reference where a worker can import it, as functions are; by value for scripts and closures.
        module, qualified_name = self.fn.__module__, self.fn.__qualname__
        if module != "__main__" and _lookup(module, qualified_name) is self:
            return _load_step, (module, qualified_name)
        return Step, (self.fn, self.name, self.version, self.verify, self.record_type)

    @property
    def signature(self) -> inspect.Signature:
        """The function's signature without the context."""
        whole = inspect.signature(self.fn)
        parameters = list(whole.parameters.values())
        if not parameters:
            raise ValueError(f"step {self.name}: its first parameter must be the StepContext")
        return whole.replace(parameters=parameters[1:])

    @property
    def record_type(self) -> type[R]:
        """The record class that the step returns; raises TypeError where its annotation names none."""
        if self.returns is not None:
            return self.returns
        annotation = self.fn.__annotations__.get("return")
        if isinstance(annotation, str):
            annotation = eval(annotation, self.fn.__globals__)
        if not (isinstance(annotation, type) and issubclass(annotation, Record)):
            raise TypeError(f"step {self.name}: the return annotation must be a Record class, got {annotation!r}")
        return cast("type[R]", annotation)

    def bind(self, args: tuple[Any, ...], params: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter's value by name, defaults included; raises TypeError for arguments that misfit."""
        try:
            bound = self.signature.bind(*args, **params)
        except TypeError as error:
            raise TypeError(f"step {self.name}: {error}") from None
        bound.apply_defaults()
        return dict(bound.arguments)

    def run(self, context: StepContext, arguments: Mapping[str, Any]) -> R:
        """Call the function with arguments from `bind`; raises TypeError when it returns another type."""
        bound = inspect.BoundArguments(self.signature, dict(arguments))
        record = self.fn(context, *bound.args, **bound.kwargs)
        if not isinstance(record, self.record_type):
            raise TypeError(f"step {self.name} returned {type(record).__name__}, not {self.record_type.__name__}")
        return record

    def fingerprint(self, arguments: Mapping[str, Any]) -> str:
        """sha256 of name, version and the canonical form of all arguments.

        None for a parameter whose default is None does not count: so a step that gets such a parameter keeps its
        cached results. Raise the version where None comes to mean something else.
        """
        named = {}
        parameters = self.signature.parameters
        for name, value in arguments.items():
            if value is None and parameters[name].default is None:
                continue
            try:
                named[name] = canonical(value)
            except TypeError as error:
                raise TypeError(f"step {self.name}, parameter {name!r}: {error}") from None
        content = json.dumps([self.name, self.version, named], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def broken_outputs(self, record: R, tracking: Tracking, arguments: Mapping[str, Any]) -> str | None:
        """Why a cached record must not be reused, or None; an error while looking counts as a reason."""
        try:
            missing = missing_outputs(record)
            return missing if missing or self.verify is None else self.verify(record, tracking, arguments)
        except Exception as error:
            return f"its outputs cannot be verified ({error})"


@overload
def step(
    *, version: int, name: str | None = None, at_once: Callable[[Any], int] | None = None
) -> Callable[[Callable[Concatenate[StepContext, P], R]], Step[P, R]]: ...


@overload
def step(
    *,
    version: int,
    name: str | None = None,
    verify: Callable[[R, Tracking, Mapping[str, Any]], str | None],
    at_once: Callable[[Any], int] | None = None,
) -> Callable[[Callable[Concatenate[StepContext, P], R]], Step[P, R]]: ...


def step(*, version: int, name: str | None = None, verify: Any = None, at_once: Any = None) -> Any:
    """Make a function a step of flows.

    Args:
        version: raise it when the code changes what the step returns; cached results are then not used.
        name: default the function's name.
        verify: a quick look whether a cached record still holds for the arguments, beyond the existence of its URIs.
        at_once: see `Step`.
    """

    def decorate(fn: Callable[Concatenate[StepContext, P], R]) -> Step[P, R]:
        return Step(fn, name or fn.__name__, version, verify, at_once=at_once)

    return decorate


def canonical(value: Any) -> Any:
    """A JSON value that is equal for equal arguments, in any process and whatever the order of dict keys.

    Records count by their content digest, so a moved data set is the same data set. Raises TypeError for what
    has no lasting form, such as functions and open files.
    """
    match value:
        case None | bool() | str():
            return value
        case Enum():
            return {type(value).__name__: canonical(value.value)}
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"float": str(value)}
        case Record():
            return {type(value).__name__: value.content_digest()}
        case BaseModel():
            return {type(value).__name__: {key: canonical(item) for key, item in _counting_fields(value)}}
        case PurePath():
            return str(value)
        case bytes():
            return {"sha256": hashlib.sha256(value).hexdigest()}
        case datetime() | date():
            return value.isoformat()
        case Mapping():
            if all(isinstance(key, str) for key in value):
                return {key: canonical(item) for key, item in value.items()}
            pairs = [[canonical(key), canonical(item)] for key, item in value.items()]
            return {"mapping": sorted(pairs, key=json.dumps)}
        case list() | tuple():
            return [canonical(item) for item in value]
        case set() | frozenset():
            return {"set": sorted((canonical(item) for item in value), key=json.dumps)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: canonical(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    raise TypeError(
        f"a value of type {type(value).__name__} has no canonical form; "
        "pass plain values, dataclasses, pydantic models or records"
    )


def _counting_fields(model: BaseModel) -> Iterator[tuple[str, Any]]:
    """The fields that a fingerprint holds, and what a model that allows extra keys was given beside them."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if NotFingerprinted not in field.metadata and not (value is None and CountedWhenSet in field.metadata):
            yield name, value
    yield from sorted((model.model_extra or {}).items())


def _lookup(module: str, qualified_name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in qualified_name.split("."):
        found = getattr(found, part, None)
    return found


def _load_step(module: str, qualified_name: str) -> Step[..., Any]:
    __import__(module)
    return cast("Step[..., Any]", _lookup(module, qualified_name))
