"""How long the pages of a Parquet file are once unpacked, told by their own heads before anything unpacks them.

Arrow takes a page's word for its length, and makes room for it: 30 KB can say 2 GB. What the footer says of a column
need not be what its pages say. Heads and footer are structs of Thrift's compact protocol, of which a few numbers are
looked at here and all else is passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

MAX_FOOTER_BYTES = 1 << 26
# Of one page: numbers, and the least and greatest value of the page.
_HEAD_BYTES, _MAX_HEAD_BYTES = 1 << 12, 1 << 20
_MARK = b"PAR1"
_MAX_DEPTH = 16
# Fields: of the footer, of a row group, of a column in it, and of what that says.
_GROUPS, _COLUMNS, _ABOUT, _PACKED_SIZE, _FIRST_PAGE, _DICTIONARY = 4, 1, 3, 7, 9, 11
_PAGE_SIZE, _PACKED_PAGE_SIZE = 2, 3  # of a page's head


class _Chunk(NamedTuple):
    """Where the pages of one column of a row group lie, bytes."""

    start: int
    end: int


class ParquetPages:
    """The pages of the Parquet file in `file`; raises ValueError where its footer is none."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != _MARK or length > min(MAX_FOOTER_BYTES, size - 8):
            raise ValueError(f"its footer of {length} bytes is none that is read")
        file.seek(size - 8 - length)
        try:
            footer = _Reader(file.read(length)).struct()
            self._groups = [_chunks(group) for group in footer.get(_GROUPS, [])]
        except (IndexError, AttributeError, TypeError):
            raise ValueError("its footer does not end, or is of another form") from None
        self._size = size

    def refuse_long(self, group: int, most: int, column: int | None = None) -> None:
        """Raise ValueError where the pages of a row group, or of a column in it, have over `most` bytes unpacked."""
        if group >= len(self._groups):
            raise ValueError(f"it has no row group {group}")
        chunks = self._groups[group]
        total = 0
        for chunk in chunks if column is None else chunks[column : column + 1]:
            for num_bytes in self._pages(chunk):
                total += num_bytes
                if total > most:
                    raise ValueError(f"its pages have more than the {most} bytes allowed once they are unpacked")

    def refuse_long_in_all(self, most: int) -> None:
        """`refuse_long` of all row groups together."""
        for group in range(len(self._groups)):
            self.refuse_long(group, most)

    def _pages(self, chunk: _Chunk) -> Iterator[int]:
        """The unpacked length of each page."""
        if not 0 <= chunk.start <= chunk.end <= self._size:
            raise ValueError("it has a column outside of itself")
        position = chunk.start
        while position < chunk.end:
            head, length = self._head(position, chunk.end)
            unpacked, packed = head.get(_PAGE_SIZE), head.get(_PACKED_PAGE_SIZE)
            if not isinstance(unpacked, int) or not isinstance(packed, int) or unpacked < 0 or packed < 0:
                raise ValueError(f"the page at byte {position} has no length")
            yield unpacked
            position += length + packed

    def _head(self, position: int, end: int) -> tuple[dict[int, Any], int]:
        """The head of the page at `position`, and its own length."""
        for most in (_HEAD_BYTES, _MAX_HEAD_BYTES):
            self._file.seek(position)
            reader = _Reader(self._file.read(min(most, end - position)))
            try:
                return reader.struct(), reader.position
            except IndexError:
                continue
        raise ValueError(f"the page at byte {position} has a head that does not end")


def _chunks(group: dict[int, Any]) -> list[_Chunk]:
    chunks = []
    for column in group.get(_COLUMNS, []):
        about = column.get(_ABOUT, {})
        start, size = about.get(_FIRST_PAGE), about.get(_PACKED_SIZE)
        if not isinstance(start, int) or not isinstance(size, int):
            raise ValueError("its footer does not say where a column lies")
        dictionary = about.get(_DICTIONARY)
        if isinstance(dictionary, int) and 0 < dictionary < start:
            start = dictionary
        chunks.append(_Chunk(start, start + size))
    return chunks


class _Reader:
    """Values of Thrift's compact protocol in `data`, one after the other; raises IndexError behind the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by their number; raises ValueError for what is none."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._signed()
            # A truth value stands in the type itself.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deep")
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._take(8)
        if kind == 8:
            return self._take(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15, depth + 1) for _ in range(self._bounded(count))]
        if kind == 11:
            count = self._bounded(self._unsigned())
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(count)]
        if kind == 12:
            return self.struct(depth)
        raise ValueError(f"its footer has a value of type {kind}")

    def _bounded(self, count: int) -> int:
        # Each takes a byte or more.
        if count > len(self._data) - self.position:
            raise IndexError
        return count

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + self._bounded(count)
        return self._data[start : self.position]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("its footer has a number without end")

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
