"""Whether values that come from a file are of the types that a dataclass's fields are annotated with."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import Field
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def type_problems(owner: type[Dataclass], values: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that is not of its field's annotated type."""
    hints = type_hints(owner)
    return [problem for name, value in values.items() if (problem := type_problem(name, value, hints[name]))]


@cache
def type_hints(owner: type[Dataclass]) -> dict[str, Any]:
    """The annotations of a class and its bases, evaluated."""
    return get_type_hints(owner)


def type_problem(name: str, value: Any, hint: Any) -> str | None:
    """Why a value is not of the annotated type, or None."""
    if fits(value, hint):
        return None
    if get_origin(hint) is Literal and isinstance(value, str):
        return f"unknown {name} {value!r}; choose from {', '.join(get_args(hint))}"
    return f"{name} must be {describe(hint)}, got {value!r}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the annotated type; a whole number is also a float, and no truth value is a number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(fits(item, one) for item, one in zip(value, arguments, strict=True))
        )
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else origin or hint)


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def describe(hint: Any) -> str:
    """An annotated type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments)
    if origin is tuple:
        each = describe(arguments[0]).removeprefix("a ")
        return f"a list of {each}s" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {each}s"
    if origin is Mapping:
        return "a mapping by name"
    return NAMES.get(hint, str(hint))
