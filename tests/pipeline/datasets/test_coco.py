"""COCO's JSON: polygons and run lengths to exact pixels, splits, categories, and files that lie."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.datasets.coco import index_coco
from pipeline.datasets.rasterise import decode_counts, draw_runs
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_reader import open_shard_set
from tests.pipeline.datasets.patches import on_image

HEIGHT, WIDTH = 8, 12
CATEGORIES = [{"id": 7, "name": "car"}, {"id": 3, "name": "road"}]


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def rows_of(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Run lengths down the columns, uncompressed."""
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]]))
    return {"size": list(mask.shape), "counts": counts[: len(counts) - (counts[-1] == 0)].tolist()}


def compress(counts: list[int]) -> str:
    """COCO's compressed string, written from its description."""
    text = ""
    for number, count in enumerate(counts):
        value = count - counts[number - 2] if number > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + 48 + 32 * more)
            if not more:
                break
    return text


def objects_of(*objects: tuple[int, Any], image_id: int = 1, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": category, "segmentation": outline, "iscrowd": 0, **fields}
        for category, outline in objects
    ]


def write(root: Path, annotations: list[dict[str, Any]], num_images: int = 1, **content: Any) -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for number in range(1, num_images + 1):
        pixels = np.random.default_rng([num_images, number]).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/é{number}.png")
        images.append({"id": number, "file_name": f"é{number}.png", "height": HEIGHT, "width": WIDTH})
    written = {"info": {}, "images": images, "categories": CATEGORIES, "annotations": annotations, **content}
    (root / "annotations.json").write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    return root


def open_coco(root: Path | str, **coco: Any) -> RawDataset:
    settings = {"dataset": "coco", "root": str(root), "coco": {"val_fraction": 0.3, **coco}}
    return open_dataset(DataConfig.model_validate(settings))


def label_of(root: Path | str, key: str = "é1", **coco: Any) -> NDArray[np.uint8]:
    """The map of one image, read as a task does: by a dataset that came through a pickle."""
    dataset = open_coco(root, **coco)
    (sample,) = [one for split in dataset.splits() for one in dataset.samples(split) if one.key == key]
    sent: RawDataset = pickle.loads(pickle.dumps(dataset))
    return sent.read(pickle.loads(pickle.dumps(sample))).label


def painted(*objects: tuple[int, slice, slice], void: int = 0) -> NDArray[np.uint8]:
    label = np.full((HEIGHT, WIDTH), void, np.uint8)
    for class_id, rows, columns in objects:
        label[rows, columns] = class_id
    return label


@pytest.mark.parametrize("form", ["polygon", "runs", "compressed"])
def test_objects__the_pixels_of_a_rectangle_exactly(tmp_path: Path, form: str) -> None:
    road, car = painted((1, slice(2, 7), slice(1, 9))), painted((1, slice(3, 5), slice(4, 12)))
    runs = [rows_of(mask == 1) for mask in (road, car)]
    np.testing.assert_array_equal(on_image(draw_runs(runs[0]["counts"], HEIGHT, WIDTH), HEIGHT, WIDTH), road == 1)
    forms: dict[str, list[Any]] = {
        "polygon": [box(1, 2, 9, 7), box(4, 3, 12, 5)],
        "runs": runs,
        "compressed": [{**one, "counts": compress(one["counts"])} for one in runs],
    }
    write(tmp_path, objects_of((3, forms[form][0]), (7, forms[form][1])), num_images=2)
    dataset = open_coco(tmp_path)
    assert dataset.class_names == ("background", "road", "car")
    np.testing.assert_array_equal(
        label_of(tmp_path), painted((1, slice(2, 7), slice(1, 9)), (2, slice(3, 5), slice(4, 12)))
    )
    np.testing.assert_array_equal(label_of(tmp_path, "é2"), painted())
    ignoring = label_of(tmp_path, unlabelled="ignore")
    expected = painted((0, slice(2, 7), slice(1, 9)), (1, slice(3, 5), slice(4, 12)), void=255)
    np.testing.assert_array_equal(ignoring, expected)
    assert open_coco(tmp_path, unlabelled="ignore").class_names == ("road", "car")


def test_compress__the_writer_above_agrees_with_the_reader() -> None:
    counts = [0, 5, 3000, 1, 2, 70000, 0, 1]
    assert decode_counts(compress(counts)) == counts


def test_overlap__the_later_one_or_the_smaller_one_and_crowds_below_all(tmp_path: Path) -> None:
    small, large = (7, box(2, 2, 4, 4)), (3, box(1, 1, 9, 7))
    write(tmp_path, objects_of(small, large) + objects_of((3, box(0, 0, 12, 3)), iscrowd=1), num_images=2)
    crowd = (255, slice(0, 3), slice(0, 12))
    np.testing.assert_array_equal(label_of(tmp_path), painted(crowd, (1, slice(1, 7), slice(1, 9))))
    np.testing.assert_array_equal(
        label_of(tmp_path, on_top="smaller"),
        painted(crowd, (1, slice(1, 7), slice(1, 9)), (2, slice(2, 4), slice(2, 4))),
    )


def test_objects__of_several_images_between_each_other(tmp_path: Path) -> None:
    annotations = []
    for turn in range(2):
        for number in (2, 1, 3):
            annotations += objects_of((7, box(number, turn * 4, number + 1, turn * 4 + 2)), image_id=number)
    annotations += objects_of((7, box(0, 0, 1, 1)), image_id=99)
    write(tmp_path, annotations, num_images=3)
    for number in (1, 2, 3):
        columns = slice(number, number + 1)
        expected = painted((2, slice(0, 2), columns), (2, slice(4, 6), columns))
        np.testing.assert_array_equal(label_of(tmp_path, f"é{number}"), expected)


def test_categories__groups_background_and_splits_that_differ(tmp_path: Path) -> None:
    roboflow = [
        {"id": 0, "name": "street", "supercategory": "none"},
        {"id": 1, "name": "car", "supercategory": "street"},
        {"id": 2, "name": "Background", "supercategory": "street"},
    ]
    write(tmp_path, objects_of((1, box(0, 0, 2, 2)), (2, box(0, 0, 1, 1))), num_images=2, categories=roboflow)
    assert open_coco(tmp_path).class_names == ("background", "car")
    np.testing.assert_array_equal(
        label_of(tmp_path, unlabelled="ignore"),
        painted((1, slice(0, 2), slice(0, 2)), (0, slice(0, 1), slice(0, 1)), void=255),
    )
    write(tmp_path / "other", [], categories=CATEGORIES[:1])
    both = {"train": "annotations.json", "val": "other/annotations.json"}
    with pytest.raises(UserError, match="have other categories, such as those of id 0; make them equal"):
        open_coco(tmp_path, val_fraction=None, annotations=both)


@pytest.mark.parametrize("packed", ["", "zip", "stored"])
def test_end_to_end__a_file_a_split_as_roboflow_exports_it(tmp_path: Path, packed: str) -> None:
    root = tmp_path / "data"
    for seed, split in enumerate(("train", "valid")):
        objects = objects_of((3, box(0, 0, 3, 3)), (7, box(4, 4, 6, 6)))
        write(root / split, objects, num_images=1 + seed)
        for file in (root / split / "images").iterdir():
            file.rename(root / split / file.name)
        (root / split / "images").rmdir()
        (root / split / "annotations.json").rename(root / split / "_annotations.coco.json")
    if packed:
        with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED if packed == "zip" else 0) as archive:
            for path in sorted(root.rglob("*.*")):
                archive.write(path, path.relative_to(root))
        root = tmp_path / "data.zip"
    folders = {"train": "train", "val": "valid"}
    annotations = {split: f"{folder}/_annotations.coco.json" for split, folder in folders.items()}
    coco = {"images": folders, "annotations": annotations}
    config = DataConfig.model_validate({"dataset": "coco", "root": str(root), "coco": coco})
    shards = prepare_shards(config, str(tmp_path / "shards"), progress=lambda _: None)
    assert {split: one.num_samples for split, one in shards.splits.items()} == {"train": 1, "val": 2}
    reader = open_shard_set(shards)
    with Image.open(io.BytesIO(reader.read(reader.index("train"), 0).label)) as label:
        expected = painted((1, slice(0, 3), slice(0, 3)), (2, slice(4, 6), slice(4, 6)))
        np.testing.assert_array_equal(np.asarray(label), expected)


def test_splits__drawn_by_group_and_only_where_val_is_missing(tmp_path: Path) -> None:
    write(tmp_path, objects_of((3, box(0, 0, 3, 3))), num_images=9)
    dataset = open_coco(tmp_path, group="é([1-3]|[4-9])")
    found = {split: {sample.key for sample in dataset.samples(split)} for split in dataset.splits()}
    assert list(found) == ["train", "val"]
    assert found["train"] | found["val"] == {f"é{number}" for number in range(1, 10)}
    assert not found["train"] & found["val"]
    with pytest.raises(UserError, match=r"annotations 'annotations.json' has no val split; set data\.coco\.val"):
        open_coco(tmp_path, val_fraction=None).splits()
    both = {"train": "annotations.json", "val": "annotations.json"}
    with pytest.raises(ValidationError, match="annotations has a path for val, and val_fraction would draw another"):
        open_coco(tmp_path, annotations=both)
    with pytest.raises(ValidationError, match="images has no path for val; add it"):
        open_coco(tmp_path, val_fraction=None, annotations=both, images={"train": "images"})


def test_file_names__looked_for_by_their_last_part_and_never_outside(tmp_path: Path) -> None:
    write(tmp_path, objects_of((3, box(0, 0, 3, 3)), (7, box(0, 0, 1, 1))), num_images=2)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][0]["file_name"] = "/data/upload\\4/é1.png"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    assert label_of(tmp_path)[2, 2] == 1
    content["images"][0]["file_name"] = "../secret/passport.png"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"annotations\.json names '../secret/passport\.png', a path that leads out"):
        open_coco(tmp_path).samples("train")


def test_images__that_are_missing_are_rejected(tmp_path: Path) -> None:
    write(tmp_path, objects_of((3, box(0, 0, 3, 3)), (7, box(0, 0, 1, 1))), num_images=2)
    (tmp_path / "images/é2.png").unlink()
    with pytest.raises(RejectedSampleError, match=r"images/é2\.png is missing: there is no such image"):
        label_of(tmp_path, "é2")
    with pytest.raises(UserError, match="has no folder photos; the Coco layout is images and a JSON file with"):
        open_coco(tmp_path, images="photos").splits()


@pytest.mark.parametrize(
    ("outline", "problem"),
    [
        ([], "holds an object with a box and no outline; export masks or polygons"),
        ([[1, 1, 2, 2]], "not a list of at least three points"),
        ([[1, 1, 2, 2, float("inf"), 3]], "not a list of at least three points"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**62] * 4 + [HEIGHT * WIDTH]}, "run lengths that do not fill 8x12"),
        ({"size": [HEIGHT, WIDTH], "counts": [-1, HEIGHT * WIDTH + 1]}, "run lengths that do not fill 8x12"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 50}, "run-length code without end"),
        ({"size": [1 << 40, 1 << 40], "counts": [1 << 80]}, "holds a mask of size"),
        ("x", "an annotation that is not of the format"),
        ({"size": 3}, "an annotation that is not of the format"),
    ],
)
def test_objects__that_are_damaged_are_rejected_one_by_one(tmp_path: Path, outline: Any, problem: str) -> None:
    write(tmp_path, objects_of((3, outline)) + objects_of((7, box(0, 0, 1, 1)), image_id=2), num_images=2)
    with pytest.raises(RejectedSampleError, match=problem):
        label_of(tmp_path)
    assert label_of(tmp_path, "é2")[0, 0] == 2


@pytest.mark.parametrize("size", [(1 << 20, 1 << 20), (0, 5), (-1, -5), ("8", 12), (None, 12), (8.0, 12)])
def test_images__sizes_that_cannot_be_are_rejected(tmp_path: Path, size: tuple[Any, Any]) -> None:
    image = {"id": 1, "file_name": "é1.png", "height": size[0], "width": size[1]}
    write(tmp_path, objects_of((3, box(0, 0, 3, 3))), num_images=2)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][0] = image
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(RejectedSampleError, match="gives the image"):
        label_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[]", "byte 0 is '\\[' and should be '{'"),
        (b'{"images": [{"id": 1}]}', "the element of images at byte 12 has no file_name"),
        (b'{"images": [{"id": true, "file_name": "a.png"}]}', "has no id"),
        (b'{"images": [3]}', "has no id"),
        (b'{"images": [{"id": 1, "file_name": "a.png"}]}', "it lists no categories"),
        (b'{"categories": [{"id": 1, "name": "a"}]}', "it lists no images"),
        (b'{"annotations": [{"image_id": [], "category_id": 1}]}', "has no image_id"),
        (b'{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "category id 1 is there twice"),
        (b'{"images": [' + b"[" * 100_000, "is nested too deep"),
    ],
)
def test_index__of_another_format_is_a_value_error(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        index_coco(io.BytesIO(content))


def test_file__that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(UserError, match=r"\.json cannot be read as COCO's JSON \(it ends after 1 bytes\); export"):
        open_coco(tmp_path)
    with pytest.raises(UserError, match=r"has no coco\.json; add it or correct data\.coco\.annotations"):
        open_coco(tmp_path, annotations="coco.json")
