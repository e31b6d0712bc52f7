"""Images that look alike: whatever their size, brightness and orientation, and no others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipeline.data_check.near_duplicates import find_matches, perceptual_hash, stack


def scene(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((160, 120), Image.Resampling.BILINEAR)


def hashes(*images: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    found = [perceptual_hash(image) for image in images]
    return stack([one for one in found if one is not None])


@pytest.mark.parametrize("turn", [None, *Image.Transpose])
def test_matches__in_every_orientation(turn: Image.Transpose | None) -> None:
    others = hashes(*map(scene, range(6)))
    image = scene(4) if turn is None else scene(4).transpose(turn)
    ((first, second, bits),) = find_matches(hashes(image), others)
    assert (first, second) == (0, 4)
    assert bits <= 3


def test_matches__smaller_brighter_and_compressed(tmp_path: Path) -> None:
    changed = ImageEnhance.Brightness(scene(1).resize((80, 60))).enhance(1.2)
    changed.save(tmp_path / "a.jpg", quality=40)
    ((_, second, _),) = find_matches(hashes(Image.open(tmp_path / "a.jpg")), hashes(*map(scene, range(4))))
    assert second == 1


def test_matches__unlike_images_and_none() -> None:
    assert not list(find_matches(hashes(*map(scene, range(20))), hashes(*map(scene, range(20, 80)))))
    assert not list(find_matches(hashes(), hashes(scene(0))))
    assert not list(find_matches(hashes(scene(0)), hashes()))


def test_hash__an_image_without_structure_has_none() -> None:
    assert perceptual_hash(Image.new("RGB", (50, 40), (90, 12, 3))) is None


@pytest.mark.skipif("SEGVIT_DATA" not in os.environ, reason="SEGVIT_DATA does not name a folder with camvid/")
def test_matches__camvid_val_is_of_other_drives_than_train() -> None:
    root = Path(os.environ["SEGVIT_DATA"]) / "camvid"
    train, val = (
        hashes(*(Image.open(file) for file in sorted((root / split).iterdir())[::4])) for split in ("train", "val")
    )
    assert not list(find_matches(val, train))
    # A second before, on the same drive.
    assert len(list(find_matches(train[1:20], train[:19]))) >= 2
