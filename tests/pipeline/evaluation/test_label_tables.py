from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.tree import Entry
from pipeline.errors import UserError
from pipeline.evaluation import label_tables
from pipeline.evaluation.image_sources import SourceImage
from pipeline.evaluation.label_tables import publish_table, run_length_code, write_areas, write_coco
from pipeline.evaluation.predict import ImageTask
from segvit.visualize import palette_image

CLASSES = ["sky", "Straße", "pole"]


def decoded(code: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask, read as the format's description says it is."""
    runs: list[int] = []
    value, shift = 0, 0
    for digit in (ord(character) - 48 for character in code):
        value |= (digit & 0x1F) << shift
        shift += 5
        if not digit & 0x20:
            if digit & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return inside.reshape(size, order="F")


@pytest.fixture
def tasks(tmp_path: Path) -> list[ImageTask]:
    """Two label maps, and a task between them whose image failed."""
    maps = {"a/x.jpg": [[0, 0, 1], [0, 1, 1]], "gone.jpg": None, "y.png": [[2, 2]]}
    made = []
    for path, labels in maps.items():
        file = tmp_path / f"{Path(path).stem}.labels.png"
        if labels is not None:
            palette_image(np.array(labels), [[1, 2, 3]] * 3).save(file)
        made.append(ImageTask(SourceImage(path, Entry(path, "")), file, None))
    return made


def test_run_length_code__is_what_the_formats_own_library_writes() -> None:
    # The codes are those of pycocotools.mask.encode.
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)
    assert run_length_code(mask) == "231"
    assert run_length_code(~mask) == "023O"
    assert run_length_code(np.ones((4, 5), dtype=bool)) == "0d0"
    tall = np.zeros((300, 4), dtype=bool)
    tall[10:250, 1:3] = True
    assert run_length_code(tall) == "f9`7l10R9"


@pytest.mark.parametrize("seed", range(4))
def test_run_length_code__is_read_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 50)) < rng.random()
    mask[:, 20:30] = seed % 2
    assert np.array_equal(decoded(run_length_code(mask), (37, 50)), mask)


def test_write_coco__one_annotation_a_class_of_an_image(tasks: list[ImageTask], tmp_path: Path) -> None:
    publish_table(str(tmp_path / "coco.json"), write_coco, tasks, CLASSES)
    found = json.loads((tmp_path / "coco.json").read_bytes())
    assert found["categories"] == [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
    assert found["images"] == [
        {"id": 1, "file_name": "a/x.jpg", "height": 2, "width": 3},
        {"id": 2, "file_name": "y.png", "height": 1, "width": 2},
    ]
    rows = found["annotations"]
    assert [(one["id"], one["image_id"], one["category_id"], one["area"], one["bbox"]) for one in rows] == [
        (1, 1, 0, 3, [0, 0, 2, 2]),
        (2, 1, 1, 3, [1, 0, 2, 2]),
        (3, 2, 2, 2, [0, 0, 2, 1]),
    ]
    masks = [decoded(one["segmentation"]["counts"], tuple(one["segmentation"]["size"])) for one in rows]
    assert masks[0].tolist() == [[True, True, False], [True, False, False]]
    assert (masks[0] ^ masks[1]).all()
    assert masks[2].all()
    assert {one["iscrowd"] for one in rows} == {0}


def test_write_areas__a_row_an_image_and_class(
    tasks: list[ImageTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_table(str(tmp_path / "areas.parquet"), write_areas, tasks, CLASSES)
    table = pq.read_table(tmp_path / "areas.parquet")
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["a/x.jpg", 0, "sky", 3, 0.5],
        ["a/x.jpg", 1, "Straße", 3, 0.5],
        ["a/x.jpg", 2, "pole", 0, 0.0],
        ["y.png", 0, "sky", 0, 0.0],
        ["y.png", 1, "Straße", 0, 0.0],
        ["y.png", 2, "pole", 2, 1.0],
    ]
    monkeypatch.setattr(label_tables, "ROWS_PER_GROUP", 1)
    publish_table(str(tmp_path / "small.parquet"), write_areas, tasks, CLASSES)
    assert pq.read_table(tmp_path / "small.parquet").equals(table)


def test_tables__of_no_label_map_are_empty(tasks: list[ImageTask]) -> None:
    coco, areas = io.BytesIO(), io.BytesIO()
    write_coco(coco, iter(()), CLASSES)
    write_areas(areas, iter(()), CLASSES)
    assert json.loads(coco.getvalue())["annotations"] == json.loads(coco.getvalue())["images"] == []
    assert pq.read_table(io.BytesIO(areas.getvalue())).num_rows == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((2, 2), 3, dtype=np.uint8), "x.labels.png is no label map of this model, of 3 classes; remove it"),
        (np.zeros((2, 2, 3), dtype=np.uint8), "x.labels.png is no label map of this model"),
        (None, "x.labels.png cannot be read"),
    ],
)
def test_publish_table__what_is_no_label_map_leaves_no_table(
    content: Any, message: str, tasks: list[ImageTask], tmp_path: Path
) -> None:
    if content is None:
        tasks[0].labels.write_bytes(b"damaged")
    else:
        Image.fromarray(content).save(tasks[0].labels)
    for name, write in (("coco.json", write_coco), ("areas.parquet", write_areas)):
        with pytest.raises(UserError, match=message):
            publish_table(str(tmp_path / name), write, tasks, CLASSES)
    assert not [file.name for file in tmp_path.iterdir() if not file.name.endswith(".png")]
