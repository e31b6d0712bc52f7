"""Label Studio's JSON: regions to exact pixels, where images are found, and exports that cannot be used."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.datasets.label_studio import draw_regions
from pipeline.datasets.objects import object_classes
from pipeline.datasets.rasterise import draw_packed_runs
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from segvit.image_files import DecodeError
from tests.pipeline.datasets.layouts import VOID, pack

HEIGHT, WIDTH = VOID.shape


def region(kind: str, name: str, fields: dict[str, Any], **others: Any) -> dict[str, Any]:
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"id": "x", "type": kind, **size, "value": {**fields, kind: [name]}, **others}


def polygon(name: str, *points: tuple[float, float], **others: Any) -> dict[str, Any]:
    """Of points in pixels."""
    percent = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]
    return region("polygonlabels", name, {"points": percent, "closed": True}, **others)


def rectangle(name: str, x: float, y: float, width: float, height: float, rotation: float = 0) -> dict[str, Any]:
    fields = {
        "x": 100 * x / WIDTH,
        "y": 100 * y / HEIGHT,
        "width": 100 * width / WIDTH,
        "height": 100 * height / HEIGHT,
    }
    return region("rectanglelabels", name, {**fields, "rotation": rotation})


def brush(name: str, mask: NDArray[np.bool_]) -> dict[str, Any]:
    return region("brushlabels", name, {"format": "rle", "rle": pack_runs(mask)})


def pack_runs(mask: NDArray[np.bool_], sizes: Sequence[int] = (3, 4, 8, 16)) -> list[int]:
    """Label Studio's packed pixels, written from the format's description: RGBA, transparent where there is none."""
    words = np.repeat(mask.ravel(), 4).astype(int) * 255
    words[0::4] //= 2  # of a colour; alone the last of four, how opaque it is, counts
    bits = f"{words.size:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    edges = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), words.size]
    runs = [(start, min(start + 65536, end)) for low, end in pairwise(edges) for start in range(low, end, 65536)]
    number = 0
    while number < len(runs):
        start, end = runs[number]
        number += 1
        is_repeated = end - start > 1
        while not is_repeated and number < len(runs) and runs[number][1] - runs[number][0] == 1:
            end = runs[number][1]
            number += 1
        choice = next(index for index, size in enumerate(sizes) if end - start - 1 < 1 << size)
        bits += f"{int(is_repeated)}{choice:02b}{end - start - 1:0{sizes[choice]}b}"
        bits += "".join(f"{word:08b}" for word in (words[start : start + 1] if is_repeated else words[start:end]))
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


def task(path: str, *regions: Any, **others: Any) -> dict[str, Any]:
    annotation = {"id": 1, "was_cancelled": False, "result": list(regions)}
    return {"id": 1, "annotations": [annotation], "data": {"image": path}, **others}


SQUARE = rectangle("thing", 1, 2, 4, 2)


def make(root: Path, *tasks: Any, images: Sequence[str] = ("a.png", "b.png")) -> Path:
    for number, name in enumerate(images):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*VOID.shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    (root / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    return root


def open_label_studio(root: Path, **settings: Any) -> RawDataset:
    config = {"dataset": "label_studio", "root": str(root), "label_studio": {"val_fraction": 0.5, **settings}}
    return open_dataset(DataConfig.model_validate(config))


def labels_of(root: Path, **settings: Any) -> dict[str, NDArray[np.uint8]]:
    """The maps by key, read as a task does: by a dataset that came through a pickle."""
    dataset = open_label_studio(root, **settings)
    sent: RawDataset = pickle.loads(pickle.dumps(dataset))
    return {one.key: sent.read(one).label for split in dataset.splits() for one in dataset.samples(split)}


def filled(rows: slice, columns: slice, class_id: int = 1) -> NDArray[np.uint8]:
    label = VOID.copy()
    label[rows, columns] = class_id
    return label


@pytest.mark.parametrize(
    "shape",
    [
        SQUARE,
        rectangle("thing", 5, 2, 2, 4, rotation=90),
        rectangle("thing", 5, 4, 4, 2, rotation=180),
        polygon("thing", (1, 2), (5, 2), (5, 4), (1, 4)),
        brush("thing", filled(slice(2, 4), slice(1, 5)) == 1),
    ],
    ids=["rectangle", "turned by 90", "turned by 180", "polygon", "brush"],
)
def test_regions__cover_these_pixels_and_no_others(tmp_path: Path, shape: Any) -> None:
    make(tmp_path, task("a.png", shape), task("b.png", SQUARE))
    np.testing.assert_array_equal(labels_of(tmp_path)["a"], filled(slice(2, 4), slice(1, 5)))
    expected = np.where(filled(slice(2, 4), slice(1, 5)), 0, 255)
    np.testing.assert_array_equal(labels_of(tmp_path, unlabelled="ignore")["a"], expected)


def test_regions__later_over_earlier_and_answers_passed_over(tmp_path: Path) -> None:
    answer = {"id": "q", "type": "choices", "value": {"choices": ["good"]}}
    make(tmp_path, task("a.png", answer, SQUARE, rectangle("bäll", 3, 3, 4, 4)), task("b.png", answer))
    expected = filled(slice(2, 4), slice(1, 5), 2)
    expected[3:7, 3:7] = 1
    assert open_label_studio(tmp_path).class_names == ("background", "bäll", "thing")
    labels = labels_of(tmp_path)
    np.testing.assert_array_equal(labels["a"], expected)
    np.testing.assert_array_equal(labels["b"], VOID)  # of the image's size, as no region says it
    (tmp_path / "classes.txt").write_text("thing\nbäll\n", encoding="utf-8")
    assert labels_of(tmp_path, classes="classes.txt")["a"][2, 1] == 1


def test_brush__is_read_as_label_studio_packs_it() -> None:
    empty = pack_runs(np.zeros((2527, 3332), bool))
    # The beginning of an export of an image of this size that Label Studio wrote.
    assert empty[:21] == [2, 1, 233, 240, 57, 27, 255, 255, 255, 0, 255, 255, 224, 31, 255, 252, 3, 255, 255, 128, 127]
    assert not draw_packed_runs(bytes(empty), 2527, 3332).mask.any()
    rng = np.random.default_rng(0)
    for sizes in ((3, 4, 8, 16), (1, 2, 9, 13)):
        for share in (0.01, 0.5, 0.99):
            mask = rng.random((37, 53)) < share
            np.testing.assert_array_equal(draw_packed_runs(bytes(pack_runs(mask, sizes)), 37, 53).mask, mask)


def test_brush__of_other_sizes_or_cut_off_is_refused() -> None:
    packed = bytes(pack_runs(np.eye(8, 12) > 0))
    for size in ((8, 13), (1 << 15, 1 << 11)):
        with pytest.raises(DecodeError, match=f"a brush mask of 384 words of 8 bits for {size[0]}x{size[1]} pixels"):
            draw_packed_runs(packed, *size)
    for end in range(len(packed)):
        with pytest.raises(DecodeError, match="holds a brush mask that is cut off"):
            draw_packed_runs(packed[:end], 8, 12)
    too_long = int(f"{384:032b}{7:05b}{'1111' * 4}1111111111111111111{255:08b}".ljust(80, "0"), 2).to_bytes(10)
    with pytest.raises(DecodeError, match="does not end with its 8x12 pixels"):
        draw_packed_runs(too_long, 8, 12)


def test_annotations__the_first_that_is_not_cancelled(tmp_path: Path) -> None:
    several = task("a.png", rectangle("other", 0, 0, 9, 9))
    several["annotations"][0]["was_cancelled"] = True
    several["annotations"] += task("", SQUARE)["annotations"] + task("", rectangle("thing", 0, 0, 1, 1))["annotations"]
    cancelled = task("c.png", SQUARE)
    cancelled["annotations"][0]["was_cancelled"] = True
    make(tmp_path, several, task("b.png", SQUARE), cancelled, {**task("d.png"), "annotations": []})
    labels = labels_of(tmp_path)
    assert sorted(labels) == ["a", "b"]
    np.testing.assert_array_equal(labels["a"], filled(slice(2, 4), slice(1, 5)))
    assert open_label_studio(tmp_path).class_names == ("background", "thing")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/data/upload/3/1a2b3c4d-one.png", "one"),
        ("/data/upload/3/1a2b3c4d-my_photo_1.png", "my photo (1)"),
        ("/data/upload/3/deadbeef-kept.png", "deadbeef-kept"),
        ("/data/local-files/?d=set/x/same.png", "x/same"),
        ("/data/local-files/?d=set/y%2Fsame.png", "y/same"),
        ("s3://bucket/deep/x/same.png", "x/same"),
        ("https://host/p/%C3%A9.png?X-Amz=1", "é"),
        ("C:\\photos\\one.png", "one"),
        ("../../one.png", "one"),
    ],
)
def test_images__by_the_end_of_their_path(tmp_path: Path, path: str, key: str) -> None:
    images = ("one.png", "my photo (1).png", "deadbeef-kept.png", "x/same.png", "y/same.png", "é.png", "other.png")
    make(tmp_path, task(path, SQUARE), task("other.png", SQUARE), images=images)
    assert sorted(labels_of(tmp_path)) == sorted([key.replace("/", "%2F"), "other"])


def test_images__are_never_looked_for_outside(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    for path in ("../../secret.png", str(tmp_path / "secret.png"), "..%2Fsecret.png", "file:///x/..%2f..%2fsecret.png"):
        make(tmp_path / "data", task(path, SQUARE), task("b.png", SQUARE))
        dataset = open_label_studio(tmp_path / "data")
        (sample,) = [one for split in dataset.splits() for one in dataset.samples(split) if one.key != "b"]
        assert sample.image.startswith(f"{tmp_path}/data/images/")
        with pytest.raises(RejectedSampleError, match=r"secret\.png is missing: there is no such image"):
            dataset.read(sample)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (region("keypointlabels", "thing", {"x": 1, "y": 1}), "of type 'keypointlabels', which is not read; draw with"),
        (region("polygonlabels", "thing", {"points": [[0, 0], [1, 1]]}), "not a list of at least three points"),
        (region("polygonlabels", "thing", {"points": [[0, 0], [1, 1], [1e300, 2]]}), "at least three points"),
        (region("polygonlabels", "thing", {"points": 3}), "is not of Label Studio's format"),
        (region("rectanglelabels", "thing", {"x": 1}), "is not of Label Studio's format"),
        (region("brushlabels", "thing", {"format": "png", "rle": []}), "brush mask of format 'png'; export COCO"),
        (region("brushlabels", "thing", {"format": "rle", "rle": [1, 2]}), "brush mask that is cut off"),
        (region("brushlabels", "thing", {"format": "rle", "rle": [256]}), "is not of Label Studio's format"),
        (region("polygonlabels", "thing", {}, image_rotation=90), "was labelled turned by 90 degrees"),
        (region("polygonlabels", "thing", {}, original_width=1 << 40), "gives the image 8x1099511627776 pixels"),
        (region("polygonlabels", "thing", {}, original_width=None), "gives the image the size 8 x None"),
        (rectangle("thing", 0, 0, 1, 1) | {"value": {"rectanglelabels": ["thing", "b"]}}, "region of class thing, b"),
        (rectangle("thing", 0, 0, 1, 1) | {"value": {"rectanglelabels": []}}, "region of class none"),
    ],
)
def test_regions__that_cannot_be_drawn_are_rejected(tmp_path: Path, shape: Any, problem: str) -> None:
    make(tmp_path, task("a.png", shape), task("b.png", SQUARE))
    dataset = open_label_studio(tmp_path)
    (sample,) = [one for split in dataset.splits() for one in dataset.samples(split) if one.key == "a"]
    with pytest.raises(RejectedSampleError, match=problem):
        dataset.read(sample)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", r"byte 0 is '\{' and should be '\['"),
        ("[]", "it holds no annotated task"),
        ('[{"image": "a.png", "label": [{"points": []}]}]', "task at byte 1: KeyError.*; JSON-MIN is not read"),
        ('[{"annotations": [{"result": []}], "data": {"text": "a"}}]', "its data names 0 images"),
        ('[{"annotations": [{"result": []}], "data": {"a": "a.png", "b": "b.png"}}]', "its data names 2 images"),
        ('[{"annotations": [{"result": []}], "data": {"a": "http://[/b.png"}}]', "task at byte 1: ValueError"),
        ('[{"annotations": 3, "data": {}}]', "task at byte 1: TypeError"),
        ("[" * 100_000, "is nested too deep"),
    ],
)
def test_files__of_another_format_are_one_clear_error(tmp_path: Path, text: str, problem: str) -> None:
    make(tmp_path)
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(UserError, match=rf"tasks\.json cannot be read as Label Studio's JSON \(.*{problem}") as caught:
        open_label_studio(tmp_path)
    assert str(caught.value).endswith("; export it again as JSON")


def test_settings__that_do_not_fit_the_data(tmp_path: Path) -> None:
    make(tmp_path, task("a.png", SQUARE), task("/b/a.png", SQUARE))
    with pytest.raises(UserError, match=r"holds two annotated tasks of the image 'a'; remove one"):
        open_label_studio(tmp_path).samples("train")
    with pytest.raises(UserError, match=r"has no val split; set data\.label_studio\.val_fraction"):
        open_label_studio(tmp_path, val_fraction=None).splits()
    with pytest.raises(UserError, match=r"has no export\.json; add it or correct data\.label_studio\.tasks"):
        open_label_studio(tmp_path, tasks="export.json")
    with pytest.raises(UserError, match=r"has no folder photos; the LabelStudio layout is images below photos and"):
        open_label_studio(tmp_path, images="photos").splits()
    with pytest.raises(UserError, match=r"nowhere does not exist; set data\.root"):
        open_label_studio(tmp_path / "nowhere")


@pytest.mark.parametrize("packed", [False, True])
def test_end_to_end__to_shards(tmp_path: Path, packed: bool) -> None:
    root = make(tmp_path / "data", task("a.png", SQUARE), task("b.png", brush("thing", np.eye(8, 12) > 0)))
    root = pack(root) if packed else root
    settings = {"dataset": "label_studio", "root": str(root), "label_studio": {"val_fraction": 0.5}}
    shards = prepare_shards(DataConfig.model_validate(settings), str(tmp_path / "shards"), progress=lambda _: None)
    assert {split: one.num_samples for split, one in shards.splits.items()} == {"train": 1, "val": 1}
    np.testing.assert_array_equal(labels_of(root)["b"], np.eye(8, 12))


def test_brush__a_number_in_place_of_its_bytes_takes_no_memory(tmp_path: Path) -> None:
    region = {"type": "brushlabels", "original_height": 8, "original_width": 12}
    value = {"format": "rle", "rle": 1 << 40, "brushlabels": ["car"]}
    with pytest.raises(DecodeError, match="holds a brush mask that is no list of bytes"):
        draw_regions([{**region, "value": value}], object_classes(["car"], "background", "x"))
