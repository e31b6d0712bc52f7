"""One sample at a time: what passes, with which bytes, and what is rejected and why."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import DataConfig, DigitsConfig
from pipeline.datasets import RawPair, RawSample, RejectedSampleError, open_dataset
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.sample_check import check_sample
from segvit.image_files import decode_label, encode_png, open_image

SAMPLE = RawSample("a", "a.jpg", "a.png", "")
DIGITS = DataConfig(dataset="digits", samples_per_shard=4, digits=DigitsConfig(num_train=7, num_val=2))


@dataclass
class OneSample:
    """A data set that answers with one pair whatever is asked."""

    pair: RawPair
    name: str = "one"
    class_names: tuple[str, ...] = ("x", "y")
    palette: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (1, 1, 1))
    digest: str = field(default="")

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def samples(self, split: str) -> list[RawSample]:
        return [SAMPLE]

    def read(self, sample: RawSample) -> RawPair:
        return self.pair

    def source_digest(self) -> str:
        return self.digest


def jpeg(pixels: np.ndarray, **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **settings)
    return buffer.getvalue()


def test_check_sample__small_enough_keeps_its_bytes() -> None:
    content = jpeg(np.full((6, 8, 3), 90, dtype=np.uint8))
    label = np.zeros((6, 8), dtype=np.uint8)
    label[0] = [1, 1, 1, 1, 1, 255, 255, 255]
    checked = check_sample(OneSample(RawPair(content, label)), SAMPLE, max_long_side=8)
    assert (checked.image, checked.suffix) == (content, "jpg")
    np.testing.assert_array_equal(decode_label(checked.label_png), label)
    assert checked.row["class_pixels"] == [40, 5]
    assert (checked.row["height"], checked.row["width"], checked.row["image_size"]) == (6, 8, len(content))


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_check_sample__other_formats_become_png_without_loss(kind: str, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3) if mode == "RGB" else (6, 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    label = np.zeros((6, 8), dtype=np.uint8)
    checked = check_sample(OneSample(RawPair(buffer.getvalue(), label)), SAMPLE)
    with Image.open(io.BytesIO(checked.image)) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image.convert(mode)), pixels)
    assert (checked.suffix, checked.row["image_size"]) == ("png", len(checked.image))
    # Duplicates are told by the source's file.
    assert checked.row["image_sha256"] == hashlib.sha256(buffer.getvalue()).digest()


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_check_sample__scaled_down_together(kind: str) -> None:
    # Columns 0-19 dark and class 0, the rest light and class 1: the edge must stay where it is in both.
    pixels = np.full((30, 60, 3), 20, dtype=np.uint8)
    pixels[:, 20:] = 220
    label = np.zeros((30, 60), dtype=np.uint8)
    label[:, 20:] = 1
    content = encode_png(pixels) if kind == "png" else jpeg(pixels, quality=98, subsampling=0)
    checked = check_sample(OneSample(RawPair(content, label)), SAMPLE, max_long_side=15)
    image, suffix = open_image(checked.image)
    assert (image.size, suffix, checked.suffix) == ((15, 8), kind, kind)
    smaller = decode_label(checked.label_png)
    assert smaller.shape == (8, 15)
    assert np.unique(smaller).tolist() == [0, 1]
    np.testing.assert_array_equal(smaller, np.asarray(image)[..., 0] > 120)
    assert checked.row["class_pixels"] == [40, 80]
    again = check_sample(OneSample(RawPair(content, label)), SAMPLE, max_long_side=15)
    assert again == checked


def test_check_sample__fine_stripes_become_their_mean() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, ::2] = 200
    checked = check_sample(OneSample(RawPair(encode_png(pixels), np.zeros((64, 64), np.uint8))), SAMPLE, 16)
    assert np.abs(np.asarray(open_image(checked.image)[0])[:, 1:-1].astype(int) - 100).max() <= 2


def test_check_sample__nothing_labelled() -> None:
    pair = RawPair(jpeg(np.zeros((6, 8, 3), dtype=np.uint8)), np.full((6, 8), 255, dtype=np.uint8))
    with pytest.raises(RejectedSampleError, match=r"^a\.png contains only ignored pixels; label the image"):
        check_sample(OneSample(pair), SAMPLE)


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_check_sample__truncated(kind: str, keep: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = encode_png(pixels) if kind == "png" else jpeg(pixels)
    pair = RawPair(content[: int(len(content) * keep)], np.zeros((40, 40), dtype=np.uint8))
    with pytest.raises(RejectedSampleError, match=r"^a\.jpg cannot be decoded \(.*\); replace the file"):
        check_sample(OneSample(pair), SAMPLE)


def test_prepare__index_tells_images_and_pixels_a_class(tmp_path: Path) -> None:
    prepare_shards(DIGITS, str(tmp_path), progress=lambda line: None)
    dataset = open_dataset(DIGITS)
    labels = [dataset.read(sample).label for sample in dataset.samples("train")]
    rows = pq.read_table(tmp_path / "index.parquet", filters=[("split", "=", "train")])["class_pixels"]
    pixels = np.array(rows.to_pylist())
    assert pixels.sum(axis=0).tolist() == [sum(int((label == c).sum()) for label in labels) for c in range(11)]
    assert np.count_nonzero(pixels, axis=0).tolist() == [sum(c in label for label in labels) for c in range(11)]


def test_prepare__scaled_down(tmp_path: Path) -> None:
    small, same, own = (
        prepare_shards(DIGITS.model_copy(update={"max_long_side": side}), str(tmp_path), progress=lambda line: None)
        for side in (56, 112, None)
    )
    assert same.digest == own.digest != small.digest
    prepare_shards(DIGITS.model_copy(update={"max_long_side": 56}), str(tmp_path), progress=lambda line: None)
    table = pq.read_table(tmp_path / "index.parquet")
    assert set(table["height"].to_pylist()) == set(table["width"].to_pylist()) == {56}
    assert {sum(pixels) for pixels in table["class_pixels"].to_pylist()} == {56 * 56}
