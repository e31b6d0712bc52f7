"""A large JSON file read in one pass and in little memory, with the position of each array element in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from pipeline.storage.json_text import refuse_many_values

CHUNK_BYTES = 1 << 22
# Of one element; more means that the file is not what it should be.
MAX_ELEMENT_BYTES = 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")


class Element(NamedTuple):
    """One element of the outermost array, or of one that is a value of the outermost object."""

    key: str  # of the array
    value: Any
    offset: int  # bytes from the beginning of the file
    size: int  # bytes


def read_elements(file: IO[bytes]) -> Iterator[Element]:
    """All elements of all arrays right below the outermost object; other values are passed over.

    Raises ValueError where the file is not such an object.
    """
    stream = _Stream(file)
    stream.expect("{")
    while stream.peek() != "}":
        key, _, _ = stream.value()
        stream.expect(":")
        if stream.peek() == "[":
            yield from _items(stream, str(key))
        else:
            stream.value()
        if stream.peek() == ",":
            stream.expect(",")


def read_items(file: IO[bytes]) -> Iterator[Element]:
    """All elements of the outermost array; their `key` is empty. Raises ValueError where the file is no array."""
    stream = _Stream(file)
    yield from _items(stream, "")


def _items(stream: _Stream, key: str) -> Iterator[Element]:
    stream.expect("[")
    while stream.peek() != "]":
        yield Element(key, *stream.value())
        if stream.peek() == ",":
            stream.expect(",")
    stream.expect("]")


def as_text(latin: str) -> str:
    """A string as written, from one of `read_elements`, which has a character a byte."""
    try:
        return latin.encode("latin-1").decode("utf-8")
    except UnicodeError:
        # Half of a character, which only an escape can write, is in no file's name.
        return latin.encode("utf-8", "replace").decode("utf-8")


class _Stream:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        # One character a byte, so that positions are bytes; strings are put right where they are used.
        self._text, self._position, self._offset = "", 0, 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space."""
        while True:
            found = _SPACE.match(self._text, self._position)
            assert found is not None
            self._position = found.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._grow():
                raise ValueError(f"it ends after {self._offset + self._position} bytes")

    def expect(self, sign: str) -> None:
        """Go past `sign`; raises ValueError where something else comes."""
        if self.peek() != sign:
            position = self._offset + self._position
            raise ValueError(f"byte {position} is {self._text[self._position]!r} and should be {sign!r}")
        self._position += 1

    def value(self) -> tuple[Any, int, int]:
        """The next value, with its offset and size in bytes."""
        self.peek()
        while True:
            if len(self._text) - self._position > CHUNK_BYTES:
                refuse_many_values(self._text[self._position :])
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if not self._grow():
                    raise ValueError(f"byte {self._offset + error.pos}: {error.msg}") from error
                continue
            except RecursionError as error:
                raise ValueError(f"the value at byte {self._offset + self._position} is nested too deep") from error
            # A number may go on behind the buffer, or end in a half of its fraction or exponent.
            if self._text[end : end + 1] in ("", ".", "e", "E") and self._grow():
                continue
            start, self._position = self._position, end
            return value, self._offset + start, end - start

    def _grow(self) -> bool:
        """Read on, and drop what is behind; False at the end of the file."""
        pending = len(self._text) - self._position
        if pending > MAX_ELEMENT_BYTES:
            raise ValueError(f"the value at byte {self._offset + self._position} is no JSON or exceeds {pending} bytes")
        data = self._file.read(max(CHUNK_BYTES, pending))
        self._offset += self._position
        self._text, self._position = self._text[self._position :] + data.decode("latin-1"), 0
        return bool(data)
