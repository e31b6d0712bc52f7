from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import segvit
from flows.present.runs import data_view
from pipeline.config import DataConfig, DigitsConfig
from pipeline.datasets.digits import Digits
from pipeline.errors import UserError
from pipeline.reports.data_page import CAPTION, CELL, GAP, contact_sheet, reader_samples, write_data_report
from pipeline.reports.data_summary import summarize_shard_set
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_reader import ShardReader
from pipeline.shards.shards import ShardSetError

SCENES = DigitsConfig(num_train=7, num_val=3)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = DataConfig(dataset="digits", samples_per_shard=4, digits=SCENES)
    return prepare_shards(config, str(tmp_path_factory.mktemp("set")), progress=lambda _: None).uri


def test_summary__counts_and_shares(uri: str) -> None:
    summary = summarize_shard_set(uri)
    assert (summary.name, summary.num_quarantined, len(summary.palette)) == ("digits", 0, 11)
    train, val = summary.splits
    assert (train.name, train.num_images, train.num_shards) == ("train", 7, 2)
    assert (val.name, val.num_images, val.num_shards) == ("val", 3, 1)
    labels = [Digits(SCENES, seed=0).scene("train", number)[1] for number in range(7)]
    labelled = sum(int((label != 255).sum()) for label in labels)
    assert train.num_pixels == 7 * 112 * 112
    assert train.ignored_share == pytest.approx(1 - labelled / train.num_pixels)
    for number, one in enumerate(train.classes):
        assert one.pixels == sum(int((label == number).sum()) for label in labels)
        assert one.pixel_share == pytest.approx(one.pixels / labelled)
        assert one.image_share == pytest.approx(sum(bool((label == number).any()) for label in labels) / 7)
    assert train.num_bytes == sum(file.stat().st_size for file in Path(uri).glob("train-*.tar"))


def test_summary__quarantined_samples_with_reasons(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    for number in range(4):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)).save(
            root / f"images/{number}.png"
        )
        Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), 10, 1).repeat(20, 0)).save(
            root / f"labels/{number}.png"
        )
    (root / "labels/1.png").write_bytes(b"no image")
    (root / "classes.txt").write_text("a\nb\n")
    (root / "splits/train.txt").write_text("0\n1\n2\n")
    (root / "splits/val.txt").write_text("3\n")
    lenient = {"on_bad_sample": "quarantine", "max_quarantined_fraction": 0.5}
    config = DataConfig.model_validate({"dataset": "folder", "root": str(root), **lenient})
    summary = summarize_shard_set(prepare_shards(config, str(tmp_path / "set"), progress=lambda _: None).uri)
    (one,) = summary.quarantined
    assert (one.split, one.key, one.file) == ("train", "1", f"{root}/labels/1.png")
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(data_view(summary))
    said = console.export_text()
    assert f"{root}/labels/1.png cannot be decoded (unknown format); replace the file or remove the sample" in said
    page = write_data_report(summary, tmp_path / "out")[-1].read_text()
    assert f"train: {root}/labels/1.png cannot be decoded" in page


def sheet_of(uri: str, split: str, num_samples: int) -> Image.Image:
    reader = ShardReader(uri)
    samples = reader_samples(reader, split, num_samples)
    return contact_sheet(samples, reader.manifest.classes, reader.manifest.palette)


def test_sheet__shows_images_and_overlays(uri: str) -> None:
    sheet = np.asarray(sheet_of(uri, "val", 2))
    for position, number in enumerate((0, 1)):
        image, label = Digits(SCENES, seed=0).scene("val", number)
        left, top = position * (2 * CELL[0] + 3 * GAP) + GAP, CAPTION
        np.testing.assert_array_equal(sheet[top : top + 112, left : left + 112], image)
        left += CELL[0] + GAP
        expected = segvit.overlay(image, label, Digits(SCENES, seed=0).palette, 0.6)
        np.testing.assert_array_equal(sheet[top : top + 112, left : left + 112], expected)


def test_sheet__large_images_shrink_into_their_cells(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reports.data_page.CELL", (60, 28))
    sheet = sheet_of(uri, "train", 1)
    assert sheet.width >= 2 * 60 + GAP
    pixels = np.asarray(sheet)[CAPTION : CAPTION + 28]
    assert (pixels[:, GAP : GAP + 28] != 255).any()
    assert (pixels[:, GAP + 29 : GAP + 60] == 255).all()


def test_report__files_open_and_name_the_classes(uri: str, tmp_path: Path) -> None:
    summary = summarize_shard_set(uri)
    files = write_data_report(summary, tmp_path / "out")
    assert [file.name for file in files] == ["classes.png", "samples-train.png", "samples-val.png", "index.html"]
    for file in files[:-1]:
        with Image.open(io.BytesIO(file.read_bytes())) as picture:
            assert min(picture.size) > 100
    page = files[-1].read_text()
    for file in files[:-1]:
        assert f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" in page
    assert "://" not in page
    for expected in (summary.digest, f"{summary.splits[0].classes[10].pixels:,}", "rgb(64, 64, 64)"):
        assert expected in page
    before = [file.read_bytes() for file in files]
    with pytest.raises(UserError, match=r"classes\.png exists; choose another folder or use --overwrite"):
        write_data_report(summary, tmp_path / "out")
    assert [file.read_bytes() for file in write_data_report(summary, tmp_path / "out", overwrite=True)] == before


def test_report__escapes_names(uri: str, tmp_path: Path) -> None:
    summary = summarize_shard_set(uri).model_copy(update={"name": "<b>$x$"})
    page = write_data_report(summary, tmp_path)[-1].read_text()
    assert "&lt;b&gt;$x$" in page
    assert "<b>$x$" not in page


def test_summary__errors(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ShardSetError, match=r"no shard set at .*: manifest\.json is missing; prepare it first"):
        summarize_shard_set(str(tmp_path))
