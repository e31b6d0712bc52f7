"""ADE20K: the challenge's tree, its shifted ids, and the real samples against the publisher's own class table."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.errors import UserError

SIZE = (16, 12)


def make_ade20k(root: Path) -> Path:
    """The publisher's tree in `root`/ADEChallengeData2016: 2 training images and 1 of validation, 12x16 pixels."""
    base = root / "ADEChallengeData2016"
    for split, prefix, count in (("training", "train", 2), ("validation", "val", 1)):
        for kind in ("images", "annotations"):
            (base / kind / split).mkdir(parents=True)
        for number in range(1, count + 1):
            name = f"ADE_{prefix}_{number:08d}"
            Image.new("RGB", SIZE, (number, 0, 0)).save(base / "images" / split / f"{name}.jpg")
            Image.fromarray(raw_ids(number)).save(base / "annotations" / split / f"{name}.png")
    (base / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    (base / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return base


def raw_ids(number: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return ((np.arange(12 * 16).reshape(12, 16) + 50 * number) % 151).astype(np.uint8)


def open_ade20k(root: Path) -> RawDataset:
    return open_dataset(DataConfig(dataset="ade20k", root=str(root)))


def test_publishers_tree__splits_keys_and_shifted_ids(tmp_path: Path) -> None:
    base = make_ade20k(tmp_path)
    for root in (base, tmp_path):
        dataset = open_ade20k(root)
        assert dataset.splits() == ("train", "val")
        assert [sample.key for sample in dataset.samples("train")] == ["ADE_train_00000001", "ADE_train_00000002"]
        (val,) = dataset.samples("val")
        pair = dataset.read(val)
        raw = raw_ids(1).astype(int)
        np.testing.assert_array_equal(pair.label, np.where(raw == 0, 255, raw - 1))
        assert pair.image == (base / "images/validation/ADE_val_00000001.jpg").read_bytes()
    assert (len(dataset.class_names), len(dataset.palette)) == (150, 150)
    assert (dataset.class_names[0], dataset.class_names[149]) == ("wall", "flag")


def test_zip__same_samples_as_the_folder_without_unpacking(tmp_path: Path) -> None:
    base = make_ade20k(tmp_path / "plain")
    holder = tmp_path / "packed"
    holder.mkdir()
    with zipfile.ZipFile(holder / "ADEChallengeData2016.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(base.rglob("*")):
            archive.write(file, Path(base.name) / file.relative_to(base))
    plain = open_ade20k(base)
    for root in (holder, holder / "ADEChallengeData2016.zip"):
        packed = open_ade20k(root)
        assert packed.splits() == ("train", "val")
        for split in ("train", "val"):
            pairs = list(zip(plain.samples(split), packed.samples(split), strict=True))
            for one, other in pairs:
                assert one.key == other.key
                assert plain.read(one).image == packed.read(other).image
                np.testing.assert_array_equal(plain.read(one).label, packed.read(other).label)
    assert [file.name for file in holder.iterdir()] == ["ADEChallengeData2016.zip"]
    image = "ADEChallengeData2016.zip/ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    assert packed.samples("val")[0].image == f"{holder}/{image}"


def test_unknown_id_and_missing_partner__rejected(tmp_path: Path) -> None:
    base = make_ade20k(tmp_path)
    label = base / "annotations/training/ADE_train_00000001.png"
    Image.fromarray(np.full((12, 16), 151, dtype=np.uint8)).save(label)
    (base / "images/training/ADE_train_00000002.jpg").unlink()
    dataset = open_ade20k(base)
    first, second = dataset.samples("train")
    with pytest.raises(RejectedSampleError, match=r"holds label id 151, outside the class list \(1-150, 0 = unl"):
        dataset.read(first)
    with pytest.raises(RejectedSampleError, match=r"00000002\.jpg is missing: there is no such image"):
        dataset.read(second)


def test_wrong_tree__names_what_is_missing_and_the_layout(tmp_path: Path) -> None:
    base = make_ade20k(tmp_path)
    (base / "annotations/validation/ADE_val_00000001.png").unlink()
    (base / "annotations/validation").rmdir()
    with pytest.raises(UserError, match=r"has no folder annotations/validation; the ADE20K layout is ADEChallenge"):
        open_ade20k(base).splits()
    with pytest.raises(UserError, match=r"does not exist; set data\.root to the ADE20K folder"):
        open_ade20k(tmp_path / "nowhere").splits()


@pytest.mark.skipif("SEGVIT_DATA" not in os.environ, reason="SEGVIT_DATA does not name a folder with ade20k_sample/")
def test_real_samples__classes_are_those_of_object_info() -> None:
    root = Path(os.environ["SEGVIT_DATA"]) / "ade20k_sample"
    rows = [line.split("\t") for line in (root / "objectInfo150.txt").read_text().splitlines()[1:]]
    names = {int(row[0]): [name.strip() for name in row[-1].split(",")] for row in rows}
    dataset = open_ade20k(root)
    assert len(names) == 150
    for idx, synonyms in names.items():
        assert dataset.class_names[idx - 1] in synonyms, idx
    samples = dataset.samples("val")
    assert [sample.key for sample in samples] == [f"ADE_val_0000000{number}" for number in (1, 2, 3)]
    for sample in samples:
        pair = dataset.read(sample)
        raw = np.asarray(Image.open(root / "annotations/validation" / f"{sample.key}.png"))
        expected = {names[idx][0] for idx in np.unique(raw).tolist() if idx}
        found = {names[class_id + 1][0] for class_id in np.unique(pair.label).tolist() if class_id != 255}
        assert found == expected
        np.testing.assert_array_equal(pair.label == 255, raw == 0)
        with Image.open(root / "images/validation" / f"{sample.key}.jpg") as image:
            assert pair.label.shape == (image.height, image.width)
