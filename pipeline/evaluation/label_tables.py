"""What label maps on disk say, for other tools: COCO annotations, and the area of each class as a table.

Both are made of the label maps alone, in their order: the same maps give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipeline import storage
from pipeline.causes import one_line
from pipeline.errors import UserError
from pipeline.evaluation.predict import ImageTask

ROWS_PER_GROUP = 100_000

AREAS_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("class_id", pa.int16()),
        ("class", pa.string()),
        ("pixels", pa.int64()),
        ("share", pa.float64()),
    ]
)


class LabelledImage(NamedTuple):
    """A label map (H, W) of class ids, and the path of its image below its source."""

    path: str
    labels: NDArray[np.uint8]


WriteTable = Callable[[IO[bytes], Iterator[LabelledImage], Sequence[str]], None]


def check_targets(uris: Sequence[str], *, replace: bool) -> None:
    """Raise UserError for a table that exists, unless it is to be replaced, or a location that is none."""
    for uri in uris:
        try:
            exists = storage.exists(uri)
        except (ValueError, ImportError) as error:
            raise UserError(f"{uri} cannot be written ({error}); give a path or an fsspec URL") from error
        if exists and not replace:
            raise UserError(f"{uri} exists; give --overwrite or --skip-existing to replace it, or another name")


def publish_table(uri: str, write: WriteTable, tasks: Sequence[ImageTask], class_names: Sequence[str]) -> None:
    """Write a table of the tasks' label maps to `uri`, whole or not at all; raises UserError."""
    try:
        with storage.publishing(uri) as file:
            write(file, read_label_maps(tasks, len(class_names)), class_names)
    except OSError as error:
        raise UserError(f"{uri} cannot be written: {one_line(error)}") from error


def read_label_maps(tasks: Sequence[ImageTask], num_classes: int) -> Iterator[LabelledImage]:
    """The label maps of the tasks that have one, one at a time; raises UserError for one that is not of the model."""
    for task in tasks:
        if not task.labels.exists():
            continue
        try:
            with Image.open(task.labels) as picture:
                labels = np.asarray(picture)
        except (OSError, ValueError) as error:
            raise UserError(f"{task.labels} cannot be read ({error}); remove it and predict again") from error
        if labels.dtype != np.uint8 or labels.ndim != 2 or labels.max() >= num_classes:
            raise UserError(
                f"{task.labels} is no label map of this model, of {num_classes} classes; remove it and predict again"
            )
        yield LabelledImage(task.image.path, labels)


def write_areas(file: IO[bytes], images: Iterator[LabelledImage], class_names: Sequence[str]) -> None:
    """Write Parquet: a row an image and class, also of classes that it does not show, with pixels and share of all."""
    rows_at_once = max(1, ROWS_PER_GROUP // len(class_names))
    with pq.ParquetWriter(file, AREAS_SCHEMA, compression="zstd") as writer:
        rows: list[tuple[str, NDArray[np.int64], int]] = []
        for image in images:
            counts = np.bincount(image.labels.ravel(), minlength=len(class_names))
            rows.append((image.path, counts, image.labels.size))
            if len(rows) == rows_at_once:
                writer.write_table(_areas_table(rows, class_names))
                rows.clear()
        writer.write_table(_areas_table(rows, class_names))


def _areas_table(rows: Sequence[tuple[str, NDArray[np.int64], int]], class_names: Sequence[str]) -> pa.Table:
    columns = {
        "image": [path for path, _, _ in rows for _ in class_names],
        "class_id": [index for _ in rows for index in range(len(class_names))],
        "class": [name for _ in rows for name in class_names],
        "pixels": [int(count) for _, counts, _ in rows for count in counts],
        "share": [float(count / size) for _, counts, size in rows for count in counts],
    }
    return pa.table(columns, schema=AREAS_SCHEMA)


def write_coco(file: IO[bytes], images: Iterator[LabelledImage], class_names: Sequence[str]) -> None:
    """Write COCO's JSON: for each image and class that it shows, one annotation with the mask as compressed RLE.

    A category's id is the class id, as in the label maps; ids of images and annotations count from 1.
    """
    categories = [{"id": index, "name": name} for index, name in enumerate(class_names)]
    listed: list[dict[str, object]] = []
    num_annotations = 0
    file.write(b'{"annotations":[')
    for image_id, image in enumerate(images, 1):
        height, width = image.labels.shape
        listed.append({"id": image_id, "file_name": image.path, "height": height, "width": width})
        for class_id in np.unique(image.labels).tolist():
            num_annotations += 1
            annotation = {
                "id": num_annotations,
                "image_id": image_id,
                "category_id": class_id,
                **mask_annotation(image.labels == class_id),
                "iscrowd": 0,
            }
            file.write((b",\n" if num_annotations > 1 else b"\n") + _json(annotation))
    file.write(b'\n],"images":' + _json(listed) + b',"categories":' + _json(categories) + b"}\n")


def mask_annotation(mask: NDArray[np.bool_]) -> dict[str, object]:
    """The fields of a COCO annotation that a mask (H, W), somewhere true, gives: segmentation, area, bbox."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "segmentation": {"size": [height, width], "counts": run_length_code(mask)},
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
    }


def run_length_code(mask: NDArray[np.bool_]) -> str:
    """COCO's compressed run lengths of a mask (H, W), column by column, starting with the pixels outside of it.

    From the third on a run is the difference to the one before the last; each is written as digits of five bits and
    one that says whether more follow, the lowest first.
    """
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0] if flat[0] else [], [0], borders, [flat.size]])).astype(np.int64)
    runs[3:] -= runs[1:-2].copy()
    digits: list[int] = []
    for run in runs.tolist():
        while True:
            digit, run = run & 0x1F, run >> 5
            more = run != (-1 if digit & 0x10 else 0)
            digits.append(48 + digit + 32 * more)
            if not more:
                break
    return bytes(digits).decode("ascii")


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
