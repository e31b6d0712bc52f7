"""Class balance of a shard set, from its index alone, and repeat factors for images with rare classes.

n samples of a split, K classes. The index is read a row group at a time, so memory does not grow with n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.shards.shard_reader import ShardReader, check_index
from pipeline.shards.shards import ShardSetError
from pipeline.storage.names import INDEX
from segvit.image_files import one_line

BATCH_ROWS = 16384


class ClassCounts(NamedTuple):
    """How often each class comes in one split."""

    num_images: int
    num_pixels: int  # ignored ones, too
    pixels: NDArray[np.int64]  # (K,)
    images: NDArray[np.int64]  # (K,) images with at least one pixel of the class

    @property
    def ignored_pixels(self) -> int:
        """Pixels that belong to no class."""
        return self.num_pixels - int(self.pixels.sum())


def count_classes(reader: ShardReader, split: str) -> ClassCounts:
    """Pixels and images of each class in `split`; raises ShardSetError for an index that does not fit."""
    return count_in_index(reader.uri, len(reader.manifest.classes), split)


def count_in_index(uri: str, num_classes: int, split: str) -> ClassCounts:
    """`count_classes` of the shard set at `uri`, whose manifest is not needed."""
    pixels, images = np.zeros(num_classes, dtype=np.int64), np.zeros(num_classes, dtype=np.int64)
    num_images = num_pixels = 0
    for class_pixels, size in _class_pixels(uri, num_classes, split):
        pixels += class_pixels.sum(axis=0)
        images += (class_pixels > 0).sum(axis=0)
        num_images += len(class_pixels)
        num_pixels += int(size.sum())
    return ClassCounts(num_images, num_pixels, pixels, images)


def missing_classes(
    name: str, class_names: Sequence[str], config: DataConfig, counts: Mapping[str, ClassCounts]
) -> str | None:
    """Which classes `counts` of train and val, of the data set `name`, show no pixel of; None where all are shown.

    With the remedy, unless `classes_without_pixels` allows it.
    """
    missing, num_ignored, num_pixels = [], 0, 0
    for split in ("train", "val"):
        count = counts.get(split)
        if count is None:
            continue
        num_ignored, num_pixels = num_ignored + count.ignored_pixels, num_pixels + count.num_pixels
        names = [class_name for class_name, pixels in zip(class_names, count.pixels, strict=True) if not pixels]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            missing.append(f"{split} shows no pixel of {', '.join(map(repr, names[:5]))}{more}")
    if not missing:
        return None
    found = f"{name}: {'; '.join(missing)}"
    if allows_missing_classes(config):
        return f"{found}: nothing can learn, or measure, these classes"
    hint = "correct the label maps or the list of classes"
    if num_ignored and config.dataset == "folder":
        hint += (
            f" ({num_ignored / num_pixels:.1%} of the pixels are ignored: where 255 is the id of a class, as in masks "
            "of 0 and 255, the classes file says so: {names: [background, object], ids: [0, 255], ignore_ids: []})"
        )
    return f"{found}; {hint}, or set data.classes_without_pixels: allow"


def allows_missing_classes(config: DataConfig) -> bool:
    """Whether data may have classes without a pixel; the scenes of the embedded digits are drawn, so they may."""
    return (config.classes_without_pixels or ("allow" if config.dataset == "digits" else "refuse")) == "allow"


def repeat_factors(reader: ShardReader, split: str, threshold: float) -> NDArray[np.float64]:
    """(n,) how often each sample of `split` should come an epoch (LVIS, arXiv 1908.03195, section B).

    r(c) = max(1, sqrt(threshold / f(c))), f(c) the share of the images that hold class c; an image's factor is
    the largest of its classes', 1 where it has none. Raises ShardSetError for an index that does not fit.
    """
    counts = count_classes(reader, split)
    frequency = np.maximum(counts.images, 1) / max(counts.num_images, 1)
    of_class = np.maximum(1.0, np.sqrt(threshold / frequency))
    rows = _class_pixels(reader.uri, len(reader.manifest.classes), split)
    parts = [np.where(present > 0, of_class, 1.0).max(axis=1) for present, _ in rows]
    return np.concatenate(parts) if parts else np.empty(0)


def _class_pixels(
    shard_set: str, num_classes: int, split: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pixels by class (rows, K) and pixels in all (rows,), part by part."""
    uri = storage.join(shard_set, INDEX)
    try:
        with storage.open_uri(uri) as file:
            check_index(uri, file)
            batches = pq.ParquetFile(file).iter_batches(
                BATCH_ROWS, columns=["split", "height", "width", "class_pixels"]
            )
            for batch in batches:
                rows = batch.filter(pc.equal(batch["split"], split))
                if len(rows):
                    yield _pixels_of(uri, rows, num_classes)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ShardSetError(f"{uri} cannot be read ({one_line(error)}); prepare the shard set again") from error


def _pixels_of(uri: str, rows: pa.RecordBatch, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    lengths = pc.list_value_length(rows["class_pixels"])
    if lengths.null_count or not pc.all(pc.equal(lengths, num_classes)).as_py():
        raise ShardSetError(f"{uri} has not {num_classes} classes a sample; prepare the shard set again")
    values = rows["class_pixels"].flatten()
    height, width = rows["height"].cast(pa.int64()), rows["width"].cast(pa.int64())
    if values.null_count or height.null_count or width.null_count:
        raise ShardSetError(f"{uri} has samples without a size; prepare the shard set again")
    size = height.to_numpy(zero_copy_only=False) * width.to_numpy(zero_copy_only=False)
    return values.to_numpy(zero_copy_only=False).reshape(len(rows), num_classes), size
