"""The shard set on storage: WebDataset tars, written byte-for-byte reproducibly; `shard_reader` reads them.

A shard set is one folder: `<split>-00000.tar` and so on, `index.parquet` (a row a sample),
`quarantine.parquet` (a row a rejected sample) and `manifest.json`, written last, which names everything else.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from typing import IO, Annotated

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Record, ShardSet, SplitInfo
from pipeline.storage.names import MANIFEST

FORMAT_VERSION = 1

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


# More is in no file, and sums of such numbers pass the range of integers.
NonNegative = Annotated[int, Field(ge=0, lt=1 << 48)]


class ShardSetError(UserError):
    """A shard set that is missing, damaged, or of a version this code does not read."""


class ShardEntry(Record):
    """One tar file beside the manifest: its name holds no folder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    sha256: str
    num_bytes: NonNegative
    num_samples: NonNegative


class Manifest(Record):
    """What a shard set holds. All but `identity_exempt` makes the content that `digest` stands for.

    Attributes:
        source_digest: the raw data set's names, sizes and times when the shards were made.
        plan_digest: that, and all settings that shape the shards.
        grey_range: the values that became 0 and 255 in images of more than 8 bits a channel; None: there are none.
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
    grey_range: tuple[float, float] | None = None

    def digest(self) -> str:
        """sha256 over the content: shards made from a copy of the data elsewhere have the same digest."""
        exempt = {"source_digest", "plan_digest", "index_sha256", "quarantine_sha256"}
        if self.grey_range is None:
            exempt.add("grey_range")
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


def evenly_spaced(count: int, limit: int | None) -> NDArray[np.int64]:
    """Positions among `count`, at most `limit` of them (None: all), evenly spaced and rising."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def read_manifest(uri: str) -> Manifest:
    """The manifest of the shard set at `uri`; raises ShardSetError."""
    manifest_uri = storage.join(uri, MANIFEST)
    try:
        content = storage.read_json(manifest_uri)
    except FileNotFoundError as error:
        raise ShardSetError(f"no shard set at {uri}: {MANIFEST} is missing; prepare it first") from error
    except ValueError as error:
        raise ShardSetError(f"{manifest_uri} is not JSON; prepare the shard set again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise ShardSetError(
            f"{manifest_uri} has format version {version}, this code reads {FORMAT_VERSION}; prepare it again"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        raise ShardSetError(f"{manifest_uri} is damaged at {fields}; prepare the shard set again") from error
