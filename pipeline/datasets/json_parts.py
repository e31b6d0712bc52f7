"""Parts of a large JSON file that are the label files of samples, read without the rest."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from typing import IO

from pipeline import storage
from pipeline.datasets import archive
from pipeline.datasets.archive import Extent, ExtentError
from pipeline.datasets.paired import read_label
from pipeline.datasets.raw import RawSample
from pipeline.datasets.tree import Entry
from pipeline.errors import UserError
from segvit.image_files import DecodeError


def open_json(uri: str, extents: tuple[Extent, ...]) -> IO[bytes]:
    """The JSON file at `uri`, which may lie in an archive; raises UserError."""
    if not extents:
        return storage.open_uri(uri)
    try:
        return io.BytesIO(archive.read_extent(extents[0]))
    except ExtentError as error:
        raise UserError(f"{uri} {error}; unpack the archive and set data.root to the folder") from error


def to_extents(entry: Entry, spans: Iterable[tuple[int, int]]) -> tuple[Extent, ...]:
    """Parts of the JSON file (offset and size, bytes); behind the file itself where it is compressed and read whole."""
    if not entry.extents:
        return tuple(Extent(entry.uri, offset, size, size) for offset, size in spans)
    whole = entry.extents[0]
    if whole.kind == "range":
        return tuple(Extent(whole.uri, whole.offset + offset, size, size) for offset, size in spans)
    return (whole, *(Extent(whole.uri, offset, size, size) for offset, size in spans))


def read_parts(sample: RawSample) -> list[bytes]:
    """The texts of the parts that `to_extents` made; raises RejectedSampleError and DecodeError."""
    if not sample.label_extents or sample.label_extents[0].kind == "range":
        return read_label(sample)
    try:
        text = _read_whole(sample.label_extents[0])
    except (ExtentError, OSError) as error:
        raise DecodeError(str(error)) from error
    return [text[extent.offset : extent.offset + extent.size] for extent in sample.label_extents[1:]]


@functools.lru_cache(maxsize=2)
def _read_whole(extent: Extent) -> bytes:
    return archive.read_extent(extent)
