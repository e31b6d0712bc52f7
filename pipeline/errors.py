"""The errors a person can mend: each says the value, the rule and the remedy in one message."""

from __future__ import annotations

MAX_SHOWN = 200  # characters of a value from a file


class UserError(Exception):
    """A mistake in the input or the surroundings; the command line prints it and exits with 1."""


def shown(value: object) -> str:
    """A value from a file as an error quotes it: its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def root_cause(error: BaseException) -> BaseException:
    """The innermost exception, or the first UserError on the way: through Ray's wrappers and `raise ... from`."""
    if isinstance(error, UserError):
        return error
    failures = getattr(error, "worker_failures", None)
    if failures:
        return root_cause(next(iter(failures.values())))
    # RayTaskError carries the original as `cause`, Ray Train's wrapper of worker exceptions as `_base_exc`.
    inner = getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error.__cause__
    if isinstance(inner, BaseException) and inner is not error:
        return root_cause(inner)
    return error
