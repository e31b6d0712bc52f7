"""Nothing outside of the data root is read: by links, lists, annotations, classes files or the configuration."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig
from pipeline.config.file import parse_config
from pipeline.datasets import open_dataset
from pipeline.datasets.boundary import Boundary, OutsideError
from pipeline.datasets.raw import RawSample, RejectedSampleError
from pipeline.datasets.recognise import recognise
from pipeline.errors import UserError
from pipeline.evaluation.image_sources import list_images
from pipeline.shards.prepare import prepare_shards
from tests.pipeline.datasets.layouts import put

LENIENT = {"classes_without_pixels": "allow"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of three images, and one that belongs to nobody's data beside it."""
    root = tmp_path / "data"
    for number, split in enumerate(("train", "train", "val")):
        put(root / f"images/{split}/f{number}.png", root / f"labels/{split}/f{number}.png", number)
    (root / "classes.txt").write_text("ground\nthing\n")
    put(tmp_path / "secret/images/train/x.png", tmp_path / "secret/labels/train/x.png", 5)
    return root


def config_of(root: Path, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "folder", "root": str(root), **LENIENT, **settings})


def read_all(config: DataConfig) -> list[str]:
    """Keys of the samples that were read."""
    dataset = open_dataset(config)
    samples = [sample for split in dataset.splits() for sample in dataset.samples(split)]
    for sample in samples:
        dataset.read(sample)
    return [sample.key for sample in samples]


def link_image(root: Path) -> None:
    (root / "images/train/x.png").symlink_to(root.parent / "secret/images/train/x.png")
    shutil.copy(root.parent / "secret/labels/train/x.png", root / "labels/train")


def test_linked_image__is_rejected_and_names_where_it_leads(root: Path) -> None:
    link_image(root)
    with pytest.raises(RejectedSampleError, match=r"x.png leads out of .*data, to .*secret.*data.linked_folders"):
        read_all(config_of(root))
    settings = {"on_bad_sample": "quarantine", "max_quarantined_fraction": 1.0}
    shards = prepare_shards(config_of(root, **settings), str(root.parent / "out"), progress=lambda line: None)
    assert (shards.num_quarantined, shards.splits["train"].num_samples) == (1, 2)


def test_linked_image__is_read_where_its_folder_is_named(root: Path) -> None:
    link_image(root)
    assert "x" in read_all(config_of(root, linked_folders=[str(root.parent / "secret")]))


def test_linked_folders__are_whole_paths_and_no_part_of_the_fingerprint() -> None:
    with pytest.raises(ValueError, match=r"linked_folders holds 'disk', which is no absolute path; write it from / on"):
        config_of(Path("/x"), linked_folders=["disk"])
    with pytest.raises(UserError, match=r"data.linked_folders: .*no absolute path"):
        parse_config({"data": {"dataset": "folder", "linked_folders": ["disk"]}})


@pytest.mark.parametrize("folder", ["images", "images/train", "labels/train", "splits"])
def test_linked_folder__is_refused(root: Path, folder: str) -> None:
    elsewhere = root.parent / "elsewhere"
    if (root / folder).exists():
        shutil.move(root / folder, elsewhere)
    else:
        elsewhere.mkdir()
        (elsewhere / "train.txt").write_text("train/f0\n")
    (root / folder).symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"leads out of .*data, to .*elsewhere; put it below, or name a folder"):
        read_all(config_of(root))
    with pytest.raises(UserError, match="leads out of"):
        recognise(str(root))
    assert read_all(config_of(root, linked_folders=[str(root.parent)]))[:2] in (["f0", "f1"], ["train%2Ff0"])


def test_linked_root__is_where_it_leads(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    (root / "images/train/again.png").symlink_to(root / "images/train/f0.png")
    shutil.copy(root / "labels/train/f0.png", root / "labels/train/again.png")
    assert sorted(read_all(config_of(root.parent / "link"))) == ["again", "f0", "f1", "f2"]


@pytest.mark.parametrize("path", ["../outside.txt", "link.txt"])
def test_classes__outside_of_the_root_are_not_read(root: Path, path: str) -> None:
    (root.parent / "outside.txt").write_text("ground\nthing\n")
    (root / "link.txt").symlink_to(root.parent / "outside.txt")
    with pytest.raises(UserError, match=r"leads out of .*data, to .*outside.txt"):
        read_all(config_of(root, folder={"classes": path}))


def test_archive__that_is_a_link_out_is_not_opened(root: Path) -> None:
    with zipfile.ZipFile(root.parent / "outside.zip", "w") as archive:
        archive.write(root / "classes.txt", "classes.txt")
    shutil.rmtree(root)
    root.mkdir()
    (root / "linked.zip").symlink_to(root.parent / "outside.zip")
    with pytest.raises(UserError, match=r"linked.zip leads out of .*data, to .*outside.zip"):
        read_all(config_of(root))


def test_link__made_after_the_listing_is_refused_when_it_is_read(root: Path) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(config_of(root))))
    sample = dataset.samples("train")[0]
    image = Path(sample.image)
    image.unlink()
    image.symlink_to(root.parent / "secret/images/train/x.png")
    with pytest.raises(RejectedSampleError, match="leads out of"):
        dataset.read(sample)


@pytest.mark.parametrize("line", ["../../secret/images/train/x", "/etc/passwd", "a::file:///etc/passwd", "..\\..\\x"])
def test_list__that_leads_out_is_refused(root: Path, line: str) -> None:
    (root / "splits").mkdir()
    (root / "splits/train.txt").write_text(f"train/f0\n{line}\n")
    (root / "splits/val.txt").write_text("val/f2\n")
    with pytest.raises(UserError, match=r"train.txt names .*, a path that leads out of the data set; correct or rem"):
        read_all(config_of(root))


@pytest.mark.parametrize("name", ["../secret/images/train/x.png", ".hidden/x.png", "a::file:///etc/passwd", "a\0b"])
def test_coco__file_names_that_lead_out(root: Path, name: str) -> None:
    (root / "images/.hidden").symlink_to(root.parent / "secret/images/train")
    content = {
        "images": [{"id": one, "file_name": one, "height": 8, "width": 12} for one in (name, "b")],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "a.json").write_text(json.dumps(content))
    settings = {"annotations": "a.json", "val_fraction": 0.5}
    config = DataConfig.model_validate({"dataset": "coco", "root": str(root), "coco": settings})
    with pytest.raises((UserError, RejectedSampleError), match=r"leads out of|is missing: there is no such image"):
        read_all(config)


def test_coco__a_hidden_link_is_not_followed(root: Path) -> None:
    (root / "images/.hidden").symlink_to(root.parent / "secret/images/train")
    sample = RawSample("x", str(root / "images/.hidden/x.png"), str(root / "labels/train/f0.png"), "")
    with pytest.raises(RejectedSampleError, match=r"leads out of .*, to .*secret"):
        open_dataset(config_of(root)).read(sample)


def test_name__that_storage_takes_for_another_location(root: Path) -> None:
    put(root / "images/train/a::b.png", root / "labels/train/a::b.png", 3)
    with pytest.raises(UserError, match=r"a::b.png has '::' in its name, which storage takes for another location"):
        read_all(config_of(root))


def test_predict__links_out_of_a_folder_or_a_pattern_are_not_read(root: Path) -> None:
    link_image(root)
    for source in (str(root), f"{root}/**/*.png"):
        found = {image.path.removeprefix("images/train/"): image for image in list_images([source])}
        with pytest.raises(OutsideError, match="leads out of"):
            found["x.png"].read()
        assert found["f0.png"].read().startswith(b"\x89PNG")
    # Named itself, it is what was asked for.
    (one,) = list_images([str(root / "images/train/x.png")])
    assert one.read().startswith(b"\x89PNG")


def test_boundary__a_folder_of_the_same_beginning_is_another(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data2").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "data2")
    boundary = Boundary(str(tmp_path / "data"))
    assert boundary.end_of(str(tmp_path / "data/link")) == str(tmp_path / "data2")
    assert boundary.end_of(str(tmp_path / "data")) is None
    assert Boundary("memory://data").end_of("memory://other") is None


def test_links__to_themselves_are_no_files(root: Path) -> None:
    (root / "images/train/loop.png").symlink_to(root / "images/train/loop.png")
    with pytest.raises(RejectedSampleError, match=r"loop.png cannot be read|loop.png is missing"):
        read_all(config_of(root))
    (root / "classes.txt").unlink()
    (root / "classes.txt").symlink_to("classes.txt")
    with pytest.raises(UserError, match=r"has no classes.txt"):
        read_all(config_of(root))
