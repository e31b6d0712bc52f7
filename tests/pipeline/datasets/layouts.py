"""Small data sets in the arrangements that `folder` reads."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VOID = np.zeros((8, 12), np.uint8)


def label_of(number: int) -> NDArray[np.uint8]:
    """A rectangle of class 1 that is of the image with `number` alone."""
    label = VOID.copy()
    label[1 : 3 + number % 5, 1 : 2 + number % 10] = 1
    return label


def put(image: Path, label: Path, number: int) -> None:
    for file in (image, label):
        file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (*VOID.shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    Image.fromarray(label_of(number)).save(label)


LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "below images": ("images/{split}/{name}.jpg", "labels/{split}/{name}.png", {}),
    "mmseg": ("img_dir/{split}/{name}.png", "ann_dir/{split}/{name}.png", {"images": "img_dir", "labels": "ann_dir"}),
    "around": ("{split}/images/x/{name}.jpg", "{split}/labels/x/{name}.png", {}),
    "roboflow": (
        "{split}/{name}.v1.jpg",
        "{split}/{name}.v1_mask.png",
        {"images": ".", "labels": ".", "label_suffix": "_mask", "classes": "train/_classes.csv"},
    ),
    "suffix": ("images/{split}/{name}.jpg", "labels/{split}/{name}_mask.PNG", {"label_suffix": "_mask"}),
}


def make_splits(root: Path, layout: str, val: str = "val", train: str = "train") -> dict[str, Any]:
    image, label, folder = LAYOUTS[layout]
    for number in range(9):
        split = train if number < 5 else val if number < 7 else "test"
        paths = [root / path.format(split=split, name=f"f{number}") for path in (image, label)]
        put(paths[0], paths[1], number)
    classes = root / folder.get("classes", "classes.txt")
    classes.parent.mkdir(exist_ok=True)
    classes.write_text("Pixel Value, Class\n0, ground\n1, thing\n" if classes.suffix == ".csv" else "ground\nthing\n")
    return folder


def pack(root: Path) -> Path:
    """All below `root` in an archive beside it, inside a folder that the archive alone has."""
    target = root.with_name(f"{root.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, Path("wrapped") / file.relative_to(root))
    return target


VOC = {"images": "JPEGImages", "labels": "SegmentationClass", "splits": "ImageSets/Segmentation"}


def make_voc(root: Path, lists: dict[str, str]) -> Path:
    for number in range(6):
        put(root / f"JPEGImages/f {number}.jpg", root / f"SegmentationClass/f {number}.png", number)
        colours = np.array([[0, 0, 0], [128, 0, 0]], np.uint8)[label_of(number)]
        Image.fromarray(colours).save(root / f"SegmentationClass/f {number}.png")
    # VOC holds images of other tasks, too.
    Image.new("RGB", (4, 4)).save(root / "JPEGImages/other.jpg")
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nground:0,0,0::\nthing:128,0,0::\n")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, numbers in lists.items():
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f'"f {number}"\n' for number in numbers))
    return root
