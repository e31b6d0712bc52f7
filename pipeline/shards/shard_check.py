"""Damaged or exchanged shards are found before training, by sha256 sums of the files that it will read.

Reading everything once more costs time, so a sum is cached on this machine with the file's size and what storage
says of its content (times and inode, or an object's ETag); only files that changed are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from pipeline.records import ShardSet
from pipeline.shards.shard_reader import open_shard_set
from pipeline.shards.shards import Manifest, ShardSetError
from pipeline.storage.file_stamps import FileStamp, file_stamps
from pipeline.storage.file_sums import SUMS_AT_ONCE, FileSums
from pipeline.storage.names import INDEX, QUARANTINE

_LOG_FROM_BYTES = 1 << 30


class ShardCheck(NamedTuple):
    """What a check did: files whose sums were calculated, and those whose sums were cached."""

    shard_set: ShardSet
    num_read: int
    num_cached: int
    bytes_read: int


def check_shard_set(
    shard_set: ShardSet | str,
    splits: Sequence[str] | None = None,
    *,
    cache_folder: Path | None = None,
    log: Callable[[str], None] | None = None,
) -> ShardCheck:
    """Make sure that the shard set is, byte for byte, what its record and its manifest say.

    First what costs next to nothing: the manifest stands for the record's digest, and one listing shows every
    file with the right size. Then the sums of the index and of the shards of `splits` (None: of all files).

    Args:
        shard_set: a record, or a URI, whose manifest is taken at its word.
        splits: what is going to be read.
        cache_folder: where sums are cached; None: `segvit` in the user's cache folder.
        log: gets a line when much is going to be read.

    Raises:
        ShardSetError: naming the first file that is missing, of another size or of other content.
    """
    reader = open_shard_set(shard_set)
    uri, manifest = reader.uri, reader.manifest
    stamps = file_stamps(uri)
    _check_sizes(uri, manifest, stamps)
    expected = _expected_sums(manifest, splits)
    sums = FileSums(uri, cache_folder)
    unknown = [name for name in expected if sums.cached(name, stamps[name]) != expected[name]]
    num_bytes = sum(stamps[name].num_bytes for name in unknown)
    if log is not None and num_bytes >= _LOG_FROM_BYTES:
        log(f"checking {len(unknown)} files of {uri}, {num_bytes / 2**30:.1f} GiB, for the first time on this machine")
    with ThreadPoolExecutor(SUMS_AT_ONCE) as pool:
        digests = pool.map(storage.file_digest, (storage.join(uri, name) for name in unknown))
        try:
            for name, digest in zip(unknown, digests, strict=True):
                if digest != expected[name]:
                    raise ShardSetError(
                        f"{storage.join(uri, name)} differs from the manifest in its sha256; prepare it again"
                    )
                sums.add(name, stamps[name], digest)
        finally:
            pool.shutdown(cancel_futures=True)
            sums.save()
    return ShardCheck(manifest.to_record(uri), len(unknown), len(expected) - len(unknown), num_bytes)


def _check_sizes(uri: str, manifest: Manifest, stamps: dict[str, FileStamp]) -> None:
    shards = [shard for part in manifest.splits.values() for shard in part]
    for name in (*(shard.name for shard in shards), INDEX, QUARANTINE):
        if name not in stamps:
            raise ShardSetError(f"{storage.join(uri, name)} is missing; prepare the shard set again")
    for shard in shards:
        found = stamps[shard.name].num_bytes
        if found != shard.num_bytes:
            raise ShardSetError(
                f"{storage.join(uri, shard.name)} has {found} bytes, the manifest says {shard.num_bytes}; "
                "prepare it again"
            )


def _expected_sums(manifest: Manifest, splits: Iterable[str] | None) -> dict[str, str]:
    chosen = manifest.splits if splits is None else {name: manifest.splits.get(name, ()) for name in splits}
    rejected = {QUARANTINE: manifest.quarantine_sha256} if splits is None else {}
    sums = {shard.name: shard.sha256 for part in chosen.values() for shard in part}
    return {INDEX: manifest.index_sha256, **rejected, **sums}
