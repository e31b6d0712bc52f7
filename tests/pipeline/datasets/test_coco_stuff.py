"""COCO-Stuff 10K: .mat annotations and lists as published, and the converted PNG files of the field."""

from __future__ import annotations

import json
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.errors import UserError

NAMES = {
    "train": ["COCO_train2014_000000000077", "COCO_train2014_000000000025"],
    "test": ["COCO_train2014_000000000349"],
}
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
USED = [raw for raw in range(1, 183) if raw not in UNUSED]


def raw_map() -> NDArray[np.uint16]:
    """Every id the publisher uses, and 0, on 12x15 pixels."""
    return np.array([0] * (180 - len(USED)) + USED, dtype=np.uint16).reshape(12, 15)


def expected() -> NDArray[np.int64]:
    return np.array([[USED.index(raw) if raw else 255 for raw in row] for row in raw_map().tolist()])


def make_coco_stuff(root: Path) -> Path:
    """The tree of cocostuff-10k-v1.1.zip."""
    for folder in ("images", "annotations", "imageLists"):
        (root / folder).mkdir(parents=True)
    for split, names in NAMES.items():
        (root / "imageLists" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            Image.new("RGB", (15, 12), (len(split), 7, int(name[-2:]))).save(root / "images" / f"{name}.jpg")
            content = {
                "S": raw_map(),
                "captions": np.array(["a cat"], dtype=object),
                "regionMapStuff": np.zeros((12, 15), np.uint16),
            }
            scipy.io.savemat(root / "annotations" / f"{name}.mat", content, do_compression=True)
    (root / "imageLists" / "all.txt").write_text("".join(f"{name}\n" for names in NAMES.values() for name in names))
    (root / "cocostuff-labels.txt").write_text("0: unlabeled\n")
    return root


def make_converted(root: Path) -> Path:
    """What the field's converters leave: folders by split, and the test maps with or without their suffix."""
    converted = np.where(expected() == 255, 0, expected() + 1).astype(np.uint8)
    names = {"train2014": [*NAMES["train"]], "test2014": ["COCO_train2014_000000000349", "COCO_train2014_000000000357"]}
    for folder, stems in names.items():
        for kind in ("images", "annotations"):
            (root / kind / folder).mkdir(parents=True)
        for number, stem in enumerate(stems):
            Image.new("RGB", (15, 12), (number, 0, 9)).save(root / "images" / folder / f"{stem}.jpg")
            suffix = "" if folder == "test2014" and number else "_labelTrainIds"
            Image.fromarray(converted).save(root / "annotations" / folder / f"{stem}{suffix}.png")
    return root


def open_coco(root: Path) -> RawDataset:
    return open_dataset(DataConfig(dataset="coco_stuff10k", root=str(root)))


def test_facts__every_used_id_has_its_class_in_order() -> None:
    facts = json.loads(resources.files("pipeline.datasets").joinpath("coco_stuff10k.json").read_text())
    assert [facts["raw_id_to_class"][str(raw)] for raw in USED] == list(range(171))
    assert len(facts["raw_id_to_class"]) == len(facts["classes"]) == 171


def test_publishers_tree__lists_and_mat_files(tmp_path: Path) -> None:
    dataset = open_coco(make_coco_stuff(tmp_path))
    assert dataset.splits() == ("train", "val")
    # In the list's own order.
    assert [sample.key for sample in dataset.samples("train")] == NAMES["train"]
    assert [sample.key for sample in dataset.samples("val")] == NAMES["test"]
    for split in ("train", "val"):
        for sample in dataset.samples(split):
            pair = dataset.read(sample)
            np.testing.assert_array_equal(pair.label, expected())
            assert pair.image == (tmp_path / "images" / f"{sample.key}.jpg").read_bytes()
    assert (dataset.class_names[0], dataset.class_names[170]) == ("person", "wood")


def test_zip__as_published(tmp_path: Path) -> None:
    base = make_coco_stuff(tmp_path / "cocostuff-10k-v1.1")
    with zipfile.ZipFile(tmp_path / "cocostuff-10k-v1.1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(base.rglob("*")):
            archive.write(file, file.relative_to(base))
    dataset = open_coco(tmp_path / "cocostuff-10k-v1.1.zip")
    assert dataset.splits() == ("train", "val")
    assert [sample.key for sample in dataset.samples("train")] == NAMES["train"]
    np.testing.assert_array_equal(dataset.read(dataset.samples("val")[0]).label, expected())


def test_converted_png__ids_from_one_and_zero_ignored(tmp_path: Path) -> None:
    dataset = open_coco(make_converted(tmp_path))
    assert dataset.splits() == ("train", "val")
    assert [sample.key for sample in dataset.samples("train")] == sorted(NAMES["train"])
    assert len(dataset.samples("val")) == 2
    for split in ("train", "val"):
        for sample in dataset.samples(split):
            np.testing.assert_array_equal(dataset.read(sample).label, expected())


def test_listed_but_absent_and_unused_id__rejected(tmp_path: Path) -> None:
    root = make_coco_stuff(tmp_path)
    (root / "annotations" / f"{NAMES['train'][0]}.mat").unlink()
    scipy.io.savemat(root / "annotations" / f"{NAMES['train'][1]}.mat", {"S": np.full((12, 15), 12, np.uint16)})
    dataset = open_coco(root)
    missing, unknown = dataset.samples("train")
    with pytest.raises(RejectedSampleError, match=r"077\.mat is missing: there is no such label map"):
        dataset.read(missing)
    with pytest.raises(RejectedSampleError, match=r"025\.mat holds label id 12, outside the class list \(the publ"):
        dataset.read(unknown)


def test_missing_list__one_clear_error(tmp_path: Path) -> None:
    root = make_coco_stuff(tmp_path)
    (root / "imageLists/test.txt").unlink()
    with pytest.raises(UserError, match=r"has no imageLists/test\.txt; the CocoStuff10K layout is images/"):
        open_coco(root).splits()
    (root / "imageLists/test.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match=r"imageLists/test\.txt holds 'a' twice; remove one"):
        open_coco(root).splits()
