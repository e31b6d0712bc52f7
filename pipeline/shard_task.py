"""The work of one prepare task: check the samples of a shard, publish its tar, and then its rows.

`rows/<shard>.parquet` beside the tars holds the shard's part of the index, and in its metadata the result of
the task. It is the shard's completion mark: a rerun keeps every shard whose rows name the same plan.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets import RawDataset, RawSample, RejectedSampleError
from pipeline.decode import IGNORE_INDEX, DecodeError, encode_png, open_image
from pipeline.errors import UserError
from pipeline.shards import INDEX_SCHEMA, ShardWriter

ROWS = "rows"
_RESULT = b"shard_result"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What goes into one shard; `digest` covers all that shapes its bytes."""

    split: str
    name: str
    samples: Sequence[RawSample]
    digest: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a shard's task sends back: counts and sums, the rows stay on storage."""

    plan_digest: str
    name: str
    split: str
    sha256: str
    num_bytes: int
    num_samples: int
    rejected: list[dict[str, str]]  # rows of QUARANTINE_SCHEMA


def prepare_shard(dataset: RawDataset, plan: ShardPlan, target: str, fail_on_rejected: bool) -> ShardResult:
    """Publish one shard and its rows, or keep those that are there already: the work of one task.

    Raises UserError for a rejected sample where `fail_on_rejected`; nothing is published then.
    """
    kept = _read_result(target, plan)
    if kept is not None:
        return kept
    # Rows of another plan must not vouch for the tar that is about to replace theirs.
    remove_files(target, [rows_name(plan.name)])
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    with storage.publishing(storage.join(target, plan.name)) as file:
        writer = ShardWriter(file)
        for sample in plan.samples:
            try:
                rows.append({"split": plan.split, "shard": plan.name, **_add_sample(writer, dataset, sample)})
            except RejectedSampleError as error:
                row = {
                    "split": plan.split,
                    "key": sample.key,
                    "file": error.file,
                    "reason": error.reason,
                    "remedy": error.remedy,
                }
                if fail_on_rejected:
                    raise UserError(explain_rejection(row)) from error
                rejected.append(row)
        sha256 = writer.finish()
    result = ShardResult(plan.digest, plan.name, plan.split, sha256, writer.num_bytes, writer.num_samples, rejected)
    schema = INDEX_SCHEMA.with_metadata({_RESULT: json.dumps(asdict(result), sort_keys=True)})
    publish_parquet(storage.join(target, rows_name(plan.name)), [pa.Table.from_pylist(rows, schema)], schema)
    return result


def _read_result(target: str, plan: ShardPlan) -> ShardResult | None:
    """The result of a shard that an earlier run published, where it is whole and of the same plan."""
    try:
        with storage.open_uri(storage.join(target, rows_name(plan.name))) as file:
            result = ShardResult(**json.loads(pq.read_schema(file).metadata[_RESULT]))
        if result.plan_digest != plan.digest:
            return None
        sha256 = storage.file_digest(storage.join(target, plan.name))
    except (OSError, pa.ArrowInvalid, LookupError, ValueError, TypeError):
        return None
    return result if sha256 == result.sha256 else None


def rows_name(shard: str) -> str:
    """Where the rows of `shard` lie in the shard set."""
    return f"{ROWS}/{shard.removesuffix('.tar')}.parquet"


def read_rows(target: str, shard: str) -> pa.Table:
    """The part of the index that belongs to `shard`."""
    with storage.open_uri(storage.join(target, rows_name(shard))) as file:
        return pq.read_table(file).replace_schema_metadata(None)


def publish_parquet(uri: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write `tables` as one file, a row group each, one in memory at a time."""
    with storage.publishing(uri) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def remove_files(target: str, names: Iterable[str]) -> None:
    """Remove the files `names` below `target` that are there."""
    filesystem, folder = fsspec.core.url_to_fs(target)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm_file(f"{folder}/{name}")


def _add_sample(writer: ShardWriter, dataset: RawDataset, sample: RawSample) -> dict[str, Any]:
    """Check `sample`, append it to the shard; its row of the index. Raises RejectedSampleError."""
    content, label = dataset.read(sample)
    try:
        image, suffix = open_image(content)
    except DecodeError as error:
        remedy = "replace the file or remove the sample"
        raise RejectedSampleError(sample.image, str(error), remedy) from error
    height, width = label.shape
    if (image.height, image.width) != (height, width):
        raise RejectedSampleError(
            sample.image,
            f"is {image.height}x{image.width} (height x width) but its label map {sample.label} is {height}x{width}",
            "give both the same size or remove the sample",
        )
    counts = np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)
    class_pixels = counts[: len(dataset.class_names)]
    assert class_pixels.sum() + counts[IGNORE_INDEX] == label.size, "a data set let an unknown class id pass"
    label_png = encode_png(label)
    image_offset, label_offset = writer.add(sample.key, suffix, content, label_png)
    return {
        "key": sample.key,
        "image_offset": image_offset,
        "image_size": len(content),
        "label_offset": label_offset,
        "label_size": len(label_png),
        "height": height,
        "width": width,
        "class_pixels": class_pixels.tolist(),
    }


def explain_rejection(row: dict[str, str]) -> str:
    """One sentence for the row of a rejected sample."""
    return f"{row['file']} {row['reason']}; {row['remedy']}"
