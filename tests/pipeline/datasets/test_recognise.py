"""What lies at a place is told, and the settings that read it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.datasets import open_dataset
from pipeline.datasets.place import Recognised
from pipeline.datasets.recognise import recognise
from pipeline.errors import UserError
from segvit.image_files import encode_png
from tests.pipeline.datasets.layouts import LAYOUTS, VOC, label_of, make_splits, make_voc, pack, put, write_labelme


def opened(found: Recognised) -> dict[str, list[str]]:
    """Keys by split, all of them read."""
    dataset = open_dataset(found.config)
    for split in dataset.splits():
        for sample in dataset.samples(split):
            assert dataset.read(sample).label.max() == 1
    return {split: [sample.key for sample in dataset.samples(split)] for split in dataset.splits()}


@pytest.mark.parametrize("place", ["folder", "wrapped", "zip", "folder with a zip", "memory"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_folders__wherever_they_lie(tmp_path: Path, layout: str, place: str) -> None:
    root = tmp_path / "export/data"
    folder = make_splits(root, layout, "valid")
    (root / "README.roboflow.txt").write_text("dataset")
    uri = str(root.parent if place == "wrapped" else root)
    if place == "zip":
        uri = str(pack(root))
    elif place == "folder with a zip":
        archive = pack(root)
        (tmp_path / "alone").mkdir()
        archive.rename(tmp_path / "alone/data.zip")
        uri = str(tmp_path / "alone")
    elif place == "memory":
        uri = f"memory://recognised/{layout.replace(' ', '_')}"
        for file in root.rglob("*.*"):
            storage.publish_bytes(f"{uri}/{file.relative_to(root)}", file.read_bytes())
    found = recognise(uri)
    assert found.config.dataset == "folder"
    assert found.config.folder.model_dump(exclude_defaults=True) == folder
    assert [len(keys) for keys in opened(found).values()] == [5, 2, 2]
    text = "\n".join(found.why)
    assert "9 pairs" in text
    assert "folders part them into train, val, test" in text
    assert "names 2 classes" in text


def test_voc__as_cvat_exports_it(tmp_path: Path) -> None:
    root = make_voc(tmp_path, {"default": "012345"})
    (root / "SegmentationObject").mkdir()
    Image.fromarray(label_of(0)).save(root / "SegmentationObject/f 0.png")
    found = recognise(str(root))
    assert found.config.folder.model_dump(exclude_defaults=True) == {
        **VOC,
        "classes": "labelmap.txt",
        "val_fraction": 0.2,
    }
    assert found.why == (
        "JPEGImages/ and SegmentationClass/ hold 6 pairs; 1 images have no label map",
        "ImageSets/Segmentation/default.txt lists them",
        "nothing says what is val: 20% are drawn (data.folder.group keeps frames of one video together)",
        "labelmap.txt names 2 classes with colours",
    )
    assert sum(map(len, opened(found).values())) == 6


def test_one_folder__images_beside_masks(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / f"photos/f{number}.jpg", tmp_path / f"photos/f{number}_label.png", number)
    found = recognise(str(tmp_path))
    assert found.config.folder.label_suffix == "_label"
    assert found.why[:2] == ("all lies in photos/", "the root holds 4 pairs of NAME and NAME_label")
    assert found.why[-1].startswith("nothing names the classes: write classes.txt, a name a line")
    with pytest.raises(UserError, match=r"has no classes\.txt; write one class name a line into it"):
        open_dataset(found.config)


def test_folders__of_one_split_each(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / f"train/f{number}.jpg", tmp_path / f"train_masks/f{number}_mask.png", number)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    found = recognise(str(tmp_path))
    assert found.config.folder.model_dump(exclude_defaults=True) == {
        "images": "train",
        "labels": "train_masks",
        "label_suffix": "_mask",
        "val_fraction": 0.2,
    }
    assert sum(map(len, opened(found).values())) == 4


@pytest.mark.parametrize(
    ("dataset", "files"),
    [
        (
            "ade20k",
            [
                f"ADEChallengeData2016/{kind}/{split}/ADE_{short}_1.{suffix}"
                for kind, suffix in (("images", "jpg"), ("annotations", "png"))
                for split, short in (("training", "train"), ("validation", "val"))
            ],
        ),
        (
            "cityscapes",
            [
                f"{kind}/{split}/aachen/aachen_0_{end}.png"
                for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
                for split in ("train", "val")
            ],
        ),
        ("camvid", [f"{folder}/0001TP_006690.png" for folder in ("train", "trainannot", "val", "valannot")]),
        ("coco_stuff10k", ["images/COCO_train2014_1.jpg", "annotations/COCO_train2014_1.mat", "imageLists/train.txt"]),
        ("pascal_context_59", ["VOCdevkit/VOC2010/JPEGImages/2008_1.jpg", "VOCdevkit/VOC2010/trainval_merged.json"]),
    ],
)
def test_published_sets__by_what_is_theirs_alone(tmp_path: Path, dataset: str, files: list[str]) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"1")
    assert recognise(str(tmp_path)).config.dataset == dataset


def test_images_in_training_and_validation__need_not_be_ade20k(tmp_path: Path) -> None:
    for number, split in enumerate(("training", "validation")):
        put(tmp_path / f"images/{split}/a.jpg", tmp_path / f"annotations/{split}/a.png", number)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    found = recognise(str(tmp_path))
    assert (found.config.dataset, found.config.folder.labels) == ("folder", "annotations")
    assert opened(found) == {"train": ["a"], "val": ["a"]}


def test_folders__for_val_alone_are_never_drawn_from(tmp_path: Path) -> None:
    put(tmp_path / "images/val/a.jpg", tmp_path / "annotations/val/a.png", 0)
    found = recognise(str(tmp_path))
    assert found.config.folder.val_fraction is None
    assert found.why[1] == "folders part them into val; none is for train"


def test_nothing_known__says_what_is_there(tmp_path: Path) -> None:
    for name in ("photos/a.jpg", "photos/b.jpg", "notes/a.xml", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    with pytest.raises(UserError) as caught:
        recognise(str(tmp_path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0] == (
        f"no known layout lies at {tmp_path}; it holds 2 .jpg in photos/, 1 without suffix in the root, "
        "1 .xml in notes/"
    )
    with pytest.raises(UserError, match="nowhere does not exist; give the folder or archive"):
        recognise(str(tmp_path / "nowhere"))


def write_coco(file: Path, names: list[str]) -> None:
    """A box of class 1 in each image."""
    box = [[1, 1, 5, 1, 5, 4, 1, 4]]
    content = {
        "info": {},
        "images": [{"id": number, "file_name": name, "height": 8, "width": 12} for number, name in enumerate(names)],
        "categories": [{"id": 5, "name": "thing"}],
        "annotations": [{"image_id": number, "category_id": 5, "segmentation": box} for number in range(len(names))],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def put_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (12, 8), (number, len(folder.name), 0)).save(folder / f"f{number}.png")
    return [f"f{number}.png" for number in range(count)]


@pytest.mark.parametrize("packed", [False, True])
def test_coco__a_file_a_split_beside_or_inside_the_folders(tmp_path: Path, packed: bool) -> None:
    for root, image_folder, file in (
        (tmp_path / "coco", "{}2017", "annotations/instances_{}2017.json"),
        (tmp_path / "roboflow", "{}", "{}/_annotations.coco.json"),
    ):
        for split, count in (("train", 3), ("val", 2)):
            write_coco(root / file.format(split), put_images(root / image_folder.format(split), count))
        found = recognise(str(pack(root) if packed else root))
        assert found.config.dataset == "coco"
        assert {split: len(keys) for split, keys in opened(found).items()} == {"train": 3, "val": 2}
        assert found.why[-2:] == tuple(
            f"{file.format(split)} lists {count} images, {count} objects and 1 categories"
            for split, count in (("train", 3), ("val", 2))
        )


def test_coco__one_file_as_cvat_exports_it(tmp_path: Path) -> None:
    write_coco(tmp_path / "annotations/instances_default.json", put_images(tmp_path / "images/default", 5))
    found = recognise(str(tmp_path))
    assert found.config.coco.model_dump(exclude_defaults=True) == {
        "annotations": "annotations/instances_default.json",
        "val_fraction": 0.2,
    }
    assert sum(map(len, opened(found).values())) == 5


@pytest.mark.parametrize("folders", [("",), ("train/", "valid/")])
def test_labelme__beside_the_images(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        for name in put_images(tmp_path / folder, 4)[:3]:
            write_labelme(tmp_path / folder / name.replace(".png", ".json"), [("thing", "rectangle", [[0, 0], [2, 2]])])
    found = recognise(str(tmp_path))
    assert found.config.dataset == "labelme"
    assert found.config.labelme.val_fraction == (0.2 if len(folders) == 1 else None)
    assert found.why[0] == f"{3 * len(folders)} of {4 * len(folders)} images have a JSON file of labelme's beside them"
    assert sum(map(len, opened(found).values())) == 3 * len(folders)


@pytest.mark.parametrize("val", ["validation", None])
def test_parquet__with_classes_beside_it(tmp_path: Path, val: str | None) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for start, split in ((0, "train"), *([(4, val)] if val else [])):
        labels = [encode_png(label_of(number)) for number in range(start, start + 4)]
        rows = {name: [{"bytes": cell, "path": None} for cell in labels] for name in ("image", "mask")}
        pq.write_table(pa.table(rows, pa.schema([(name, kind) for name in rows])), tmp_path / f"{split}.parquet")
    (tmp_path / "id2label.json").write_text('{"0": "ground", "1": "thing"}')
    found = recognise(str(tmp_path))
    assert found.config.parquet.model_dump(exclude_defaults=True) == ({} if val else {"val_fraction": 0.2})
    assert sum(map(len, opened(found).values())) == (8 if val else 4)
    assert found.why == (
        f"{2 if val else 1} Parquet files hold rows with pictures in image and mask: 4 of train"
        + (", 4 of val" if val else ""),
        *(
            []
            if val
            else ["nothing says what is val: 20% are drawn (data.parquet.group keeps frames of one video together)"]
        ),
        "id2label.json names 2 classes",
    )


@pytest.mark.parametrize("folder", ["images", "."])
def test_label_studio__one_export_beside_its_images(tmp_path: Path, folder: str) -> None:
    names = put_images(tmp_path / folder, 4)
    box = {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["thing"]}
    region = {"type": "rectanglelabels", "original_width": 12, "original_height": 8, "value": box}
    tasks = [
        {"id": 1, "annotations": [{"id": 1, "result": [region]}], "data": {"image": f"/data/upload/1/{name}"}}
        for name in names[:3]
    ]
    (tmp_path / "project-1.json").write_text(json.dumps(tasks))
    found = recognise(str(tmp_path))
    assert found.config.label_studio.model_dump(exclude_defaults=True) == {
        "tasks": "project-1.json",
        "val_fraction": 0.2,
        **({} if folder == "images" else {"images": "."}),
    }
    assert found.why == (
        "project-1.json holds 3 annotated tasks of Label Studio's",
        "nothing says what is val: 20% are drawn (data.label_studio.group keeps frames of one video together)",
    )
    assert sum(map(len, opened(found).values())) == 3
