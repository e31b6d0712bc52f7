"""What a shard set holds, for people: counts and shares of every class in every split."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.records import Record
from pipeline.shards.balance import count_classes
from pipeline.shards.shard_reader import ShardReader, open_shard_set
from pipeline.shards.shards import ShardSetError
from pipeline.storage.names import QUARANTINE
from segvit.image_files import one_line

MOST_QUARANTINED = 100


class ClassSummary(Record):
    """One class in one split; shares are of all labelled pixels and of all images, 0 to 1."""

    name: str
    pixels: int
    pixel_share: float
    images: int
    image_share: float


class SplitSummary(Record):
    """One split."""

    name: str
    num_images: int
    num_shards: int
    num_bytes: int
    num_pixels: int
    ignored_share: float
    classes: tuple[ClassSummary, ...]


class QuarantinedSample(Record):
    """A sample that the shards do not hold, and why."""

    split: str
    key: str
    file: str
    reason: str
    remedy: str


class DataSummary(Record):
    """A shard set; `palette` has the classes' colours, in their order.

    `quarantined`: the first of the samples that it does not hold, in the order of the data set.
    """

    name: str
    uri: str
    digest: str
    num_quarantined: int
    quarantined: tuple[QuarantinedSample, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: tuple[SplitSummary, ...]


def summarize_shard_set(uri: str) -> DataSummary:
    """Count what the index of the shard set at `uri` says; raises ShardSetError where it is missing or damaged."""
    reader = open_shard_set(uri)
    manifest = reader.manifest
    return DataSummary(
        name=manifest.name,
        uri=uri,
        digest=manifest.digest(),
        num_quarantined=manifest.num_quarantined,
        quarantined=tuple(_read_quarantine(uri)) if manifest.num_quarantined else (),
        palette=manifest.palette,
        splits=tuple(_summarize_split(reader, split) for split in manifest.splits),
    )


def _read_quarantine(uri: str) -> Iterator[QuarantinedSample]:
    quarantine = storage.join(uri, QUARANTINE)
    try:
        with storage.open_uri(quarantine) as file:
            for batch in pq.ParquetFile(file).iter_batches(MOST_QUARANTINED):
                yield from (QuarantinedSample(**row) for row in batch.to_pylist())
                return
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise ShardSetError(f"{quarantine} cannot be read ({one_line(error)}); prepare the shard set again") from error


def _summarize_split(reader: ShardReader, split: str) -> SplitSummary:
    counts, shards = count_classes(reader, split), reader.manifest.splits[split]
    num_expected = sum(shard.num_samples for shard in shards)
    if counts.num_images != num_expected:
        raise ShardSetError(
            f"the index of {reader.uri} has {counts.num_images} samples in split {split!r}, the manifest says "
            f"{num_expected}; prepare the shard set again"
        )
    labelled = int(counts.pixels.sum())
    return SplitSummary(
        name=split,
        num_images=counts.num_images,
        num_shards=len(shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        num_pixels=counts.num_pixels,
        ignored_share=counts.ignored_pixels / max(counts.num_pixels, 1),
        classes=tuple(
            ClassSummary(
                name=name,
                pixels=int(pixels),
                pixel_share=int(pixels) / max(labelled, 1),
                images=int(images),
                image_share=int(images) / max(counts.num_images, 1),
            )
            for name, pixels, images in zip(reader.manifest.classes, counts.pixels, counts.images, strict=True)
        ),
    )
