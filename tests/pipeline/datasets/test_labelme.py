"""labelme's JSON files: each kind of shape to exact pixels, classes, and files that cannot be used."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from segvit.image_files import encode_png
from tests.pipeline.datasets.layouts import VOID, write_labelme

SQUARE = [("thing", "rectangle", [[1.0, 2.0], [5.0, 4.0]])]


def make(root: Path, shapes: list[tuple[str, str, list[list[float]]]], **fields: Any) -> Path:
    """One image of `shapes`, one of a square, and one that is not annotated."""
    root.mkdir(exist_ok=True)
    for number, name in enumerate("abc"):
        pixels = np.random.default_rng(number).integers(0, 256, (*VOID.shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.jpg")
    write_labelme(root / "a.json", shapes, **fields)
    write_labelme(root / "b.json", SQUARE)
    return root


def open_labelme(root: Path, **labelme: Any) -> RawDataset:
    settings = {"dataset": "labelme", "root": str(root), "labelme": {"val_fraction": 0.5, **labelme}}
    return open_dataset(DataConfig.model_validate(settings))


def label_of(root: Path, **labelme: Any) -> NDArray[np.uint8]:
    dataset = open_labelme(root, **labelme)
    (sample,) = [one for split in dataset.splits() for one in dataset.samples(split) if one.key == "a"]
    return dataset.read(sample).label


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("rectangle", [[1, 2], [5, 4]]),
        ("rectangle", [[5, 4], [1, 2]]),
        ("polygon", [[1, 2], [5, 2], [5, 4], [1, 4]]),
        ("mask", [[1, 2], [4, 3]]),
    ],
)
def test_shapes__cover_these_pixels_and_no_others(tmp_path: Path, kind: str, points: list[list[float]]) -> None:
    mask = base64.b64encode(encode_png(np.ones((2, 4), np.uint8))).decode()
    make(tmp_path, [("thing", kind, points)], mask=mask if kind == "mask" else None)
    expected = VOID.copy()
    expected[2:4, 1:5] = 1
    np.testing.assert_array_equal(label_of(tmp_path), expected)
    np.testing.assert_array_equal(label_of(tmp_path, unlabelled="ignore"), np.where(expected, 0, 255))


def test_shapes__circle_and_later_over_earlier(tmp_path: Path) -> None:
    make(tmp_path, [*SQUARE, ("ball", "circle", [[4, 4], [4, 2]])])
    expected = VOID.copy()
    expected[2:4, 1:5] = 2
    expected[2:6, 3:5] = expected[3:5, 2:6] = 1
    np.testing.assert_array_equal(label_of(tmp_path), expected)
    assert open_labelme(tmp_path).class_names == ("background", "ball", "thing")


def test_classes__of_a_file_with_what_labelme_ignores(tmp_path: Path) -> None:
    make(tmp_path, [("thing", "rectangle", [[0, 0], [9, 8]]), ("_background_", "rectangle", [[0, 0], [1, 1]])])
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ntree\nthing\n")
    dataset = open_labelme(tmp_path, classes="labels.txt")
    assert dataset.class_names == ("background", "tree", "thing")
    label = label_of(tmp_path, classes="labels.txt", unlabelled="ignore")
    assert (label[0, 0], label[0, 1], label[0, 10]) == (0, 2, 255)
    (tmp_path / "labels.txt").write_text("tree\n")
    with pytest.raises(RejectedSampleError, match="holds a shape of class 'thing', which the file of classes does not"):
        label_of(tmp_path, classes="labels.txt")


def test_images__without_a_file_are_left_out_unless_a_list_names_them(tmp_path: Path) -> None:
    make(tmp_path, SQUARE)
    dataset = open_labelme(tmp_path)
    assert sorted(one.key for split in dataset.splits() for one in dataset.samples(split)) == ["a", "b"]
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/train.txt").write_text("a\nc.jpg\n")
    (tmp_path / "splits/val.txt").write_text("b\n")
    listed = open_labelme(tmp_path, val_fraction=None)
    with pytest.raises(RejectedSampleError, match=r"c\.json is missing: there is no such label map"):
        listed.read(listed.samples("train")[1])


def test_end_to_end__to_shards(tmp_path: Path) -> None:
    make(tmp_path / "data", SQUARE)
    settings = {"dataset": "labelme", "root": str(tmp_path / "data"), "labelme": {"val_fraction": 0.5}}
    shards = prepare_shards(DataConfig.model_validate(settings), str(tmp_path / "shards"), progress=lambda _: None)
    assert {split: one.num_samples for split, one in shards.splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (("thing", "linestrip", [[0, 0], [5, 5]]), "holds a linestrip of class 'thing', which has no area"),
        (("thing", "rectangle", [[0, 0], [1, 1], [2, 2]]), "holds a rectangle of 3 points; labelme writes two"),
        (("thing", "polygon", [[0, 0], [1, 1]]), "not a list of at least three points"),
        (("thing", "circle", [[0, 0], [1e300, 1]]), "holds a circle that is not a point and a radius"),
        (("thing", "mask", [[9, 2], [12, 3]]), "holds a mask of 2x4 pixels that leaves the image"),
        (("thing", "polygon", [["x", 0]]), "is not of labelme's format"),
    ],
)
def test_shapes__without_an_area_or_damaged_are_rejected(tmp_path: Path, shape: Any, problem: str) -> None:
    make(tmp_path, [shape], mask=base64.b64encode(encode_png(np.ones((2, 4), np.uint8))).decode())
    with pytest.raises(RejectedSampleError, match=problem):
        label_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"shapes": 3}', "[" * 100_000, '{"shapes": [{}]}'])
def test_files__of_another_format_are_one_clear_error(tmp_path: Path, text: str) -> None:
    make(tmp_path, SQUARE)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is not of labelme's format"):
        open_labelme(tmp_path)


def test_sizes__are_bounded_and_roots_are_there(tmp_path: Path) -> None:
    make(tmp_path, SQUARE)
    content = json.loads((tmp_path / "a.json").read_text()) | {"imageHeight": 1 << 30}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(RejectedSampleError, match="gives the image 1073741824x12 pixels, more than"):
        label_of(tmp_path)
    with pytest.raises(UserError, match=r"nowhere does not exist; set data\.root"):
        open_labelme(tmp_path / "nowhere")
