"""The embedded digits: real scans, split by scan, scenes that any task can build."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.config import DataConfig, DigitsConfig
from pipeline.datasets import open_dataset
from pipeline.datasets.digits import BACKGROUND, Digits, split_scans
from pipeline.errors import UserError


def test_split_scans__no_scan_is_in_both_and_none_is_lost() -> None:
    train, val = split_scans("train", 0), split_scans("val", 0)
    assert not set(train.numbers) & set(val.numbers)
    assert sorted([*train.numbers, *val.numbers]) == list(range(1797))
    # Not by picture either: the data set holds no duplicate that would leak across.
    assert not {scan.tobytes() for scan in train.ink} & {scan.tobytes() for scan in val.ink}
    for digit in range(10):
        share = np.mean(val.digits == digit) * len(val.digits) / np.sum(load_digits().target == digit)
        assert share == pytest.approx(0.2, abs=0.01)


def test_split_scans__seed_chooses_the_split() -> None:
    assert set(split_scans("val", 0).numbers) != set(split_scans("val", 1).numbers)


def test_split_scans__ink_and_digit_belong_to_the_scan() -> None:
    val, original = split_scans("val", 0), load_digits()
    np.testing.assert_array_equal(val.ink * 16, original.images[val.numbers])
    np.testing.assert_array_equal(val.digits, original.target[val.numbers])


def test_scene__same_whichever_process_builds_it_and_different_otherwise() -> None:
    first, again = (Digits(DigitsConfig(), seed=0).scene("train", 3) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    others = [
        Digits(DigitsConfig(), seed=1).scene("train", 3),
        Digits(DigitsConfig(), seed=0).scene("val", 3),
        Digits(DigitsConfig(), seed=0).scene("train", 4),
    ]
    assert all(not np.array_equal(first[0], other[0]) for other in others)


def test_scene__one_to_three_digits_on_background() -> None:
    scenes = [Digits(DigitsConfig(), seed=0).scene("train", index) for index in range(60)]
    counts = [len(set(np.unique(label)) - {BACKGROUND}) for _, label in scenes]
    assert {1, 2, 3} == set(counts)
    labels = np.concatenate([label.ravel() for _, label in scenes])
    assert set(np.unique(labels)) == set(range(11))
    assert 0.7 < np.mean(labels == BACKGROUND) < 0.95
    assert all(image.shape == (112, 112, 3) and label.shape == (112, 112) for image, label in scenes)


def test_scene__ink_stands_out_dark_on_light_and_light_on_dark() -> None:
    differences = []
    for index in range(60):
        image, label = Digits(DigitsConfig(max_digits=1), seed=0).scene("train", index)
        grey = image.mean(axis=2)
        differences.append(grey[label != BACKGROUND].mean() - grey[label == BACKGROUND].mean())
    assert min(np.abs(differences)) > 30
    assert 15 < np.sum(np.array(differences) > 0) < 45


def test_scene__digit_height_follows_the_setting() -> None:
    config = DigitsConfig(max_digits=1, digit_size=(60, 60))
    for index in range(10):
        rows = np.nonzero((Digits(config, seed=0).scene("train", index)[1] != BACKGROUND).any(axis=1))[0]
        assert 50 < rows[-1] - rows[0] + 1 < 72


def test_read__png_of_the_scene() -> None:
    dataset = open_dataset(DataConfig(dataset="digits", digits=DigitsConfig(num_train=4, num_val=2)))
    assert dataset.splits() == ("train", "val")
    assert [len(dataset.samples(split)) for split in dataset.splits()] == [4, 2]
    assert len(dataset.class_names) == len(dataset.palette) == len(set(dataset.palette)) == 11
    assert dataset.class_names[BACKGROUND] == "background"
    sample = dataset.samples("val")[1]
    pair = dataset.read(sample)
    image, label = Digits(DigitsConfig(), seed=0).scene("val", 1)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(pair.image))), image)
    np.testing.assert_array_equal(pair.label, label)


def test_source_digest__follows_settings_and_seed() -> None:
    digests = {
        Digits(DigitsConfig(), 0).source_digest(),
        Digits(DigitsConfig(), 1).source_digest(),
        Digits(DigitsConfig(num_train=3), 0).source_digest(),
        Digits(DigitsConfig(image_size=128), 0).source_digest(),
    }
    assert len(digests) == 4
    assert Digits(DigitsConfig(), 0).source_digest() in digests


def test_open_dataset__unknown_name_lists_the_choices() -> None:
    with pytest.raises(UserError, match=r"unknown dataset 'mnist'; choose from ade20k, camvid"):
        open_dataset(DataConfig(dataset="mnist"))


def test_open_dataset__digits_read_no_root() -> None:
    with pytest.raises(UserError, match=r"'/data'.*embedded.*remove it"):
        open_dataset(DataConfig(dataset="digits", root="/data"))
