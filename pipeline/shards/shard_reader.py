"""The reading side of a shard set: an index of where every sample lies, and reads by byte range."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.records import ShardSet
from pipeline.shards.shards import INDEX_SCHEMA, ShardEntry, ShardSetError, read_manifest
from pipeline.storage.names import INDEX
from pipeline.storage.parquet_pages import ParquetPages
from segvit.image_files import one_line

MAX_OPEN_SHARDS = 64
# How much longer the rows of an index are than its file: keys and offsets differ from row to row.
MAX_INDEX_RATIO, MIN_INDEX_BYTES = 64, 1 << 24

# n samples of a split


@dataclass(frozen=True, eq=False)
class SplitIndex:
    """Where the samples of one split lie, in the data set's order; all arrays are (n,)."""

    keys: pa.Array
    shard_names: tuple[str, ...]
    shard: NDArray[np.int32]  # position in shard_names
    image_offset: NDArray[np.int64]
    image_size: NDArray[np.int64]
    label_offset: NDArray[np.int64]
    label_size: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, sample: int) -> str:
        """The key of sample number `sample`."""
        return str(self.keys[sample].as_py())

    def take(self, samples: NDArray[np.int64]) -> SplitIndex:
        """Of these samples alone, numbered anew."""
        return SplitIndex(
            self.keys.take(samples),
            self.shard_names,
            self.shard[samples],
            self.image_offset[samples],
            self.image_size[samples],
            self.label_offset[samples],
            self.label_size[samples],
        )


class SampleBytes(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    image: bytes
    label: bytes


class ShardReader:
    """An opened shard set. Safe to fork, to pickle and to share between threads."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.manifest = read_manifest(uri)
        self._forget_files()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_files()

    def index(self, split: str) -> SplitIndex:
        """Where all samples of `split` lie.

        Raises ShardSetError where there is no such split, and where the index does not fit the manifest.
        """
        if split not in self.manifest.splits:
            choices = ", ".join(self.manifest.splits)
            raise ShardSetError(f"shard set {self.uri} has no split {split!r}; choose from {choices}")
        uri = storage.join(self.uri, INDEX)
        columns = ["key", "shard", "image_offset", "image_size", "label_offset", "label_size"]
        try:
            with storage.open_uri(uri) as file:
                check_index(uri, file)
                # As a dictionary, a shard's name is kept once, not once a sample.
                table = pq.read_table(file, columns=columns, filters=[("split", "=", split)], read_dictionary=["shard"])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ShardSetError(f"{uri} cannot be read ({one_line(error)}); prepare the shard set again") from error
        entries = self.manifest.splits[split]
        index = SplitIndex(
            table["key"].combine_chunks(),
            tuple(entry.name for entry in entries),
            _shard_numbers(uri, table["shard"].combine_chunks(), entries),
            *(table[column].to_numpy() for column in columns[2:]),
        )
        _check_fit(uri, index, entries)
        return index

    def read(self, index: SplitIndex, sample: int) -> SampleBytes:
        """The bytes of sample number `sample`: one read of the range that holds both members."""
        start = int(index.image_offset[sample])
        return self._slice(
            index, sample, start, self._read_range(index, index.shard[sample], start, _end(index, sample))
        )

    def read_block(self, index: SplitIndex, samples: Sequence[int]) -> dict[int, SampleBytes]:
        """The bytes of many samples by number: one read a shard, from its first wanted byte to the last."""
        by_shard: dict[int, list[int]] = {}
        for sample in sorted(set(samples)):
            by_shard.setdefault(int(index.shard[sample]), []).append(sample)
        found: dict[int, SampleBytes] = {}
        for shard, wanted in by_shard.items():
            start = min(int(index.image_offset[sample]) for sample in wanted)
            data = memoryview(self._read_range(index, shard, start, max(_end(index, sample) for sample in wanted)))
            found.update((sample, self._slice(index, sample, start, data)) for sample in wanted)
        return found

    def _slice(self, index: SplitIndex, sample: int, start: int, data: bytes | memoryview) -> SampleBytes:
        image, label = int(index.image_offset[sample]) - start, int(index.label_offset[sample]) - start
        return SampleBytes(
            index.key(sample),
            bytes(data[image : image + int(index.image_size[sample])]),
            bytes(data[label : label + int(index.label_size[sample])]),
        )

    def _forget_files(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._filesystem, self._folder = fsspec.core.url_to_fs(self.uri)
        self._is_local = storage.is_local(self.uri)
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def _read_range(self, index: SplitIndex, shard: int, start: int, end: int) -> bytes:
        name = index.shard_names[shard]
        if self._process != os.getpid():
            # Remote file systems hold threads and sockets that do not survive a fork.
            self._forget_files()
        try:
            data = self._read_local(name, start, end) if self._is_local else self._read_remote(name, start, end)
        except FileNotFoundError as error:
            uri = storage.join(self.uri, name)
            raise ShardSetError(f"shard {uri} is missing; prepare the shard set again") from error
        if len(data) != end - start:
            raise ShardSetError(f"{storage.join(self.uri, name)} ends before byte {end}; prepare it again")
        return data

    def _read_remote(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._filesystem.cat_file(f"{self._folder}/{name}", start=start, end=end))

    def _read_local(self, name: str, start: int, end: int) -> bytes:
        # Held while reading: another thread may close the file to make room for one of its own.
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = storage.open_uri(storage.join(self.uri, name))
                if len(self._files) > MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)[1].close()
            return os.pread(file.fileno(), end - start, start)


def open_shard_set(shard_set: ShardSet | str) -> ShardReader:
    """Open a shard set by record or URI.

    Raises ShardSetError where it is missing or damaged, or is not what the record stands for any more.
    """
    if isinstance(shard_set, str):
        return ShardReader(shard_set)
    reader = ShardReader(shard_set.uri)
    if reader.manifest.digest() != shard_set.digest:
        raise ShardSetError(
            f"{shard_set.uri} holds another shard set now (digest {reader.manifest.digest()[:12]}, expected "
            f"{shard_set.digest[:12]}); prepare it again"
        )
    return reader


def check_index(uri: str, file: IO[bytes]) -> None:
    """Raise ShardSetError where the index at `uri` has other columns than it should, or more rows than it can hold."""
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    with pq.ParquetFile(file) as parquet:
        footer, schema = parquet.metadata, parquet.schema_arrow
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    file.seek(0)
    other = [field.name for field in INDEX_SCHEMA if field.name not in schema.names]
    other += [field.name for field in INDEX_SCHEMA if not other and schema.field(field.name).type != field.type]
    if other:
        raise ShardSetError(f"{uri} has no column {other[0]}, or one of another type; prepare the shard set again")
    ParquetPages(file).refuse_long_in_all(MAX_INDEX_RATIO * num_bytes + MIN_INDEX_BYTES)
    file.seek(0)
    num_rows, unpacked = footer.num_rows, sum(group.total_byte_size for group in groups)
    if not 0 <= num_rows <= 8 * num_bytes or not 0 <= unpacked <= MAX_INDEX_RATIO * num_bytes + MIN_INDEX_BYTES:
        raise ShardSetError(
            f"{uri} says {num_rows} rows of {unpacked} bytes, which {num_bytes} bytes do not hold; prepare it again"
        )


def _end(index: SplitIndex, sample: int) -> int:
    return int(index.label_offset[sample] + index.label_size[sample])


def _shard_numbers(uri: str, names: pa.Array, entries: Sequence[ShardEntry]) -> NDArray[np.int32]:
    """Each sample's shard as its position in the manifest, whatever the order of names in the file is."""
    if not pa.types.is_dictionary(names.type):
        names = names.dictionary_encode()
    if names.null_count:
        raise ShardSetError(f"{uri} has samples without a shard; prepare the shard set again")
    in_file = names.indices.to_numpy()
    listed = names.dictionary.to_pylist()
    numbers = {entry.name: number for number, entry in enumerate(entries)}
    # The file may name shards of other splits, too.
    for position in np.unique(in_file).tolist():
        if listed[position] not in numbers:
            raise ShardSetError(
                f"{uri} names shard {listed[position]}, which the manifest does not; prepare the shard set again"
            )
    shard: NDArray[np.int32] = np.array([numbers.get(name, -1) for name in listed], dtype=np.int32)[in_file]
    return shard


def _check_fit(uri: str, index: SplitIndex, entries: Sequence[ShardEntry]) -> None:
    """Refuse an index of another shard set: other counts, or ranges outside of its shards."""
    counts = np.bincount(index.shard, minlength=len(entries))
    for entry, count in zip(entries, counts.tolist(), strict=True):
        if count != entry.num_samples:
            raise ShardSetError(
                f"{uri} has {count} samples of {entry.name}, the manifest says {entry.num_samples}; "
                "prepare the shard set again"
            )
    limits = np.array([entry.num_bytes for entry in entries], dtype=np.int64)
    ranges = (index.image_offset, index.image_size, index.label_offset, index.label_size)
    if any(one.dtype != np.int64 for one in ranges):
        raise ShardSetError(f"{uri} has samples without a place; prepare the shard set again")
    fits = (
        # Each below a bound, so that no sum passes the range of integers.
        np.all([one <= limits[index.shard] for one in ranges], axis=0)
        & (index.image_offset >= 0)
        & (index.image_size >= 0)
        & (index.image_offset + index.image_size <= index.label_offset)
        & (index.label_size >= 0)
        & (index.label_offset + index.label_size <= limits[index.shard])
    )
    if not fits.all():
        sample = int(np.argmin(fits))
        name = index.shard_names[index.shard[sample]]
        raise ShardSetError(f"{uri} puts sample {index.key(sample)} outside of {name}; prepare the shard set again")
