"""Files of more pixels than are decoded whole: what comes out, and with how much memory."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline import large_files
from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.large_files import is_large, read_large, reduced_size, shrink_label
from pipeline.shards.loader import EvalLoader
from pipeline.shards.prepare import prepare_shards
from segvit import image_files
from segvit.image_files import DecodeError, decode_image, read_label_picture

# Prepares a data set in a process of its own, and says how far its memory grew.
GROWTH = """
import resource, sys
import numpy as np
from pipeline.config import DataConfig
from pipeline.datasets import open_dataset
from pipeline.shards.sample_check import check_sample
config = DataConfig.model_validate({"dataset": "folder", "root": sys.argv[1]})
dataset = open_dataset(config)
sample = dataset.samples("train")[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checked = check_sample(dataset, sample, 1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *checked.row["class_pixels"], checked.row["width"])
"""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(mode: str, width: int = 300, height: int = 200) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 300 x 200 are large, and a strip has 7 rows."""
    for module in (image_files, large_files):
        monkeypatch.setattr(module, "MAX_PIXELS", 59_999)
    monkeypatch.setattr(large_files, "_STRIP_PIXELS", 7 * 300)


def whole(monkeypatch: pytest.MonkeyPatch, data: bytes) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "MAX_PIXELS", 1 << 26)
        return decode_image(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
@pytest.mark.parametrize("long_side", [150, 149, 40])
def test_read_large__png_is_the_mean_of_squares(mode: str, long_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(scene(mode))
    assert is_large(data)
    large = read_large(data, long_side)
    reduction = {150: 2, 149: 2, 40: 4}[long_side]
    expected = np.array(Image.fromarray(whole(monkeypatch, data)).reduce(reduction))
    np.testing.assert_array_equal(np.asarray(large.image.convert("RGB")), expected)
    assert large.size == (300, 200)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_read_large__upright(mode: str, orientation: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(mode), kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    large = read_large(data, 75)
    expected = np.array(Image.fromarray(whole(monkeypatch, data)).reduce(4)).astype(int)
    assert large.image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(large.image.convert("RGB")) - expected).mean() < 1.5
    assert (large.size, large.orientation) == ((300, 200) if orientation < 5 else (200, 300), orientation)
    assert large.stored_size == (300, 200)


@pytest.mark.parametrize("kind", ["L", "P", "P4", "P1", "I;16", "RGB"])
def test_shrink_label__keeps_the_pixel_in_the_middle(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 2 if kind == "P1" else 11, (200, 300)).astype(np.uint8)
    options: dict[str, Any] = {}
    if kind[0] == "P":
        picture = Image.frombytes("P", (300, 200), ids.tobytes())
        picture.putpalette([number * 7 % 256 for number in range(3 * 11)])
        options = {"bits": int(kind[1:] or 8)}
    elif kind == "RGB":
        picture = Image.fromarray(np.repeat(ids[..., None], 3, axis=2))
    else:
        picture = Image.fromarray(ids.astype(np.uint16) * 300 if kind == "I;16" else ids)
    data = encoded(picture, **options)
    shrunk = read_label_picture(shrink_label(data, 60))
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "MAX_PIXELS", 1 << 26)
        full = read_label_picture(data)
    assert shrunk.kind == full.kind
    np.testing.assert_array_equal(shrunk.values, full.values[2::5, 2::5])
    assert shrunk.index_colours == full.index_colours


@pytest.mark.parametrize(
    ("data", "long_side", "message"),
    [
        (
            encoded(scene("RGB"), "JPEG"),
            None,
            "has 300x200 pixels, more than the 59999 that are decoded whole; set data.m",
        ),
        (encoded(scene("RGB"), "JPEG"), 300, "data.max_long_side 300 leaves too many; lower it"),
        (encoded(scene("RGB"), "JPEG", progressive=True), 50, "is progressive, which takes memory for all of them"),
        (encoded(scene("CMYK"), "JPEG"), 50, "is CMYK, which takes memory"),
        (encoded(Image.new("I;16", (300, 200))), 50, "of 16 bits; save it with 8 bits or in parts"),
        (encoded(Image.new("1", (300, 200))), 50, "is of 1 bits a channel, which is not read at that size"),
        (encoded(scene("RGB"))[:9000], 50, "cannot be decoded"),
        (encoded(scene("RGB"), "JPEG")[:3000], 50, "cannot be decoded"),
    ],
)
def test_read_large__refused(data: bytes, long_side: int | None, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        read_large(data, long_side)


def test_shrink_label__refused() -> None:
    with pytest.raises(DecodeError, match="is JPEG, which changes ids"):
        shrink_label(encoded(scene("L"), "JPEG"), 50)
    with pytest.raises(DecodeError, match="cannot be decoded"):
        shrink_label(encoded(scene("L"))[:9000], 50)


def test_is_large__other_files_are_not() -> None:
    for data in (
        b"",
        b"\xff\xd8",
        b"\x89PNG\r\n\x1a\n",
        b"text",
        encoded(scene("L", 9, 9)),
        encoded(scene("L"), "TIFF"),
    ):
        assert not is_large(data)
    assert reduced_size((300, 200), 100) == (100, 67)


def make_folder(root: Path, image: bytes, label: bytes, suffix: str) -> None:
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("left\nright\n")
    for split in ("train", "val"):
        (root / f"splits/{split}.txt").write_text(split)
        (root / f"images/{split}.{suffix}").write_bytes(image + (split == "val") * b"\0")
        (root / f"labels/{split}.png").write_bytes(label)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_prepare__large_images_and_labels_stay_together(tmp_path: Path, orientation: int, suffix: str) -> None:
    edge = np.zeros((200, 300), np.uint8)
    edge[:, 120:] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix == "jpg" else {}
    image = encoded(Image.fromarray(edge * 200), "JPEG" if suffix == "jpg" else "PNG", exif=exif, **options)
    make_folder(tmp_path / "raw", image, encoded(Image.fromarray(edge)), suffix)
    config = DataConfig(dataset="folder", root=str(tmp_path / "raw"), max_long_side=60)
    shard_set = prepare_shards(config, str(tmp_path / "set"), progress=lambda _: None)
    [sample] = EvalLoader(shard_set, split="train")
    assert tuple(sample.label.shape) == ((40, 60) if orientation == 1 else (60, 40))
    assert int((sample.label == 0).sum()) == 40 * 24
    np.testing.assert_array_equal(sample.image[0].numpy() > 100, sample.label.numpy() == 1)
    with pytest.raises(UserError, match=r"more than the 59999 that are decoded whole; set data.max_long_side"):
        prepare_shards(
            config.model_copy(update={"max_long_side": None}), str(tmp_path / "set"), progress=lambda _: None
        )


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_check_sample__memory_of_400_million_pixels_is_bounded(tmp_path: Path, suffix: str) -> None:
    # The label map of the first is a PNG of the whole size.
    side, height = 20_000, 20_000 if suffix == "jpg" else 5_000
    line = b"\0" + bytes(side // 4) + b"\1" * (side - side // 4)
    packer = zlib.compressobj(1)
    stream = b"".join([*(packer.compress(line) for _ in range(height)), packer.flush()])
    head = large_files._Png((side, height), b"", 8, 0, False, b"", [])
    label = large_files._png_file(head, stream)
    # Zeros that are never written to take no memory.
    image = simplejpeg.encode_jpeg(np.zeros((height, side, 1), np.uint8), 90, "GRAY") if suffix == "jpg" else label
    make_folder(tmp_path, image, label, suffix)
    done = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True)
    growth_kib, left, right, width = map(int, done.stdout.split())
    assert (left, right, width) == (250 * height // 20, 750 * height // 20, 1000)
    assert growth_kib < 200 << 10
