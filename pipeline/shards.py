"""The shard set on storage: WebDataset tars, written byte-for-byte reproducibly and read by byte range.

A shard set is one folder: `<split>-00000.tar` and so on, `index.parquet` (a row a sample),
`quarantine.parquet` (a row a rejected sample) and `manifest.json`, written last, which names everything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Record, ShardSet, SplitInfo

FORMAT_VERSION = 1
MANIFEST, INDEX, QUARANTINE = "manifest.json", "index.parquet", "quarantine.parquet"
MAX_OPEN_SHARDS = 64

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("image_offset", pa.int64()),  # of the member's data in the tar, bytes
        ("image_size", pa.int64()),
        ("label_offset", pa.int64()),
        ("label_size", pa.int64()),
        ("height", pa.int32()),  # pixels
        ("width", pa.int32()),
        ("class_pixels", pa.list_(pa.int64())),  # by class id; what is missing to height x width is ignored
    ]
)
QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in ("split", "key", "file", "reason", "remedy")])


class ShardSetError(UserError):
    """A shard set that is missing, damaged, or of a version this code does not read."""


class ShardEntry(Record):
    """One tar file."""

    name: str
    sha256: str
    num_bytes: int
    num_samples: int


class Manifest(Record):
    """What a shard set holds. All but `identity_exempt` makes the content that `digest` stands for.

    Attributes:
        source_digest: the raw data set's names, sizes and times when the shards were made.
        plan_digest: that, and all settings that shape the shards.
    """

    format_version: int = FORMAT_VERSION
    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    splits: dict[str, tuple[ShardEntry, ...]]
    num_quarantined: int
    source_digest: str
    plan_digest: str
    index_sha256: str
    quarantine_sha256: str

    def digest(self) -> str:
        """sha256 over the content: shards made from a copy of the data elsewhere have the same digest."""
        exempt = {"source_digest", "plan_digest", "index_sha256", "quarantine_sha256"}
        content = self.model_dump(mode="json", exclude=exempt)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_record(self, uri: str) -> ShardSet:
        """The record that travels between steps; `uri` is the shard set's folder."""
        splits = {}
        for split, shards in self.splits.items():
            sums = hashlib.sha256("".join(f"{shard.sha256}\n" for shard in shards).encode())
            num_samples = sum(shard.num_samples for shard in shards)
            splits[split] = SplitInfo(num_samples=num_samples, num_shards=len(shards), digest=sums.hexdigest())
        return ShardSet(
            name=self.name,
            uri=uri,
            digest=self.digest(),
            num_classes=len(self.classes),
            splits=splits,
            num_quarantined=self.num_quarantined,
        )


class ShardWriter:
    """Appends samples to a tar whose bytes depend on nothing but the samples and their order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.num_samples = 0

    def add(self, key: str, suffix: str, image: bytes, label_png: bytes) -> tuple[int, int]:
        """Append `<key>.<suffix>` and `<key>.label.png`; offsets of both members' data, in bytes."""
        self.num_samples += 1
        return self._append(f"{key}.{suffix}", image), self._append(f"{key}.label.png", label_png)

    def finish(self) -> str:
        """Write the end of the archive; the sha256 of the whole file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        return self._sha256.hexdigest()

    def _append(self, name: str, data: bytes) -> int:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        member.mode = 0o644
        self._write(member.tobuf(tarfile.PAX_FORMAT))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.num_bytes += len(data)


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


class SampleBytes(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    image: bytes
    label: bytes


class ShardReader:
    """An opened shard set. Safe to fork and to pickle: files are opened where they are read."""

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
        """Places of all samples of `split`; raises ShardSetError where there is no such split."""
        if split not in self.manifest.splits:
            choices = ", ".join(self.manifest.splits)
            raise ShardSetError(f"shard set {self.uri} has no split {split!r}; choose from {choices}")
        columns = ["key", "shard", "image_offset", "image_size", "label_offset", "label_size"]
        with storage.open_uri(storage.join(self.uri, INDEX)) as file:
            table = pq.read_table(file, columns=columns, filters=[("split", "=", split)])
        shards = table["shard"].combine_chunks().dictionary_encode()
        return SplitIndex(
            table["key"].combine_chunks(),
            tuple(shards.dictionary.to_pylist()),
            shards.indices.to_numpy(),
            *(table[column].to_numpy() for column in columns[2:]),
        )

    def read(self, index: SplitIndex, sample: int) -> SampleBytes:
        """The bytes of sample number `sample`: one read of the range that holds both members."""
        start = int(index.image_offset[sample])
        end = int(index.label_offset[sample] + index.label_size[sample])
        shard = index.shard_names[index.shard[sample]]
        data = self._read_range(shard, start, end - start)
        if len(data) != end - start:
            raise ShardSetError(f"{storage.join(self.uri, shard)} ends before byte {end}; prepare it again")
        return SampleBytes(
            index.key(sample),
            data[: int(index.image_size[sample])],
            data[len(data) - int(index.label_size[sample]) :],
        )

    def _forget_files(self) -> None:
        self._process = os.getpid()
        self._filesystem, self._folder = fsspec.core.url_to_fs(self.uri)
        self._is_local = storage.is_local(self.uri)
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def _read_range(self, shard: str, offset: int, size: int) -> bytes:
        if self._process != os.getpid():
            # Remote file systems hold threads and sockets that do not survive a fork.
            self._forget_files()
        if not self._is_local:
            place = f"{self._folder}/{shard}"
            return bytes(self._filesystem.cat_file(place, start=offset, end=offset + size))
        file = self._files.get(shard)
        if file is None:
            file = self._files[shard] = storage.open_uri(storage.join(self.uri, shard))
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        return os.pread(file.fileno(), size, offset)


def open_shard_set(shard_set: ShardSet | str) -> ShardReader:
    """Open a shard set by record or URI; raises ShardSetError where it is missing or damaged."""
    return ShardReader(shard_set if isinstance(shard_set, str) else shard_set.uri)


def spread(count: int, limit: int | None) -> NDArray[np.int64]:
    """Positions among `count`, at most `limit` of them (None: all), evenly spaced and rising."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def read_manifest(uri: str) -> Manifest:
    """The manifest of the shard set at `uri`; raises ShardSetError."""
    place = storage.join(uri, MANIFEST)
    try:
        content = storage.read_json(place)
    except FileNotFoundError as error:
        raise ShardSetError(f"no shard set at {uri}: {MANIFEST} is missing; prepare it first") from error
    except ValueError as error:
        raise ShardSetError(f"{place} is not JSON; prepare the shard set again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ShardSetError(f"{place} has format version {version}, this code reads {FORMAT_VERSION}; prepare it again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        raise ShardSetError(f"{place} is damaged at {fields}; prepare the shard set again") from error


def verify_shard_set(uri: str, deep: bool = False) -> ShardSet:
    """The record of the shard set at `uri` if it is whole; raises ShardSetError naming the first damage.

    Shallow: manifest and index readable, all shards there with the right size. `deep`: all sha256 sums, too.
    """
    manifest = read_manifest(uri)
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    for shard in shards:
        place = storage.join(uri, shard.name)
        try:
            num_bytes = storage.file_size(place)
        except FileNotFoundError as error:
            raise ShardSetError(f"shard {place} is missing; prepare the shard set again") from error
        if num_bytes != shard.num_bytes:
            raise ShardSetError(
                f"shard {place} has {num_bytes} bytes, the manifest says {shard.num_bytes}; prepare it again"
            )
    sums = {INDEX: manifest.index_sha256, QUARANTINE: manifest.quarantine_sha256}
    rows = {INDEX: sum(shard.num_samples for shard in shards), QUARANTINE: manifest.num_quarantined}
    for name, num_rows in rows.items():
        if _count_rows(storage.join(uri, name)) != num_rows:
            raise ShardSetError(f"{storage.join(uri, name)} has not {num_rows} rows; prepare it again")
    if deep:
        for name, sha256 in {**sums, **{shard.name: shard.sha256 for shard in shards}}.items():
            place = storage.join(uri, name)
            if storage.file_digest(place) != sha256:
                raise ShardSetError(f"{place} differs from the manifest in its sha256; prepare it again")
    return manifest.to_record(uri)


def _count_rows(uri: str) -> int:
    try:
        with storage.open_uri(uri) as file:
            return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowInvalid) as error:
        raise ShardSetError(f"{uri} cannot be read ({error}); prepare the shard set again") from error
