"""Damaged or exchanged shards are found before training, by sha256 sums of the files that it will read.

Reading everything once more costs time, so a sum is remembered on this machine with the file's size and what
storage says of its content (times and inode, or an object's ETag); only files that changed are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from pipeline.records import ShardSet
from pipeline.shards.shard_reader import open_shard_set
from pipeline.shards.shards import Manifest, ShardSetError, check_sizes
from pipeline.storage.file_stamps import file_stamps
from pipeline.storage.file_sums import SUMS_AT_ONCE, FileSums
from pipeline.storage.names import INDEX, QUARANTINE

_SAY_FROM_BYTES = 1 << 30


class ShardCheck(NamedTuple):
    """What a check did: files whose sums were calculated, and those it remembered."""

    num_read: int
    num_remembered: int
    bytes_read: int


def check_shard_set(
    shard_set: ShardSet | str,
    splits: Sequence[str] | None = None,
    *,
    cache_folder: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ShardCheck:
    """Make sure that the shard set is, byte for byte, what its record and its manifest say.

    First what costs next to nothing: the manifest stands for the record's digest, and one listing shows every
    file with the right size. Then the sums of the index and of the shards of `splits` (None: of all files).

    Args:
        shard_set: a record, or a URI, whose manifest is taken at its word.
        splits: what is going to be read.
        cache_folder: where sums are remembered; None: `segvit` in the user's cache folder.
        say: told when much is going to be read.

    Raises:
        ShardSetError: naming the first file that is missing, of another size or of other content.
    """
    reader = open_shard_set(shard_set)
    uri, manifest = reader.uri, reader.manifest
    stamps = file_stamps(uri)
    check_sizes(uri, manifest, stamps)
    for name in (INDEX, QUARANTINE):
        if name not in stamps:
            raise ShardSetError(f"{storage.join(uri, name)} is missing; prepare the shard set again")
    expected = _expected_sums(manifest, splits)
    memory = FileSums(uri, cache_folder)
    unknown = [name for name in expected if memory.cached(name, stamps[name]) != expected[name]]
    num_bytes = sum(stamps[name].num_bytes for name in unknown)
    if say is not None and num_bytes >= _SAY_FROM_BYTES:
        say(f"checking {len(unknown)} files of {uri}, {num_bytes / 2**30:.1f} GiB, for the first time on this machine")
    with ThreadPoolExecutor(SUMS_AT_ONCE) as pool:
        sums = pool.map(storage.file_digest, (storage.join(uri, name) for name in unknown))
        try:
            for name, found in zip(unknown, sums, strict=True):
                if found != expected[name]:
                    raise ShardSetError(
                        f"{storage.join(uri, name)} differs from the manifest in its sha256; prepare it again"
                    )
                memory.add(name, stamps[name], found)
        finally:
            pool.shutdown(cancel_futures=True)
            memory.save()
    return ShardCheck(len(unknown), len(expected) - len(unknown), num_bytes)


def _expected_sums(manifest: Manifest, splits: Iterable[str] | None) -> dict[str, str]:
    chosen = manifest.splits if splits is None else {name: manifest.splits.get(name, ()) for name in splits}
    rejected = {QUARANTINE: manifest.quarantine_sha256} if splits is None else {}
    sums = {shard.name: shard.sha256 for part in chosen.values() for shard in part}
    return {INDEX: manifest.index_sha256, **rejected, **sums}
