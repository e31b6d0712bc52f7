"""Where images, label maps and splits of a data set of one's own may lie, as label tools and people leave them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, open_dataset
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from tests.pipeline.datasets.layouts import LAYOUTS, VOC, label_of, make_splits, make_voc, pack, put


def open_folder(root: Path, **folder: Any) -> RawDataset:
    return open_dataset(DataConfig.model_validate({"dataset": "folder", "root": str(root), "folder": folder}))


def keys(dataset: RawDataset) -> dict[str, list[str]]:
    return {split: [sample.key for sample in dataset.samples(split)] for split in dataset.splits()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_folders__each_image_in_its_own_split(tmp_path: Path, layout: str, val: str, packed: bool) -> None:
    root = tmp_path / "data"
    folder = make_splits(root, layout, val)
    if packed:
        root = pack(root)
    dataset = open_folder(root, **folder)
    found = keys(dataset)
    assert list(found) == ["train", "val", "test"]
    numbers = {split: [int(key.replace("x%2F", "")[1]) for key in names] for split, names in found.items()}
    assert numbers == {"train": [0, 1, 2, 3, 4], "val": [5, 6], "test": [7, 8]}
    for split, names in numbers.items():
        for number, sample in zip(names, dataset.samples(split), strict=True):
            np.testing.assert_array_equal(dataset.read(sample).label, label_of(number))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_folders__val_fraction_never_mixes_what_is_parted(tmp_path: Path, layout: str) -> None:
    folder = make_splits(tmp_path, layout)
    with pytest.raises(UserError, match=r"has its own val split, .*val.*, and data\.folder\.val_fraction 0\.3 would"):
        open_folder(tmp_path, **folder, val_fraction=0.3).splits()
    for path in sorted(tmp_path.rglob("val")):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"and no such folder for val; add it, or set data\.folder\.val_fraction"):
        open_folder(tmp_path, **folder).splits()
    found = keys(open_folder(tmp_path, **folder, val_fraction=0.3))
    assert len(found["train"] + found["val"]) == 5
    assert found["val"]
    assert [key[-1] if ".v1" not in key and "%2Ev1" not in key else key[1] for key in found["test"]] == ["7", "8"]


def test_split_folders__two_of_one_split_or_none_for_train(tmp_path: Path) -> None:
    make_splits(tmp_path, "below images")
    put(tmp_path / "images/valid/z.jpg", tmp_path / "labels/valid/z.png", 9)
    with pytest.raises(UserError, match="images holds val and valid, both of split 'val'; keep one of the two"):
        open_folder(tmp_path).splits()
    shutil.rmtree(tmp_path / "images/valid")
    shutil.rmtree(tmp_path / "labels/valid")
    shutil.rmtree(tmp_path / "images/train")
    with pytest.raises(UserError, match=r"has images/val, images/test and no such folder for train; add it$"):
        open_folder(tmp_path).splits()


def test_split_folders__test_without_labels_is_left_out(tmp_path: Path) -> None:
    make_splits(tmp_path, "below images")
    shutil.rmtree(tmp_path / "labels/test")
    assert open_folder(tmp_path).splits() == ("train", "val")


def test_split_folders__other_classes_in_another_split_are_refused(tmp_path: Path) -> None:
    folder = make_splits(tmp_path, "roboflow")
    (tmp_path / "val/_classes.csv").write_text("Pixel Value, Class\n0, thing\n1, ground\n")
    with pytest.raises(UserError, match=r"train/_classes\.csv and .*val/_classes\.csv name other classes"):
        open_folder(tmp_path, **folder)


def test_one_folder__told_apart_by_the_suffix(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / f"f{number}.png", tmp_path / f"f{number}_mask.png", number)
    (tmp_path / "f3_mask.png").unlink()
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    dataset = open_folder(tmp_path, images=".", labels=".", label_suffix="_mask", val_fraction=0.3)
    samples = [*dataset.samples("train"), *dataset.samples("val")]
    pairs = sorted((Path(one.image).name, Path(one.label).name) for one in samples)
    assert pairs == [(f"f{number}.png", f"f{number}_mask.png") for number in range(4)]
    with pytest.raises(ValidationError, match=r"images and labels are both '\.'; set label_suffix, such as _mask"):
        open_folder(tmp_path, images=".", labels=".")


def test_masks_below_the_images__are_no_images(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"f{number}.png", tmp_path / f"masks/f{number}.png", number)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    dataset = open_folder(tmp_path, images=".", labels="masks", val_fraction=0.3)
    assert sorted(key for names in keys(dataset).values() for key in names) == ["f0", "f1", "f2"]


@pytest.mark.parametrize("lists", [{"default": "01234"}, {"train": "01234"}, {"trainval": "01234", "train": "5"}])
@pytest.mark.parametrize("with_test", [False, True])
def test_voc__a_list_that_is_not_parted_is_drawn_from(tmp_path: Path, lists: dict[str, str], with_test: bool) -> None:
    root = make_voc(tmp_path, {**lists, **({"test": "45"} if with_test else {})})
    with pytest.raises(
        UserError, match=r"has no .*ImageSets/Segmentation/val\.txt; add it, or set data\.folder\.val_f"
    ):
        open_folder(root, **VOC, classes="labelmap.txt").splits()
    dataset = open_folder(root, **VOC, classes="labelmap.txt", val_fraction=0.3)
    found = keys(dataset)
    drawn = [f"f {number}" for number in range(4 if with_test else 5)]
    assert sorted(found["train"] + found["val"]) == drawn
    assert found.get("test") == (["f 4", "f 5"] if with_test else None)
    pair = dataset.read(dataset.samples("val")[0])
    np.testing.assert_array_equal(pair.label, label_of(int(found["val"][0][-1])))


def test_cvat__lists_by_its_subsets_to_shards(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "data", {"Train": "0123", "Validation": "45"})
    config = {"dataset": "folder", "root": str(root), "folder": {**VOC, "classes": "labelmap.txt"}}
    shards = prepare_shards(DataConfig.model_validate(config), str(tmp_path / "shards"), progress=lambda _: None)
    assert {split: one.num_samples for split, one in shards.splits.items()} == {"train": 4, "val": 2}


@pytest.mark.parametrize("line", ["../../secret/passport", "/etc/passwd", "a/../../b", "..\\b", "file:///etc/passwd"])
def test_lists__a_line_that_leads_out_is_refused(tmp_path: Path, line: str) -> None:
    root = tmp_path / "data"
    for number in range(2):
        put(root / f"images/f{number}.png", root / f"labels/f{number}.png", number)
    (root / "classes.txt").write_text("ground\nthing\n")
    (root / "splits").mkdir()
    (root / "splits/train.txt").write_text(f"f0\n{line}\n")
    (root / "splits/val.txt").write_text("f1\n")
    with pytest.raises(UserError, match=r"splits/train\.txt names .*, a path that leads out of the data set"):
        open_folder(root).splits()


def make_videos(root: Path, num_frames: int = 6) -> None:
    for video in range(5):
        for frame in range(num_frames):
            name = f"street{video}_frame{frame:02d}"
            put(root / f"images/{name}.png", root / f"labels/{name}.png", video * num_frames + frame)
    (root / "classes.txt").write_text("ground\nthing\n")


def test_group__all_frames_of_a_video_on_one_side(tmp_path: Path) -> None:
    make_videos(tmp_path)
    found = keys(open_folder(tmp_path, val_fraction=0.4, group="^(.*)_frame"))
    videos = {split: {name.partition("_")[0] for name in names} for split, names in found.items()}
    assert len(found["train"]) + len(found["val"]) == 30
    assert not videos["train"] & videos["val"]
    assert videos["train"]
    assert videos["val"]
    assert {len(names) % 6 for names in found.values()} == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "^(.*)_frame"}, "group says what val_fraction draws; set val_fraction or remove group"),
        ({"group": "^.*_frame", "val_fraction": 0.1}, r"has no group; put what frames of one video share into \( \)"),
        ({"group": "(", "val_fraction": 0.1}, r"group '\(' is no regular expression \(missing \), unterminated"),
    ],
)
def test_group__mistakes_are_refused_with_the_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        open_folder(tmp_path, **settings)


def test_group__that_names_do_not_hold_or_that_is_one_alone(tmp_path: Path) -> None:
    make_videos(tmp_path, num_frames=1)
    with pytest.raises(UserError, match=r"data\.folder\.group 'clip\(.\)' finds nothing in 'street0_frame00'; give"):
        open_folder(tmp_path, val_fraction=0.4, group="clip(.)").samples("train")
    with pytest.raises(UserError, match=r"data\.folder\.val_fraction has one group to draw from, 'street'; add others"):
        open_folder(tmp_path, val_fraction=0.4, group="^([a-z]+)").samples("train")


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
@pytest.mark.parametrize("num_images", [2, 3, 9])
def test_draw__neither_side_of_a_few_is_empty(tmp_path: Path, fraction: float, num_images: int) -> None:
    for number in range(num_images):
        put(tmp_path / f"images/f{number}.png", tmp_path / f"labels/f{number}.png", number)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    found = keys(open_folder(tmp_path, val_fraction=fraction))
    assert min(map(len, found.values())) >= 1
    assert sum(map(len, found.values())) == num_images


def test_archives__beside_data_that_is_unpacked_are_not_opened(tmp_path: Path) -> None:
    make_splits(tmp_path, "around")
    (tmp_path / "backup.zip").write_bytes(b"no archive at all")
    assert len(keys(open_folder(tmp_path))["train"]) == 5
    with pytest.raises(UserError, match=r"has no classes2\.txt; write one class name a line"):
        open_folder(tmp_path, classes="classes2.txt")
