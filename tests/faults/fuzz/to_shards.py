"""A data set from its files to shards: each input ends in shards, in a row of the quarantine or in one clear error."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_check import check_shard_set
from tests.faults.fuzz.case import Case
from tests.faults.mutations import BYTES, hostile_name, pack, replace_by_special

OUTPUT = re.compile(r"(rows/)?((train|val)-\d{5}\.(tar|parquet)|index\.parquet|quarantine\.parquet|manifest\.json)")


def prepare(folder: Path, rng: random.Random) -> Case:
    """A CamVid miniature of which one file, one name or the archive around it is mutated."""
    (folder / "here").mkdir()
    os.chdir(folder / "here")
    _build_source(folder / "raw")
    kind, root = _mutate(folder / "raw", rng)
    return Case(kind, lambda: _read(folder, root))


def _build_source(root: Path) -> None:
    """Two images to train on and one to evaluate on, 16x24 pixels; the first is a JPEG by content."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
            image.save(root / split / f"{number}.png", "PNG" if number else "JPEG")
            Image.fromarray(rng.integers(0, 12, (16, 24), dtype=np.uint8)).save(root / f"{split}annot/{number}.png")


def _mutate(root: Path, rng: random.Random) -> tuple[str, Path]:
    """Change one thing in the data set at `root`: what it was, and where the data set is now."""
    file = root / rng.choice(["train/0.png", "train/1.png", "trainannot/0.png"])
    where = rng.choices(["bytes", "special", "name", "archive"], [60, 6, 8, 26])[0]
    if where == "bytes":
        kinds = list(BYTES)
        kind = rng.choices(kinds, [BYTES[name][0] for name in kinds])[0]
        file.write_bytes(BYTES[kind][1](file.read_bytes(), rng))
        return kind, root
    if where == "special":
        replace_by_special(file, rng)
        return "no plain file", root
    if where == "name":
        name = hostile_name(rng)
        for folder in ("train", "trainannot"):
            (root / folder / "1.png").rename(root / folder / f"{name}.png")
        return "hostile name", root
    archive = root.with_suffix(rng.choice([".tar", ".zip"]))
    pack(root, archive, rng)
    if rng.random() < 0.6:
        kind = rng.choice(["truncated", "bits flipped", "overwritten"])
        archive.write_bytes(BYTES[kind][1](archive.read_bytes(), rng))
        return f"{kind} archive", archive
    return "hostile archive", archive


def _read(folder: Path, root: Path) -> None:
    """Prepare, look at the shards, and raise AssertionError for any file that should not be there."""
    target = folder / "out"
    before = {path for path in folder.rglob("*") if target not in path.parents}
    lenient = {"on_bad_sample": "quarantine", "max_quarantined_fraction": 1.0, "classes_without_pixels": "allow"}
    config = DataConfig.model_validate({"dataset": "camvid", "root": str(root), **lenient})
    try:
        prepare_shards(config, str(target), progress=lambda line: None)
        check_shard_set(str(target))
    except UserError:
        assert not (target / "manifest.json").exists(), "shards are published in spite of an error"
        raise
    finally:
        after = {path for path in folder.rglob("*") if target not in path.parents and path != target}
        files = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
        stray = [*map(str, after ^ before), *(name for name in files if not OUTPUT.fullmatch(name))]
        assert not stray, f"stray files: {stray}"
