"""Failures told in one line: the cause, and for what a person can mend, the remedy."""

from __future__ import annotations

import errno
import linecache
import os
import re
import traceback
from pathlib import Path

from pipeline.errors import UserError, root_cause
from pipeline.masking import masked

MAX_CAUSE_LENGTH = 400

_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would exceed the size limit of the process or the file system",
}
# Databases and Arrow tell it in words only.
_NO_SPACE_WORDS = ("database or disk is full", "No space left on device", "Disk quota exceeded", "File too large")

# Names that our code, and most others', gives to what is read or written.
_FILE_NAME = re.compile(
    r"(.*_)?(path|file|filename|folder|dir|directory|uri|place|target|source|root|database|src|dst)"
)
_TRACEBACK_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')


def one_line(error: BaseException) -> str:
    """The cause of a failure in one line, without secrets: a UserError's message, or type and message of the root."""
    return masked(_cause(error))


def _cause(error: BaseException) -> str:
    # Ray hands on the exception of a remote task inside a wrapper that is of the same class, too.
    wrapped = getattr(error, "cause", None)
    cause = wrapped if isinstance(wrapped, UserError) else error
    if not isinstance(cause, UserError):
        cause = root_cause(cause)
    message = _shorten(str(cause))
    if isinstance(cause, UserError):
        return message
    if (full := _no_space(cause)) is not None:
        return full
    if (silent := unreachable_server(cause)) is not None:
        return f"the tracking server {silent} does not answer; start it or mend the network, then run again"
    if _lacks_file(cause):
        message += f" {_where(error, cause)}"
    return f"{type(cause).__name__}: {message}" if message else type(cause).__name__


def unreachable_server(error: BaseException) -> str | None:
    """The address of the tracking server that this error says did not answer, however often it was asked."""
    # MLflow has no class of its own for it; the exception below it is of requests.
    found = re.search(r"API request to (\S+?://[^/\s]+)\S* failed with exception", str(error))
    return found[1] if found else None


def _no_space(error: BaseException) -> str | None:
    number = getattr(error, "errno", None) or 0
    # An error of the same number with words of its own says something else.
    known = _NO_SPACE.get(number) if getattr(error, "strerror", None) == os.strerror(number) else None
    if known is None and any(words in str(error) for words in _NO_SPACE_WORDS):
        known = _NO_SPACE[errno.ENOSPC]
    if known is None:
        return None
    place = getattr(error, "filename", None)
    where = f" at {place}" if isinstance(place, str) else ""
    return f"{known}{where}; free some space or choose another workspace, then run again"


def _lacks_file(error: BaseException) -> bool:
    """Whether the system's own words are all that is said: of which file, the error does not know."""
    number = getattr(error, "errno", None)
    return (
        isinstance(error, OSError)
        and number is not None
        and error.filename is None
        and error.strerror == os.strerror(number)
    )


def _where(wrapper: BaseException, error: BaseException) -> str:
    """The file that was worked on, as far as the frames that the error went through tell, and the line of code."""
    steps = list(traceback.walk_tb(error.__traceback__))
    if steps and "getcwd" in linecache.getline(steps[-1][0].f_code.co_filename, steps[-1][1]):
        return "(the working directory of the process was removed; run again in a folder that is there)"
    for frame, line in reversed(steps):
        for name, value in frame.f_locals.items():
            if isinstance(value, Path) or (isinstance(value, str) and _FILE_NAME.fullmatch(name)):
                return f"(at {value}, {_code_line(frame.f_code.co_filename, line)})"
    if steps:
        frame, line = steps[-1]
        return f"(in {frame.f_code.co_name}, {_code_line(frame.f_code.co_filename, line)})"
    # Ray hands on the traceback of another process as text.
    lines = _TRACEBACK_LINE.findall(str(getattr(wrapper, "traceback_str", "")))
    return f"(in {lines[-1][2]}, {_code_line(lines[-1][0], lines[-1][1])})" if lines else "(of which file is not known)"


def _code_line(file: str, line: int | str) -> str:
    return f"{'/'.join(Path(file).parts[-2:])} line {line}"


def _shorten(message: str) -> str:
    # Ray appends the traceback to some messages; it is kept in full elsewhere.
    lead, *_ = re.split(r"\btraceback\b[: (]", message, maxsplit=1, flags=re.IGNORECASE)
    line = " ".join((lead if lead.strip() else message).split())
    return line if len(line) <= MAX_CAUSE_LENGTH else line[: MAX_CAUSE_LENGTH - 3] + "..."
