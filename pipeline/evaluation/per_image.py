"""Each image's pixel counts by class: what scores of any selection of images are sums of.

On storage it is a Parquet file with a row for every class that occurs in an image's label or prediction; a
street scene has a dozen of them, whatever the number of classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Evaluation
from pipeline.storage.names import COUNTS_FILE
from segvit.image_files import one_line

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("class", pa.int16(), nullable=False),
        pa.field("intersection", pa.int64(), nullable=False),
        pa.field("predicted", pa.int64(), nullable=False),
        pa.field("labelled", pa.int64(), nullable=False),
    ]
)

# n images, K classes, k classes that occur in one image


class ImageCounts(NamedTuple):
    """One image's pixels of the classes that occur in it: `classes` their ids, the others pixels, all (k,)."""

    key: str
    classes: NDArray[np.int64]
    intersection: NDArray[np.int64]
    predicted: NDArray[np.int64]
    labelled: NDArray[np.int64]

    @classmethod
    def of(cls, key: str, matrix: NDArray[np.int64]) -> Self:
        """The counts in one image's confusion matrix (K, K), rows by true class."""
        labelled, predicted = matrix.sum(1), matrix.sum(0)
        [classes] = np.nonzero(labelled + predicted)
        return cls(key, classes, np.diag(matrix)[classes], predicted[classes], labelled[classes])


@dataclass(frozen=True, eq=False, slots=True)
class CountTable:
    """The counts of n images, pixels (n, K); rows in the order of `keys`."""

    keys: tuple[str, ...]
    intersection: NDArray[np.int64]
    predicted: NDArray[np.int64]
    labelled: NDArray[np.int64]

    @property
    def union(self) -> NDArray[np.int64]:
        """Pixels (n, K) that are labelled or predicted as a class."""
        return self.predicted + self.labelled - self.intersection

    def image_mious(self) -> NDArray[np.float64]:
        """Each image's mIoU (n,) over the classes in its label or prediction; nan without a labelled pixel."""
        iou = _ratio(self.intersection, self.union)
        occurs = ~np.isnan(iou)
        number = occurs.sum(1)
        total = np.where(occurs, iou, 0.0).sum(1)
        mious: NDArray[np.float64] = np.where(number > 0, total / np.maximum(number, 1), np.nan)
        return mious

    def class_ious(self) -> NDArray[np.float64]:
        """IoU (K,) over all images; nan for a class that does not occur."""
        return _ratio(self.intersection.sum(0), self.union.sum(0))


def write_counts(images: Sequence[ImageCounts], uri: str) -> str:
    """Publish the images' counts as a Parquet file, sorted by key; returns its sha256."""
    ordered = sorted(images, key=lambda image: image.key)
    repeats = [len(image.classes) for image in ordered]

    def column(name: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(image, name) for image in ordered] or [np.zeros(0, np.int64)])

    columns = [
        np.repeat(np.array([image.key for image in ordered], dtype=object), repeats),
        *(column(name) for name in ("classes", "intersection", "predicted", "labelled")),
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
    # An image without a labelled pixel has no row; it counts as scored all the same.
    empty = [image.key for image, repeat in zip(ordered, repeats, strict=True) if not repeat]
    table = pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata({"empty": "\n".join(empty)}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.publish_bytes(uri, buffer.getvalue())
    return storage.file_digest(uri)


def _counts_problem(evaluation: Evaluation) -> str | None:
    """Why an evaluation's counts cannot be used, or None."""
    uri = storage.join(evaluation.uri, COUNTS_FILE)
    if not evaluation.counts_digest:
        return "it was made by a release that kept no counts of single images"
    if not storage.exists(uri):
        return f"{uri} is gone"
    return None if storage.file_digest(uri) == evaluation.counts_digest else f"{uri} has changed"


def read_counts(evaluation: Evaluation) -> CountTable:
    """The counts of an evaluation, images sorted by key; raises UserError where they are gone or have changed."""
    if (problem := _counts_problem(evaluation)) is not None:
        raise UserError(f"no counts of single images: {problem}; run its flow again")
    uri, num_classes = storage.join(evaluation.uri, COUNTS_FILE), len(evaluation.class_names)
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
        empty = (table.schema.metadata or {}).get(b"empty", b"").decode()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri} cannot be read ({one_line(error)}); run its flow again") from error
    named = np.asarray(table["key"].to_pylist() + empty.splitlines(), dtype=object)
    keys, images = np.unique(named, return_inverse=True)
    positions = (images[: table.num_rows], table["class"].to_numpy())

    def dense(name: str) -> NDArray[np.int64]:
        counts = np.zeros((len(keys), num_classes), dtype=np.int64)
        counts[positions] = table[name].to_numpy()
        return counts

    return CountTable(tuple(keys.tolist()), dense("intersection"), dense("predicted"), dense("labelled"))


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """segvit.metrics.ratio, for which torch would have to be loaded."""
    quotient: NDArray[np.float64] = np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
    return quotient
