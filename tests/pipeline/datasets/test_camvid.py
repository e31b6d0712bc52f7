"""CamVid in the SegNet layout: ids, splits, and what is wrong with a copy."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RejectedSampleError, open_dataset
from pipeline.datasets.camvid import CamVid
from pipeline.datasets.raw import LabelIds, sample_key
from pipeline.errors import UserError


def make_camvid(root: Path, splits: tuple[str, ...] = ("train", "val"), num_images: int = 3) -> Path:
    """A miniature with images of 12x16 pixels, and label maps that hold the ids 0 to 11."""
    for split in splits:
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(num_images):
            image = np.full((12, 16, 3), 20 * number, dtype=np.uint8)
            Image.fromarray(image).save(root / split / f"frame_{number}.png")
            label = (np.arange(12 * 16).reshape(12, 16) + number) % 12
            Image.fromarray(label.astype(np.uint8)).save(root / f"{split}annot" / f"frame_{number}.png")
    return root


def test_read__ids_stay_and_eleven_is_ignored(tmp_path: Path) -> None:
    dataset = CamVid(str(make_camvid(tmp_path)))
    samples = dataset.samples("val")
    assert [sample.key for sample in samples] == ["frame_0", "frame_1", "frame_2"]
    pair = dataset.read(samples[1])
    raw = (np.arange(12 * 16).reshape(12, 16) + 1) % 12
    np.testing.assert_array_equal(pair.label, np.where(raw == 11, 255, raw))
    assert pair.image == (tmp_path / "val" / "frame_1.png").read_bytes()


def test_read__palette_label_gives_indices(tmp_path: Path) -> None:
    root = make_camvid(tmp_path, num_images=1)
    label = Image.frombytes("P", (16, 12), np.tile(np.arange(8, dtype=np.uint8), (12, 2)).tobytes())
    label.putpalette([7, 99, 3] * 256)
    label.save(root / "trainannot" / "frame_0.png")
    dataset = CamVid(str(root))
    read = dataset.read(dataset.samples("train")[0]).label
    np.testing.assert_array_equal(read, np.tile(np.arange(8), (12, 2)))


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (
            "unknown id",
            "trainannot/frame_0.png",
            r"holds label ids 12, 200, outside the class list \(0-10, 11 =",
        ),
        ("colour label", "trainannot/frame_0.png", "is a colour picture, not a map of class ids"),
        ("no label", "trainannot/frame_0.png", "is missing: there is no such label map"),
        ("no image", "train/frame_0.png", "is missing: there is no such image"),
        ("cut label", "trainannot/frame_0.png", "cannot be decoded"),
    ],
)
def test_read__rejects(tmp_path: Path, damage: str, file: str, reason: str) -> None:
    root = make_camvid(tmp_path)
    label = root / "trainannot" / "frame_0.png"
    if damage == "unknown id":
        pixels = np.zeros((12, 16), dtype=np.uint8)
        pixels[0, 0], pixels[3, 4] = 12, 200
        Image.fromarray(pixels).save(label)
    elif damage == "colour label":
        Image.new("RGB", (16, 12)).save(label)
    elif damage == "no label":
        label.unlink()
    elif damage == "no image":
        (root / "train" / "frame_0.png").unlink()
    else:
        label.write_bytes(label.read_bytes()[:60])
    dataset = CamVid(str(root))
    assert len(dataset.samples("train")) == 3
    with pytest.raises(RejectedSampleError, match=reason) as caught:
        dataset.read(dataset.samples("train")[0])
    assert caught.value.file == str(root / file)


def test_splits__test_is_optional(tmp_path: Path) -> None:
    assert CamVid(str(make_camvid(tmp_path / "a"))).splits() == ("train", "val")
    full = make_camvid(tmp_path / "b", ("train", "val", "test"))
    assert CamVid(str(full)).splits() == ("train", "val", "test")


def test_splits__missing_root_or_split_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data root .*/nowhere does not exist; set data\.root"):
        CamVid(str(tmp_path / "nowhere")).splits()
    root = make_camvid(tmp_path, ("train",))
    with pytest.raises(UserError, match=r"has no folder val, valannot; the CamVid layout is"):
        CamVid(str(root)).splits()
    with pytest.raises(UserError, match=r"dataset camvid needs data\.root"):
        open_dataset(DataConfig(dataset="camvid"))


def test_source_digest__changes_with_any_file_only(tmp_path: Path) -> None:
    root = make_camvid(tmp_path)
    before = CamVid(str(root)).source_digest()
    assert CamVid(str(root)).source_digest() == before
    label = root / "valannot" / "frame_2.png"
    Image.fromarray(np.zeros((12, 16), dtype=np.uint8)).save(label)
    assert CamVid(str(root)).source_digest() != before


def test_sample_key__no_dots_and_no_two_names_meet() -> None:
    names = ["a.b", "a%2Eb", "a/b", "a_b", "ä b"]
    keys = [sample_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert not any("." in key or "/" in key for key in keys)
    assert sample_key("0001TP_006690") == "0001TP_006690"


def test_label_ids__sixteen_bit_and_negative_ids_are_checked() -> None:
    ids = LabelIds({1000: 0, 65535: 1}, ignored=[0], rule="1000, 65535")
    raw = np.array([[1000, 65535], [0, 0]], dtype=np.int32)
    np.testing.assert_array_equal(ids.to_classes(raw, "x.png"), [[0, 1], [255, 255]])
    for unknown in (-1, 65536, 7):
        with pytest.raises(RejectedSampleError, match=rf"label id {unknown}, outside"):
            ids.to_classes(np.array([[unknown, 1000]], dtype=np.int32), "x.png")


@pytest.mark.skipif("SEGVIT_DATA" not in os.environ, reason="SEGVIT_DATA does not name a folder with camvid/")
def test_real_data__counts_and_ids() -> None:
    dataset = open_dataset(DataConfig(dataset="camvid", root=os.environ["SEGVIT_DATA"] + "/camvid"))
    assert dataset.splits()[:2] == ("train", "val")
    assert [len(dataset.samples(split)) for split in ("train", "val")] == [367, 101]
    assert dataset.class_names[:4] == ("sky", "building", "pole", "road")
    pair = dataset.read(dataset.samples("train")[0])
    assert pair.label.shape == (360, 480)
    # The first frame: sky at the top, road at the bottom, and the unlabelled id 11 gone.
    assert dataset.class_names[np.bincount(pair.label[-60:, 150:330].ravel()).argmax()] == "road"
    assert set(np.unique(pair.label)) == {0, 1, 2, 3, 4, 5, 6, 8, 9, 255}
