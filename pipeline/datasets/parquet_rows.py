"""Pictures in the rows of Parquet files, a row at a time: what is held is a page of each column, not the file.

A column of pictures is binary, or a struct with `bytes` as Hugging Face writes it. A path in such a struct names the
picture; the file that it is of is never opened. Nothing is unpickled: types are Parquet's and Arrow's own.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.archive import MAX_FILE_BYTES, too_large
from pipeline.datasets.raw import RejectedSampleError
from pipeline.datasets.tree import Entry
from pipeline.errors import UserError
from pipeline.storage.parquet_pages import ParquetPages
from segvit.image_files import one_line

# Of a row group, unpacked: one page may hold all pictures, and is in the memory three times.
MAX_GROUP_BYTES = 1 << 29
# Likewise of the paths in it; a page may hold one path, and each of those read at once be that.
MAX_PATH_BYTES = 1 << 26
_PATHS_AT_ONCE = 16
_BUFFER_BYTES = 1 << 20
_NOT_READABLE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError)


class ParquetHead(NamedTuple):
    """What the footer of a file says.

    Attributes:
        columns: all, by name, with their types in words.
        pictures: names of those that hold pictures, each with the column, as Parquet names it, of the bytes.
        paths: likewise of their paths, where they have such.
        starts: the number of the first row of each row group, and that of all rows.
        group_bytes: of all columns of each row group, unpacked.
        features: what Hugging Face's metadata say of the columns, by name.
    """

    columns: Mapping[str, str]
    pictures: Mapping[str, str]
    paths: Mapping[str, str]
    starts: Sequence[int]
    group_bytes: Sequence[int]
    features: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        """Of the file."""
        return self.starts[-1]

    def group_of(self, row: int) -> int:
        """The row group of the row with this number."""
        return bisect.bisect_right(self.starts, row) - 1


def read_head(entry: Entry) -> ParquetHead:
    """The head of the file `entry`, read once a process; raises UserError."""
    if entry.extents:
        raise UserError(f"{entry.uri} lies in an archive, where single rows cannot be read; unpack it")
    entry.require_file()
    return _read_head(entry.uri, entry.stamp)


def refuse_large_groups(entry: Entry) -> None:
    """Raise UserError where a row group of the file `entry` holds more than the memory may take."""
    head = read_head(entry)
    for num_bytes, start, end in zip(head.group_bytes, head.starts, head.starts[1:], strict=False):
        if num_bytes > MAX_GROUP_BYTES:
            raise UserError(
                f"{entry.uri} holds {num_bytes} bytes in one row group, more than the {MAX_GROUP_BYTES} allowed; write "
                "it with row_group_size=100"
            )
        # The shortest code of a row is a bit.
        if not 0 <= end - start <= 8 * num_bytes:
            raise UserError(f"{entry.uri} says {end - start} rows, which {num_bytes} bytes cannot hold; fetch it again")


def read_paths(entry: Entry, column: str) -> list[str | None] | None:
    """The path of each row in the struct `column`; None where there are none. Raises UserError."""
    leaf = read_head(entry).paths.get(column)
    if leaf is None:
        return None
    paths: list[str | None] = []
    try:
        with storage.open_uri(entry.uri) as file, pq.ParquetFile(file) as parquet:
            pages = ParquetPages(file)
            number = [column.path for column in parquet.schema].index(leaf)
            for group in range(parquet.num_row_groups):
                pages.refuse_long(group, MAX_PATH_BYTES, number)
            for batch in parquet.iter_batches(_PATHS_AT_ONCE, columns=[leaf], use_threads=False):
                paths += [None if cell is None else cell["path"] for cell in batch.column(column).to_pylist()]
    except _NOT_READABLE as error:
        raise _unreadable(entry.uri, error) from error
    return paths


def read_row(uri: str, stamp: str, columns: tuple[str, ...], row: int) -> list[bytes | None]:
    """The pictures in `columns` of the row with this number; None for those without bytes.

    Rows are quick to read in their order, and slow in any other. Raises RejectedSampleError.
    """
    where = f"{uri}#{row}"
    try:
        pictures = _open_rows(uri, stamp, columns).read(row)
    except UserError as error:
        raise RejectedSampleError(where, f"cannot be read ({one_line(error)})", "fetch the file again") from error
    except _NOT_READABLE as error:
        reason = f"cannot be read as a row of a Parquet file ({one_line(error)})"
        raise RejectedSampleError(where, reason, "fetch the file again") from error
    size = max((len(picture) for picture in pictures if picture), default=0)
    if size > MAX_FILE_BYTES:
        large = too_large(size)
        raise RejectedSampleError(where, str(large), large.remedy)
    return pictures


@functools.lru_cache(maxsize=1024)
def _read_head(uri: str, stamp: str) -> ParquetHead:
    try:
        with storage.open_uri(uri) as file, pq.ParquetFile(file) as parquet:
            return _to_head(parquet)
    except _NOT_READABLE as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> UserError:
    return UserError(
        f"{uri} cannot be read as Parquet ({one_line(error)}); fetch it again, with `git lfs pull` where it is a "
        "pointer of Git LFS"
    )


def _to_head(parquet: pq.ParquetFile) -> ParquetHead:
    schema, footer = parquet.schema_arrow, parquet.metadata
    pictures, paths = dict[str, str](), dict[str, str]()
    for field in schema:
        if _is_bytes(field.type):
            pictures[field.name] = field.name
        elif pa.types.is_struct(field.type):
            inner = {
                field.type.field(index).name: field.type.field(index).type for index in range(field.type.num_fields)
            }
            if _is_bytes(inner.get("bytes")):
                pictures[field.name] = f"{field.name}.bytes"
                if inner.get("path") in (pa.string(), pa.large_string()):
                    paths[field.name] = f"{field.name}.path"
    # Not by column: Arrow ends the process where the footer of a damaged file describes one that cannot be.
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
    columns = {field.name: str(field.type) for field in schema}
    features = _features(schema.metadata or {})
    return ParquetHead(columns, pictures, paths, starts, [group.total_byte_size for group in groups], features)


def _is_bytes(kind: pa.DataType | None) -> bool:
    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """Empty where there are none, or what is there is of another form."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


class _Rows:
    """A file that is open at one of its rows."""

    def __init__(self, uri: str, stamp: str, columns: tuple[str, ...]) -> None:
        self.head = _read_head(uri, stamp)
        self.columns = columns
        self.leaves = [self.head.pictures[column] for column in columns]
        file = storage.open_uri(uri)
        self.pages = ParquetPages(file)
        self.parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES)
        self.lock = threading.Lock()
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.row, self.end = -1, 0  # the row that was read last, and the end of its row group
        self.pictures: list[bytes | None] = []

    def read(self, row: int) -> list[bytes | None]:
        with self.lock:
            if not self.row < row < self.end and row != self.row:
                self._go_to_group(row)
            try:
                while self.row < row:
                    batch = next(self.batches, None)
                    if batch is None:
                        raise ValueError(f"it ends behind row {self.row}")
                    self.row += 1
                    if self.row == row:
                        self.pictures = [_picture(batch.column(column)) for column in self.columns]
            except BaseException:
                self.row, self.end = -1, 0
                raise
            return self.pictures

    def _go_to_group(self, row: int) -> None:
        if not 0 <= row < self.head.num_rows:
            raise ValueError(f"it has {self.head.num_rows} rows")
        group = self.head.group_of(row)
        self.pages.refuse_long(group, MAX_GROUP_BYTES)
        self.batches = self.parquet.iter_batches(1, row_groups=[group], columns=self.leaves, use_threads=False)
        self.row, self.end = self.head.starts[group] - 1, self.head.starts[group + 1]


def _picture(column: pa.Array) -> bytes | None:
    """That of the one row in `column`."""
    cell: Any = column[0].as_py()
    picture: bytes | None = cell["bytes"] if isinstance(cell, dict) else cell
    return picture


@functools.lru_cache(maxsize=1)
def _open_rows(uri: str, stamp: str, columns: tuple[str, ...]) -> _Rows:
    return _Rows(uri, stamp, columns)
