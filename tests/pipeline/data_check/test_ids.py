"""Label maps whose classes nothing names: what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.cli import main
from pipeline.config import DataConfig
from pipeline.data_check.ids import ids_in_use


def put(root: Path, path: str, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / path)


def label(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.array([values], np.uint8).repeat(8, 0)


@pytest.mark.parametrize("layout", ["labels/{}", "labels/train/{}", "train/labels/{}"])
def test_ids__of_all_label_maps_that_can_be_read(tmp_path: Path, layout: str) -> None:
    put(tmp_path, layout.format("a.png"), label(0, 3))
    put(tmp_path, layout.format("b.png"), label(0, 255, 12))
    put(tmp_path, "images/a.png", label(77, 78))
    (tmp_path / layout.format("c.png")).write_bytes(b"no image")
    config = DataConfig(dataset="folder", root=str(tmp_path))
    assert ids_in_use(config) == "2 label maps that were read hold 0, 3, 12, 255"


def test_ids__colours_and_none(tmp_path: Path) -> None:
    config = DataConfig.model_validate(
        {"dataset": "folder", "root": str(tmp_path), "folder": {"images": ".", "labels": ".", "label_suffix": "_mask"}}
    )
    put(tmp_path, "a.png", label(1, 2))
    assert ids_in_use(config) is None
    put(tmp_path, "a_mask.png", np.array([[[0, 0, 0], [128, 0, 64]]], np.uint8))
    assert ids_in_use(config) == "1 label maps that were read hold [0, 0, 0], [128, 0, 64]"


def test_check__without_names_tells_layout_and_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        put(tmp_path, f"images/{name}.png", label(1, 2))
        put(tmp_path, f"labels/{name}.png", label(4, 6))
    for command in (["check", str(tmp_path)], ["init", str(tmp_path), "--out", str(tmp_path / "e.yaml")]):
        with pytest.raises(SystemExit, match="1"):
            main(command)
        said = capsys.readouterr().err
        assert "has no classes.txt; write one class name a line into it" in said
        assert "images/ and labels/ hold 2 pairs" in said
        assert "2 label maps that were read hold 4, 6" in said
    assert not (tmp_path / "e.yaml").exists()


def test_init__without_a_sample_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate("abcd"):
        put(tmp_path, f"images/{'train' if number < 2 else 'val'}/{name}.png", label(number, 9))
        put(tmp_path, f"labels/{'train' if number < 2 else 'val'}/{name}.png", label(0, 1))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    for name in "ab":
        (tmp_path / f"images/train/{name}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="1"):
        main(["init", str(tmp_path), "--out", str(tmp_path / "e.yaml")])
    said = capsys.readouterr().err
    assert f"no sample of {tmp_path} can be trained on: {tmp_path}/images/train/a.png cannot be decoded" in said
    assert not (tmp_path / "e.yaml").exists()
