"""The work of one prepare task: check the samples of a shard, publish its tar, and then its rows.

`rows/<shard>.parquet` beside the tars holds the shard's part of the index with a sha256 an image, and in its
metadata what was rejected. It is the shard's completion mark: a rerun keeps every shard whose rows name the same
plan and whose tar is whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RawSample, RejectedSampleError
from pipeline.shards.sample_check import CheckedSample, check_sample
from pipeline.shards.shards import INDEX_SCHEMA, QUARANTINE_SCHEMA, ShardWriter
from segvit.grey_range import GreyRange, join_ranges

ROWS = "rows"
# Raise it when rows change: they are made anew then, the shards with them.
ROWS_VERSION = 4
ROWS_SCHEMA = INDEX_SCHEMA.append(pa.field("image_sha256", pa.binary(32)))  # of the source's file
DIGEST_BYTES = 8
_MARK = b"shard_result"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What goes into one shard; `digest` covers all that shapes its bytes."""

    split: str
    name: str
    samples: Sequence[RawSample]
    digest: str


class Duplicate(NamedTuple):
    """A checked sample that is left out of its shard, because its image is a duplicate."""

    row: int  # number among the shard's checked samples
    file: str
    same_as: str  # the file that stays, and its split


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a shard's task sends back: counts and sums and 8 bytes an image; the rows stay on storage.

    Attributes:
        num_rejected: samples that did not pass the checks; duplicates did.
        first_rejected: a row of QUARANTINE_SCHEMA.
        image_digests: the first 8 bytes of each checked image's sha256, in order, duplicates too.
        index_colours: by index into the label maps' palettes, the colour and the first file that has it there; of
            data whose indices no list of colours explains, see `clashing_colours`.
        num_deep: checked images of more than 8 bits a channel, duplicates too.
        measured: the range of their values, where it is to be found out.
        grey_range: what they were scaled by; None: they wait for it, and the shard is without them.
    """

    plan_digest: str
    name: str
    split: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_rejected: int
    first_rejected: dict[str, str] | None
    duplicates: tuple[Duplicate, ...]
    image_digests: bytes
    index_colours: Mapping[str, tuple[list[int], str]] = field(default_factory=dict)
    num_deep: int = 0
    measured: GreyRange | None = None
    grey_range: GreyRange | None = None

    @property
    def num_quarantined(self) -> int:
        """Samples of the plan that are not in the shard."""
        return self.num_rejected + len(self.duplicates)


def prepare_shard(dataset: RawDataset, plan: ShardPlan, target: str, config: DataConfig) -> ShardResult:
    """Publish one shard and its rows, or keep those that are there already: the work of one task.

    Images of more than 8 bits a channel are measured and left out, unless `config` gives the grey range; see
    `revise_shard`. Raises UserError for a rejected sample where `on_bad_sample` is `fail`; nothing is published then.
    """
    kept = _read_result(target, plan)
    if kept is not None:
        return kept
    # Rows of another plan must not vouch for the tar that is about to replace theirs.
    storage.remove_files(target, [rows_name(plan.name)])
    found = _Found([], {}, [])
    samples = _check_samples(dataset, plan, config, config.grey_range, found)
    return _publish_shard(plan, target, samples, found, (), config.grey_range)


def revise_shard(
    dataset: RawDataset,
    plan: ShardPlan,
    target: str,
    config: DataConfig,
    duplicates: Sequence[Duplicate],
    grey_range: GreyRange | None,
) -> ShardResult:
    """Publish the shard of `plan` again, without `duplicates`, and scaled by `grey_range`.

    `duplicates` are all that shall be left out of it. What stays is copied from the published tar: nothing is read
    from the source or decoded again, unless a sample comes back that was left out before.
    """
    table, mark = _read_table(target, plan.name)
    left_out = {duplicate.row for duplicate in duplicates}
    found = _Found(mark["rejected"], mark["index_colours"], [])
    come_back = any(row not in left_out for row, *_ in mark["duplicates"])
    if come_back or (mark["num_deep"] and _range_of(mark["grey_range"]) != grey_range):
        found = _Found([], {}, [])
        samples = _check_samples(dataset, plan, config, grey_range, found)
    else:
        samples = _stored_samples(target, plan, table, left_out)
    deep = mark["num_deep"], _range_of(mark["measured"])
    return _publish_shard(plan, target, samples, found, duplicates, grey_range, deep)


def rows_name(shard: str) -> str:
    """Where the rows of `shard` lie in the shard set."""
    return f"{ROWS}/{shard.removesuffix('.tar')}.parquet"


def read_rows(target: str, shard: str) -> tuple[pa.Table, pa.Table]:
    """The parts of the index and of the quarantine that belong to `shard`."""
    table, mark = _read_table(target, shard)
    duplicates = [Duplicate(*fields) for fields in mark["duplicates"]]
    rejected = list(mark["rejected"])
    for duplicate in duplicates:
        origin = {name: table[name][duplicate.row].as_py() for name in ("split", "key")}
        rejected.append(origin | explain_duplicate(duplicate))
    if duplicates:
        left_out = pa.array([duplicate.row for duplicate in duplicates])
        table = table.filter(pc.invert(pc.is_in(pa.array(range(len(table))), left_out)))
    index = table.select(INDEX_SCHEMA.names).replace_schema_metadata(None)
    return index, pa.Table.from_pylist(rejected, QUARANTINE_SCHEMA)


def read_column(target: str, shard: str, column: str) -> list[Any]:
    """A column of ROWS_SCHEMA for all checked samples of `shard`, duplicates too."""
    with storage.open_uri(storage.join(target, rows_name(shard))) as file:
        values: list[Any] = pq.read_table(file, columns=[column])[column].to_pylist()
    return values


def publish_parquet(uri: str, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write `tables` as one file, a row group each, one in memory at a time; the number of rows."""
    num_rows = 0
    with storage.publishing(uri) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def explain_duplicate(duplicate: Duplicate) -> dict[str, str]:
    """File, reason and remedy of a duplicate's quarantine row."""
    return {
        "file": duplicate.file,
        "reason": f"is the same image, byte for byte, as {duplicate.same_as}",
        "remedy": "remove one of the two",
    }


def explain_rejection(row: Mapping[str, str]) -> str:
    """One sentence for the row of a rejected sample."""
    return f"{row['file']} {row['reason']}; {row['remedy']}"


class _Found(NamedTuple):
    """What the checks of a shard's samples fill: quarantine rows, `ShardResult.index_colours`, deep images' ranges."""

    rejected: list[dict[str, str]]
    index_colours: dict[str, tuple[list[int], str]]
    grey_ranges: list[GreyRange]


def clashing_colours(
    known: Mapping[str, tuple[list[int], str]], others: Mapping[str, tuple[list[int], str]]
) -> RejectedSampleError | None:
    """The error where an index has another colour in `others` than in `known`: one of the two has its own palette.

    Quantised and re-indexed pictures have one each, so that an index is another class from file to file.
    """
    for index, (colour, file) in others.items():
        before, first = known.get(index, (colour, file))
        if list(before) != list(colour):
            return RejectedSampleError(
                file,
                f"has the colour {list(colour)} at index {index} of its palette, where {first} has {list(before)}: "
                "each file has its own palette, and indices are no class ids",
                "give the classes file a palette, and label maps are read by colour, or export ids",
            )
    return None


def _check_samples(
    dataset: RawDataset, plan: ShardPlan, config: DataConfig, grey_range: GreyRange | None, found: _Found
) -> Iterator[CheckedSample]:
    """The samples that pass; what is found of them goes to `found`."""
    rejected = found.rejected
    for sample in plan.samples:
        try:
            checked = check_sample(dataset, sample, config.max_long_side, grey_range)
            colours = {str(index): (list(one), sample.label) for index, one in checked.index_colours.items()}
            clash = clashing_colours(found.index_colours, colours)
            if clash is not None:
                raise clash
            for index, one in colours.items():
                found.index_colours.setdefault(index, one)
        except RejectedSampleError as error:
            row = {"split": plan.split, "key": sample.key, "file": error.file}
            rejected.append(row | {"reason": error.reason, "remedy": error.remedy})
        else:
            if checked.grey_range is not None:
                found.grey_ranges.append(checked.grey_range)
            yield checked


def _stored_samples(target: str, plan: ShardPlan, table: pa.Table, left_out: Container[int]) -> Iterator[CheckedSample]:
    """The checked samples of a published shard; those to leave out come without their bytes."""
    with storage.open_uri(storage.join(target, plan.name)) as file:
        for number, row in enumerate(table.to_pylist()):
            members = [b"", b""]
            if number not in left_out:
                for position, kind in enumerate(("image", "label")):
                    file.seek(row[f"{kind}_offset"])
                    members[position] = file.read(row[f"{kind}_size"])
            yield CheckedSample(row, members[0], members[1])


def _publish_shard(
    plan: ShardPlan,
    target: str,
    samples: Iterable[CheckedSample],
    found: _Found,
    duplicates: Sequence[Duplicate],
    grey_range: GreyRange | None,
    deep: tuple[int, GreyRange | None] | None = None,
) -> ShardResult:
    """The tar of `samples` without the duplicates, then its rows; `found` is read after the last sample.

    `deep` says the number of deep images, and their range, where these were measured before.
    """
    left_out = {duplicate.row for duplicate in duplicates}
    rows: list[dict[str, Any]] = []
    with storage.publishing(storage.join(target, plan.name)) as file:
        writer = ShardWriter(file)
        for number, sample in enumerate(samples):
            offsets = (0, 0)
            if number not in left_out:
                offsets = writer.add(sample.row["key"], sample.suffix, sample.image, sample.label_png)
            location = {"split": plan.split, "shard": plan.name, "image_offset": offsets[0], "label_offset": offsets[1]}
            rows.append(sample.row | location)
        sha256 = writer.finish()
    rejected = found.rejected
    num_deep, measured = deep or (len(found.grey_ranges), functools.reduce(join_ranges, found.grey_ranges, None))
    result = ShardResult(
        plan_digest=plan.digest,
        name=plan.name,
        split=plan.split,
        sha256=sha256,
        num_bytes=writer.num_bytes,
        num_samples=writer.num_samples,
        num_rejected=len(rejected),
        first_rejected=rejected[0] if rejected else None,
        duplicates=tuple(duplicates),
        image_digests=_shorten(row["image_sha256"] for row in rows),
        index_colours=found.index_colours,
        num_deep=num_deep,
        measured=measured,
        grey_range=grey_range if num_deep else None,
    )
    mark = {name: value for name, value in asdict(result).items() if name != "image_digests"}
    text = json.dumps(mark | {"rejected": rejected}, sort_keys=True)
    schema = ROWS_SCHEMA.with_metadata({_MARK: text})
    publish_parquet(storage.join(target, rows_name(plan.name)), [pa.Table.from_pylist(rows, schema)], schema)
    return result


def _read_result(target: str, plan: ShardPlan) -> ShardResult | None:
    """The result of a shard that an earlier run published, where it is whole and of the same plan."""
    try:
        table, mark = _read_table(target, plan.name)
        if mark.pop("plan_digest") != plan.digest:
            return None
        del mark["rejected"]
        mark["duplicates"] = tuple(Duplicate(*fields) for fields in mark["duplicates"])
        mark |= {name: _range_of(mark[name]) for name in ("measured", "grey_range")}
        digests = _shorten(table["image_sha256"].to_pylist())
        result = ShardResult(plan_digest=plan.digest, image_digests=digests, **mark)
        sha256 = storage.file_digest(storage.join(target, plan.name))
    except (OSError, pa.ArrowInvalid, LookupError, ValueError, TypeError):
        return None
    return result if sha256 == result.sha256 else None


def _read_table(target: str, shard: str) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of `shard`, and what their metadata says."""
    with storage.open_uri(storage.join(target, rows_name(shard))) as file:
        table = pq.read_table(file)
    mark: dict[str, Any] = json.loads(table.schema.metadata[_MARK])
    return table, mark


def _range_of(written: list[float] | None) -> GreyRange | None:
    return None if written is None else (written[0], written[1])


def _shorten(digests: Iterable[bytes]) -> bytes:
    return b"".join(digest[:DIGEST_BYTES] for digest in digests)
