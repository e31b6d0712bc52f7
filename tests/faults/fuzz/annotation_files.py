"""Annotation files, lists and class files of each layout."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.recognise import recognise
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from tests.faults.fuzz.case import Case, SeveralLinesError, read_dataset
from tests.faults.fuzz.trees import mutate_json
from tests.faults.mutations import flip_bits, hostile_name, numbers, overwrite, splice, truncate

HEIGHT, WIDTH = 16, 24
LINES = (
    *("../../../etc/passwd", "/etc/passwd", "a\0b", "x" * 100_000, "a::file:///etc/passwd", "..\\..\\x", "train/f0"),
    *("", "#", "0, x", "1 y", "99999999999999999999, z", "name:999,0,0::", "a,b,c,d", "\ufeff\ufeff", "://", "\ud7ff"),
)


def picture(path: Path, seed: int, label: bool = False) -> None:
    """A small image of noise, or a label map of the ids 0 and 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shape = (HEIGHT, WIDTH) if label else (HEIGHT, WIDTH, 3)
    Image.fromarray(rng.integers(0, 2 if label else 256, shape, dtype=np.uint8)).save(path)


def config_of(dataset: str, root: Path, **settings: Any) -> DataConfig:
    """The section that reads `root`."""
    return DataConfig.model_validate({"dataset": dataset, "root": str(root), **settings})


def _annotated(folder: Path, name: str, content: Any, rng: random.Random) -> str:
    """The mutated text in the file `name`; what was changed."""
    kind, text = mutate_json(json.dumps(content).encode(), rng)
    (folder / name).write_bytes(text)
    return kind


def coco(folder: Path, rng: random.Random) -> Case:
    """COCO's JSON with polygons and run lengths."""
    for number in range(3):
        picture(folder / f"images/{number}.png", number)
    shapes: list[Any] = [[[2, 2, 20, 2, 20, 12, 2, 12]], {"size": [16, 24], "counts": [10, 30, 344]}]
    shapes.append({"size": [16, 24], "counts": ":n0jk0"})
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in range(3)
        ],
        "categories": [{"id": 1, "name": "car", "supercategory": "x"}, {"id": 5, "name": "road"}],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "iscrowd": number % 2, "segmentation": shape}
            for number, shape in enumerate(shapes)
        ],
    }
    kind = _annotated(folder, "a.json", content, rng)
    settings = {"annotations": "a.json", "val_fraction": 0.4, "on_top": rng.choice(["later", "smaller"])}
    if rng.random() < 0.2:
        return Case(kind, lambda: _recognise(folder))
    return Case(kind, lambda: read_dataset(config_of("coco", folder, coco=settings)))


def labelme(folder: Path, rng: random.Random) -> Case:
    """labelme's JSON with each kind of shape."""
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 5), np.uint8) * 255).save(buffer, "PNG")
    shapes = [
        {"label": "car", "shape_type": "polygon", "points": [[1, 1], [20, 2], [10, 12]]},
        {"label": "road", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]},
        {"label": "car", "shape_type": "circle", "points": [[9, 9], [12, 9]]},
        {
            "label": "pole",
            "shape_type": "mask",
            "points": [[3, 3], [8, 7]],
            "mask": base64.b64encode(buffer.getvalue()).decode(),
        },
    ]
    content = {"imageHeight": HEIGHT, "imageWidth": WIDTH, "imagePath": "0.png", "shapes": shapes}
    for number in range(3):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.json").write_text(json.dumps(content))
    kind = _annotated(folder, "1.json", content, rng)
    settings = {"images": ".", "labels": ".", "val_fraction": 0.4}
    if rng.random() < 0.2:
        return Case(kind, lambda: _recognise(folder))
    return Case(kind, lambda: read_dataset(config_of("labelme", folder, labelme=settings)))


def label_studio(folder: Path, rng: random.Random) -> Case:
    """Label Studio's JSON with polygons, a turned rectangle and a brush mask."""
    for number in range(3):
        picture(folder / f"images/{number}.png", number)
    size = {"original_height": HEIGHT, "original_width": WIDTH, "image_rotation": 0}
    percents = {"x": 10, "y": 10, "width": 30, "height": 40, "rotation": 20, "rectanglelabels": ["road"]}
    # 1536 words of 8 bits: one run of zeros, all of them.
    bits = f"{4 * HEIGHT * WIDTH:032b}" + "00111" + f"{11:04b}" * 4 + "1" + "00" + f"{4 * HEIGHT * WIDTH - 1:012b}"
    bits += "0" * (8 + -(len(bits) + 8) % 8)
    rle = list(int(bits, 2).to_bytes(len(bits) // 8))
    regions = [
        {"type": "polygonlabels", "value": {"points": [[1, 1], [50, 2], [20, 90]], "polygonlabels": ["car"]}, **size},
        {"type": "rectanglelabels", "value": percents, **size},
        {"type": "brushlabels", "value": {"format": "rle", "rle": rle, "brushlabels": ["car"]}, **size},
    ]
    content = [
        {"id": number, "data": {"image": f"/data/upload/1/{number}.png"}, "annotations": [{"result": [region]}]}
        for number, region in enumerate(regions)
    ]
    kind = _annotated(folder, "project.json", content, rng)
    settings = {"tasks": "project.json", "images": "images", "val_fraction": 0.4}
    if rng.random() < 0.2:
        return Case(kind, lambda: _recognise(folder))
    return Case(kind, lambda: read_dataset(config_of("label_studio", folder, label_studio=settings)))


def pascal_detail(folder: Path, rng: random.Random) -> Case:
    """trainval_merged.json of PASCAL-Context."""
    images, annotations = [], []
    for number, phase in enumerate(("train", "val")):
        (folder / "JPEGImages").mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"JPEGImages/2008_{number}.jpg")
        record = {"image_id": number, "file_name": f"2008_{number}.jpg", "height": HEIGHT, "width": WIDTH}
        images.append({**record, "phase": phase})
        for shape in ([[2, 2, 20, 2, 20, 12, 2, 12]], {"size": [HEIGHT, WIDTH], "counts": [10, 30, 344]}):
            annotations.append({"image_id": number, "category_id": 2, "segmentation": shape})
    kind = _annotated(folder, "trainval_merged.json", {"images": images, "annos_segmentation": annotations}, rng)
    return Case(kind, lambda: read_dataset(config_of("pascal_context_60", folder)))


def split_list(folder: Path, rng: random.Random) -> Case:
    """The lists of a folder's splits."""
    names = [f"a/{number}" for number in range(4)]
    for number, name in enumerate(names):
        picture(folder / f"images/{name}.png", number)
        picture(folder / f"labels/{name}.png", number, label=True)
    (folder / "classes.txt").write_text("ground\nthing\n")
    (folder / "splits").mkdir()
    (folder / "splits/train.txt").write_text("\n".join(names[:3]))
    (folder / "splits/val.txt").write_text(names[3])
    kind = _mutate_lines(folder / f"splits/{rng.choice(['train', 'val'])}.txt", rng)
    return Case(kind, lambda: read_dataset(config_of("folder", folder)))


def class_file(folder: Path, rng: random.Random) -> Case:
    """Class files of each form."""
    json_forms: tuple[Any, ...] = (
        {"names": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]], "ids": [0, 7], "ignore_ids": [255]},
        {"0": "a", "1": "b"},
        {"id2label": {"0": "a", "3": "b"}},
        {"categories": [{"id": 1, "name": "a", "color": [1, 2, 3]}, {"id": 2, "name": "b", "color": [0, 0, 9]}]},
    )
    texts = (
        "a\nb\n",
        "Pixel Value, Class\n0, a\n1, b\n",
        "name,r,g,b\na,1,2,3\nb,4,5,6\n",
        "# label:color_rgb:parts:actions\na:1,2,3::\nb:4,5,6::\n",
        "__ignore__\n_background_\na\n",
        "0, a\n1, b\n",
    )
    if rng.random() < 0.5:
        name = rng.choice(["classes.json", "classes.yaml"])
        kind = _annotated(folder, name, rng.choice(json_forms), rng)
    else:
        name = "classes.txt"
        (folder / name).write_text(rng.choice(texts))
        kind = _mutate_lines(folder / name, rng)
    return Case(kind, lambda: read_class_list(FileTree(str(folder)), name))


def mat(folder: Path, rng: random.Random) -> Case:
    """A label map as MATLAB writes it."""
    from scipy import io as scipy_io

    from pipeline.datasets.mat_file import decode_mat

    label = np.random.default_rng(rng.randrange(99)).integers(0, 183, (HEIGHT, WIDTH)).astype(np.uint16)
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"names": "x", "S": label}, do_compression=rng.random() < 0.6)
    name, mutation = rng.choice(
        [("numbers", numbers), ("numbers", numbers), ("bits", flip_bits), ("cut", truncate), ("spliced", splice)]
    )
    data = mutation(buffer.getvalue(), rng)
    return Case(name, lambda: decode_mat(data))


def _recognise(folder: Path) -> None:
    try:
        recognise(str(folder))
    except UserError as error:
        raise SeveralLinesError(error) from error


def _mutate_lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    match rng.choice(["line", "line", "line", "twice", "bits", "noise", "cut"]):
        case "line":
            odd = rng.choice([*LINES, hostile_name(rng), hostile_name(rng)])
            lines.insert(rng.randrange(len(lines) + 1), odd)
            path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
            return "line"
        case "twice":
            path.write_text("\n".join([*lines, *lines]))
            return "line twice"
        case "bits":
            path.write_bytes(flip_bits(path.read_bytes(), rng))
            return "bits flipped"
        case "noise":
            path.write_bytes(overwrite(path.read_bytes(), rng))
            return "overwritten"
    path.write_bytes(truncate(path.read_bytes(), rng))
    return "truncated"
