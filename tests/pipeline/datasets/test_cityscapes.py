"""Cityscapes: cities as folders, 34 raw ids to 19 classes, converted ids, and the publisher's two zips."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.errors import UserError

FRAMES = {
    "train": ["aachen/aachen_000000_000019", "bochum/bochum_000000_000313"],
    "val": ["frankfurt/frankfurt_000000_000294"],
    "test": ["berlin/berlin_000000_000019"],
}
# The benchmark's table: raw id by class, in the order road, sidewalk, building, ..., bicycle.
RAW_BY_CLASS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def make_cityscapes(root: Path, kinds: tuple[str, ...] = ("labelIds", "labelTrainIds")) -> Path:
    """The publisher's tree with images of 4x10 pixels, and every other file that lies in it."""
    for split, frames in FRAMES.items():
        for frame in frames:
            image = root / "leftImg8bit" / split / f"{frame}_leftImg8bit.png"
            label = root / "gtFine" / split / f"{frame}_gtFine_"
            for file in (image, label):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 4), (len(frame), 0, 0)).save(image)
            raw = np.arange(40, dtype=np.uint8).reshape(4, 10) % 34
            raw[3, 9] = 255
            if "labelIds" in kinds:
                Image.fromarray(raw).save(f"{label}labelIds.png")
            if "labelTrainIds" in kinds:
                Image.fromarray(np.where(raw < 19, raw, 255).astype(np.uint8)).save(f"{label}labelTrainIds.png")
            Image.fromarray(raw.astype(np.uint16)).save(f"{label}instanceIds.png")
            Image.new("RGBA", (10, 4)).save(f"{label}color.png")
            Path(f"{label}polygons.json").write_text("{}")
    return root


def open_cityscapes(root: Path) -> RawDataset:
    return open_dataset(DataConfig(dataset="cityscapes", root=str(root)))


def expected_from_raw() -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    raw = np.arange(40).reshape(4, 10) % 34
    raw[3, 9] = 255
    return np.array([[RAW_BY_CLASS.index(value) if value in RAW_BY_CLASS else 255 for value in row] for row in raw])


def test_label_ids__nineteen_classes_and_the_rest_ignored(tmp_path: Path) -> None:
    dataset = open_cityscapes(make_cityscapes(tmp_path))
    assert dataset.splits() == ("train", "val")
    assert [sample.key for sample in dataset.samples("train")] == ["aachen_000000_000019", "bochum_000000_000313"]
    assert dataset.samples("train")[0].label.endswith("gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png")
    pair = dataset.read(dataset.samples("val")[0])
    np.testing.assert_array_equal(pair.label, expected_from_raw())
    assert (dataset.class_names[0], dataset.class_names[18], dataset.palette[0]) == ("road", "bicycle", (128, 64, 128))


def test_label_train_ids__taken_where_there_are_no_raw_ids(tmp_path: Path) -> None:
    dataset = open_cityscapes(make_cityscapes(tmp_path, ("labelTrainIds",)))
    label = dataset.read(dataset.samples("train")[1]).label
    raw = np.arange(40).reshape(4, 10) % 34
    raw[3, 9] = 255
    np.testing.assert_array_equal(label, np.where(raw < 19, raw, 255))


def test_two_zips__read_in_place(tmp_path: Path) -> None:
    plain = make_cityscapes(tmp_path / "plain")
    packed = tmp_path / "packed"
    packed.mkdir()
    for name, folder in (("leftImg8bit_trainvaltest", "leftImg8bit"), ("gtFine_trainvaltest", "gtFine")):
        with zipfile.ZipFile(packed / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("license.txt", "terms")
            for file in sorted((plain / folder).rglob("*.*")):
                archive.write(file, file.relative_to(plain))
    one, other = open_cityscapes(plain), open_cityscapes(packed)
    assert other.splits() == ("train", "val")
    for split in ("train", "val"):
        for sample, twin in zip(one.samples(split), other.samples(split), strict=True):
            assert sample.key == twin.key
            assert one.read(sample).image == other.read(twin).image
            np.testing.assert_array_equal(one.read(sample).label, other.read(twin).label)


def test_missing_label__rejected_and_not_read_from_the_other_kind(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path)
    next((root / "gtFine/train/aachen").glob("*labelIds.png")).unlink()
    dataset = open_cityscapes(root)
    with pytest.raises(RejectedSampleError, match="is missing: there is no such label map") as caught:
        dataset.read(dataset.samples("train")[0])
    assert caught.value.file.endswith("gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png")


def test_missing_folders__said(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    with pytest.raises(UserError, match=r"has no folder leftImg8bit/train, gtFine/train, leftImg8bit/val, gtFine/val"):
        open_cityscapes(tmp_path / "gtFine").splits()
