"""Files that hold others: archives, Parquet files, and a data set from its files to shards."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets import archive
from pipeline.datasets.archive import ExtentError
from tests.faults.fuzz.annotation_files import config_of, picture
from tests.faults.fuzz.case import Case, read_dataset
from tests.faults.mutations import BYTES, numbers, pack, replace_by_special, splice

_KINDS = ("truncated", "bits flipped", "overwritten", "spliced", "numbers")


def _archive(folder: Path, suffix: str, rng: random.Random) -> Case:
    (folder / "raw/train").mkdir(parents=True)
    for number in range(3):
        picture(folder / f"raw/train/{number}.png", number)
    path = folder / f"packed{suffix}"
    pack(folder / "raw", path, rng)
    kind = "hostile member"
    if rng.random() < 0.75:
        kind = rng.choice(_KINDS)
        path.write_bytes(BYTES[kind][1](path.read_bytes(), rng))

    def read() -> None:
        for member in archive.index_archive(str(path), "").values():
            try:
                archive.read_extent(member.extent)
            except (ExtentError, OSError):
                continue

    return Case(kind, read)


def tar(folder: Path, rng: random.Random) -> Case:
    """A .tar with members that lead out of it."""
    return _archive(folder, ".tar", rng)


def zipped(folder: Path, rng: random.Random) -> Case:
    """A .zip with members that lead out of it, or swell."""
    return _archive(folder, ".zip", rng)


def parquet(folder: Path, rng: random.Random) -> Case:
    """Pictures in the rows of a Parquet file."""
    rows: list[dict[str, Any]] = []
    for number in range(4):
        row = {}
        for column, is_label in (("image", False), ("label", True)):
            picture(folder / "x.png", number, label=is_label)
            row[column] = {"bytes": (folder / "x.png").read_bytes(), "path": f"{number}.png"}
        rows.append(row)
    (folder / "x.png").unlink()
    (folder / "classes.txt").write_text("ground\nthing\n")
    kind = rng.choice([*_KINDS, "numbers", "odd rows", "footer", "footer"])
    if kind == "odd rows":
        _make_odd(rows, rng)
    buffer = io.BytesIO()
    try:
        table = pa.Table.from_pylist(rows)
        packing = rng.choice(["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
        pq.write_table(table, buffer, compression=packing, row_group_size=rng.choice([1, 4]))
    except (pa.ArrowException, TypeError):
        buffer.write(b"PAR1")
    data = buffer.getvalue()
    if kind == "footer":
        start = max(0, len(data) - rng.choice([12, 400, 1200]))
        data = data[:start] + rng.choice([numbers, splice, BYTES["bits flipped"][1]])(data[start:], rng)
    elif kind != "odd rows":
        data = BYTES[kind][1](data, rng)
    (folder / "train.parquet").write_bytes(data)
    return Case(kind, lambda: read_dataset(config_of("parquet", folder, parquet={"val_fraction": 0.4})))


def _make_odd(rows: list[dict[str, Any]], rng: random.Random) -> None:
    odd: tuple[Any, ...] = (None, {"bytes": None, "path": "../../etc/passwd"}, {"bytes": b"", "path": "x" * 9000})
    for row in rows[: rng.randint(1, 4)]:
        row[rng.choice(["image", "label"])] = rng.choice(odd)
    if rng.random() < 0.3:
        for row in rows:
            row["image"] = rng.choice([b"bytes alone", b"\x89PNG"])


def folder_tree(folder: Path, rng: random.Random) -> Case:
    """A folder of images where one file is a pipe, a device, a link out, a huge hole."""
    for number, split in enumerate(("train", "train", "val")):
        picture(folder / f"images/{split}/{number}.png", number)
        picture(folder / f"labels/{split}/{number}.png", number, label=True)
    (folder / "classes.txt").write_text("ground\nthing\n")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    target = rng.choice(files)
    if target.parent != folder and rng.random() < 0.3:
        target = target.parent
        target.rename(folder.parent / "moved")
        target.symlink_to(rng.choice(["/etc", "/", str(folder), str(folder.parent / "moved"), "/proc/self"]))
    else:
        replace_by_special(target, rng)
    os.chdir(folder)
    return Case("no plain file", lambda: read_dataset(config_of("folder", folder)))
