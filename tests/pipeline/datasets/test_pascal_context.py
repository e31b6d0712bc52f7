"""PASCAL-Context: drawn from the published JSON or read from converted maps, with 59 and with 60 classes."""

from __future__ import annotations

import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.errors import UserError

# Category ids of the published file: aeroplane, bag, sky, wood.
AEROPLANE, BAG, SKY, WOOD = 2, 9, 360, 458
SKY_60, WOOD_60 = 47, 59
HEIGHT, WIDTH = 4, 6


def runs_of(mask: np.ndarray[Any, Any]) -> list[int]:
    """COCO's run lengths of `mask`: down the columns, outside first."""
    counts, current = [0], False
    for value in mask.T.ravel().tolist():
        if value != current:
            counts.append(0)
            current = value
        counts[-1] += 1
    return counts


def compressed(counts: list[int]) -> str:
    """COCO's string: base 32 with a continuation bit, from the third on as differences."""
    text = ""
    for number, count in enumerate(counts):
        value = count - counts[number - 2] if number > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 if more else bits))
            if not more:
                break
    return text


def detail_file() -> dict[str, Any]:
    """Two images of train, one of val; one annotation of each encoding, overlapping, in the order of drawing."""
    sky = np.zeros((HEIGHT, WIDTH), dtype=bool)
    sky[:3] = True
    bag = np.zeros((HEIGHT, WIDTH), dtype=bool)
    bag[1:3, 1:3] = True
    size = [HEIGHT, WIDTH]
    images = [
        {"image_id": number, "file_name": f"{name}.jpg", "phase": phase, "height": HEIGHT, "width": WIDTH}
        for number, name, phase in (
            (2008000002, "2008_000002", "val"),
            (2008000003, "2008_000003", "train"),
            (2010000001, "2010_000001", "train"),
        )
    ]

    def annotation(number: int, image_id: int, category_id: int, segmentation: Any) -> dict[str, Any]:
        record = {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation}
        return record | {"parts": [{"part_id": 100, "segmentation": {"size": size, "counts": "0"}}], "iscrowd": 0}

    return {
        "info": {"description": 'PASCAL "in Detail" {[', "date_created": None},
        "categories": [{"category_id": SKY, "name": "sky", "supercategory": "background"}],
        "parts": [],
        "images": images,
        "annos_segmentation": [
            annotation(1, 2008000002, SKY, {"size": size, "counts": compressed(runs_of(sky))}),
            annotation(2, 2008000003, WOOD, {"size": size, "counts": runs_of(~sky)}),
            annotation(3, 2008000002, BAG, {"size": size, "counts": compressed(runs_of(bag))}),
            annotation(4, 2008000002, AEROPLANE, [[2, 2, 5, 2, 5, 4, 2, 4]]),
        ],
        "annos_occlusion": [{"image_id": 2008000002, "ons": [0]}],
        "annos_boundary": [{"image_id": 2008000002, "boundary": "x" * 100}],
    }


# What the annotations of 2008_000002 draw, in classes of the 60: later ones over earlier ones.
DRAWN = np.array(
    [
        [SKY_60] * 6,
        [SKY_60, 2, 2, SKY_60, SKY_60, SKY_60],
        [SKY_60, 2, 1, 1, 1, SKY_60],
        [0, 0, 1, 1, 1, 0],
    ]
)


def make_pascal_context(root: Path, detail: dict[str, Any] | None = None) -> Path:
    """VOCdevkit/VOC2010 with more images than PASCAL-Context has, and the JSON file beside its folders."""
    base = root / "VOCdevkit" / "VOC2010"
    (base / "JPEGImages").mkdir(parents=True)
    for number, name in enumerate(("2008_000002", "2008_000003", "2010_000001", "2011_000009")):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(base / "JPEGImages" / f"{name}.jpg")
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("2011_000009\n")
    if detail is not None:
        (base / "trainval_merged.json").write_text(json.dumps(detail))
    return base


def open_context(root: Path, classes: int) -> RawDataset:
    return open_dataset(DataConfig(dataset=f"pascal_context_{classes}", root=str(root)))


def test_detail_file__drawn_in_order_with_59_and_60_classes(tmp_path: Path) -> None:
    base = make_pascal_context(tmp_path, detail_file())
    for root in (base, base.parent, tmp_path):
        sixty, fiftynine = open_context(root, 60), open_context(root, 59)
        assert sixty.splits() == fiftynine.splits() == ("train", "val")
        # Without list files the phases say what is in which split.
        assert [sample.key for sample in sixty.samples("train")] == ["2008_000003", "2010_000001"]
        (sample,) = sixty.samples("val")
        assert sample.label == f"{base}/trainval_merged.json#2008_000002"
        np.testing.assert_array_equal(sixty.read(sample).label, DRAWN)
        label = fiftynine.read(fiftynine.samples("val")[0]).label
        np.testing.assert_array_equal(label, np.where(DRAWN == 0, 255, DRAWN - 1))
    assert (sixty.class_names[0], sixty.class_names[SKY_60], sixty.class_names[59]) == ("background", "sky", "wood")
    assert fiftynine.class_names == sixty.class_names[1:]
    assert fiftynine.palette == sixty.palette[1:]
    wood = sixty.read(sixty.samples("train")[0]).label
    np.testing.assert_array_equal(wood, np.where(np.arange(HEIGHT)[:, None] == 3, WOOD_60, 0).repeat(WIDTH, 1))
    # No annotation at all: background.
    assert not sixty.read(sixty.samples("train")[1]).label.any()


def test_detail_file__lists_win_over_phases(tmp_path: Path) -> None:
    base = make_pascal_context(tmp_path, detail_file())
    lists = base / "ImageSets" / "SegmentationContext"
    lists.mkdir()
    (lists / "train.txt").write_text("2008_000002\r\n")
    (lists / "val.txt").write_text("2010_000001\n\n2009_000099\n")
    dataset = open_context(tmp_path, 60)
    assert [sample.key for sample in dataset.samples("train")] == ["2008_000002"]
    np.testing.assert_array_equal(dataset.read(dataset.samples("train")[0]).label, DRAWN)
    known, unknown = dataset.samples("val")
    assert not dataset.read(known).label.any()
    with pytest.raises(RejectedSampleError, match=r"2009_000099\.jpg is missing"):
        dataset.read(unknown)


def test_converted_maps__as_the_converters_write_them(tmp_path: Path) -> None:
    base = make_pascal_context(tmp_path)
    (base / "SegmentationClassContext").mkdir()
    for name in ("2008_000002", "2008_000003"):
        Image.fromarray(DRAWN.astype(np.uint8)).save(base / "SegmentationClassContext" / f"{name}.png")
    with pytest.raises(UserError, match=r"has no ImageSets/SegmentationContext/train\.txt; the PASCAL-Context layout"):
        open_context(base, 60).splits()
    lists = base / "ImageSets" / "SegmentationContext"
    lists.mkdir()
    (lists / "train.txt").write_text("2008_000003\n")
    (lists / "val.txt").write_text("2008_000002\n")
    for classes, expected in ((60, DRAWN), (59, np.where(DRAWN == 0, 255, DRAWN - 1))):
        dataset = open_context(tmp_path, classes)
        assert dataset.splits() == ("train", "val")
        np.testing.assert_array_equal(dataset.read(dataset.samples("val")[0]).label, expected)


def test_tar__images_in_place_beside_the_json(tmp_path: Path) -> None:
    base = make_pascal_context(tmp_path / "plain", detail_file())
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "VOCtrainval_03-May-2010.tar", "w") as archive:
        archive.add(base / "JPEGImages", "VOCdevkit/VOC2010/JPEGImages")
    (base / "trainval_merged.json").rename(packed / "trainval_merged.json")
    dataset = open_context(packed, 60)
    assert dataset.splits() == ("train", "val")
    sample = dataset.samples("val")[0]
    # A task gets the data set without its listing, and the sample.
    copy, sample = pickle.loads(pickle.dumps((dataset, sample)))
    pair = copy.read(sample)
    assert pair.image == (base / "JPEGImages" / "2008_000002.jpg").read_bytes()
    np.testing.assert_array_equal(pair.label, DRAWN)
    # All of it in one tar, the JSON file too.
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(base, "VOCdevkit/VOC2010")
        archive.add(packed / "trainval_merged.json", "VOCdevkit/VOC2010/trainval_merged.json")
    dataset = open_context(whole, 60)
    np.testing.assert_array_equal(dataset.read(dataset.samples("val")[0]).label, DRAWN)


def test_stamp__changes_with_the_image_that_an_annotation_belongs_to_only(tmp_path: Path) -> None:
    detail = detail_file()
    base = make_pascal_context(tmp_path, detail)
    before = [sample.stamp for sample in open_context(base, 60).samples("train")]
    detail["annos_segmentation"][1]["category_id"] = BAG
    (base / "trainval_merged.json").write_text(json.dumps(detail))
    after = [sample.stamp for sample in open_context(base, 60).samples("train")]
    assert before[0] != after[0]
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 7}, r"#2008_000003 holds label id 7, outside the class list \(the 60 category ids"),
        ({"segmentation": {"size": [4, 5], "counts": [20]}}, r"holds a mask of size \(4, 5\) for an image of 4x6"),
        ({"segmentation": {"size": [4, 6], "counts": [20]}}, "holds run lengths that do not fill 4x6 pixels"),
        ({"segmentation": {"size": [4, 6], "counts": "\x7f"}}, "holds the sign '\\\\x7f' in a run-length code"),
        ({"segmentation": {"size": [4, 6], "counts": "o" * 40}}, "holds a run-length code without end"),
        ({"segmentation": [[0, 0, 1, 1]]}, "holds a polygon that is not a list of at least three points"),
        ({"segmentation": 3}, "holds an annotation that is not of the format"),
    ],
)
def test_bad_annotation__rejects_its_sample_alone(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    detail = detail_file()
    detail["annos_segmentation"][1] |= change
    dataset = open_context(make_pascal_context(tmp_path, detail), 60)
    with pytest.raises(RejectedSampleError, match=message):
        dataset.read(dataset.samples("train")[0])
    np.testing.assert_array_equal(dataset.read(dataset.samples("val")[0]).label, DRAWN)


def test_wrong_tree__one_clear_error(tmp_path: Path) -> None:
    base = make_pascal_context(tmp_path)
    with pytest.raises(UserError, match=r"has neither SegmentationClassContext nor trainval_merged\.json; the PASCAL"):
        open_context(base, 59).splits()
    (base / "trainval_merged.json").write_text('{"images": [{"image_id": 1, "file_name"')
    with pytest.raises(UserError, match=r"trainval_merged\.json cannot be read \(byte .*\); fetch it again"):
        open_context(base, 59).splits()
    (base / "trainval_merged.json").write_text("{}")
    with pytest.raises(UserError, match="it lists no images"):
        open_context(base, 59).splits()
    with pytest.raises(UserError, match="has no folder JPEGImages"):
        open_context(base / "ImageSets", 59).splits()
