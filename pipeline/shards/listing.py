"""The samples of a raw data set cut into shards: parked on disk, with one short entry a shard in memory."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RawSample, list_splits
from pipeline.datasets.raw import digest_of
from pipeline.errors import UserError
from pipeline.shards.duplicates import repeated
from pipeline.shards.shard_task import ROWS_VERSION, ShardPlan
from pipeline.shards.shards import FORMAT_VERSION, evenly_spaced


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard to make; its samples lie at `offset` of the parked listing, `num_bytes` long."""

    split: str
    name: str
    digest: str
    num_samples: int
    offset: int
    num_bytes: int


class Listing:
    """All shards of `dataset` in order. A context manager: leaving it frees the disk space.

    The samples lie in an unlinked temporary file, which ends with the process however that ends. Raises
    UserError for a split without images and for two images of one name.

    Attributes:
        splits: train first.
        shards: in the order of their samples, split by split.
        num_samples: over all shards.
        digest: sha256 over what shapes the bytes of all shards.
    """

    def __init__(self, dataset: RawDataset, config: DataConfig) -> None:
        self.splits: list[str] = []
        self.shards: list[PlannedShard] = []
        # Not closed on errors below: an unlinked file goes with its last reference.
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        identity = [FORMAT_VERSION, ROWS_VERSION, dataset.name, dataset.class_names, config.max_long_side]
        identity.append(config.grey_range)
        for split, samples in list_splits(dataset, config):
            self.splits.append(split)
            self._add_split(split, samples, config, digest_of(identity))
        self.num_samples = sum(shard.num_samples for shard in self.shards)
        self.digest = digest_of([shard.name, shard.digest] for shard in self.shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def load(self, shard: PlannedShard) -> ShardPlan:
        """What the task of `shard` needs, read back from disk."""
        self._file.seek(shard.offset)
        # Pickle, but of this process's own making in a file that no other process can open.
        samples = pickle.loads(zlib.decompress(self._file.read(shard.num_bytes)))
        return ShardPlan(shard.split, shard.name, samples, shard.digest)

    def _add_split(self, split: str, samples: Sequence[RawSample], config: DataConfig, identity: str) -> None:
        hashes = array("Q")
        first = len(self.shards)
        for number, chosen in enumerate(_cut(samples, config)):
            hashes.extend(_hash_key(sample.key) for sample in chosen)
            digest = digest_of([identity, *([sample.key, sample.stamp] for sample in chosen)])
            parked = zlib.compress(pickle.dumps(chosen), 1)
            offset = self._file.seek(0, 2)
            self._file.write(parked)
            name = f"{split}-{number:05d}.tar"
            self.shards.append(PlannedShard(split, name, digest, len(chosen), offset, len(parked)))
        self._refuse_equal_keys(split, self.shards[first:], np.frombuffer(hashes, dtype=np.uint64))

    def _refuse_equal_keys(self, split: str, shards: Sequence[PlannedShard], hashes: NDArray[np.uint64]) -> None:
        suspects = set(hashes[repeated(hashes)].tolist())
        if not suspects:
            return
        seen: set[str] = set()
        for sample in (sample for shard in shards for sample in self.load(shard).samples):
            if sample.key in seen:
                raise UserError(f"{sample.image}: another image in split {split!r} has this name; rename one")
            if _hash_key(sample.key) in suspects:
                seen.add(sample.key)


def _cut(samples: Sequence[RawSample], config: DataConfig) -> Iterator[list[RawSample]]:
    """The samples to use, shard by shard."""
    limit = config.max_samples_per_split
    chosen = samples if limit is None else (samples[int(index)] for index in evenly_spaced(len(samples), limit))
    shard: list[RawSample] = []
    for sample in chosen:
        shard.append(sample)
        if len(shard) == config.samples_per_shard:
            yield shard
            shard = []
    if shard:
        yield shard


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
