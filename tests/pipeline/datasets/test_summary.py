"""What preflight asks of a raw data set: counted from its listing, no image read, nothing listed twice."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import DataConfig, DigitsConfig, FolderConfig
from pipeline.datasets import archive, tree
from pipeline.datasets.boundary import Boundary
from pipeline.datasets.summary import SourceSummary, describe_source
from pipeline.errors import UserError

SIZES = {"train": (100, 200, 300), "val": (40, 60)}


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """CamVid's layout of files that are no images at all."""
    root = tmp_path / "camvid"
    for split, sizes in SIZES.items():
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
            for number, size in enumerate(sizes):
                (root / folder / f"{number}.png").write_bytes(b"x" * size)
    return root


def summary_of(root: Path | str, **settings: object) -> SourceSummary:
    return describe_source(DataConfig.model_validate({"dataset": "camvid", "root": str(root), **settings}))


def test_describe__counts_and_bytes_of_a_folder(camvid: Path) -> None:
    found = summary_of(camvid)
    assert (found.name, len(found.class_names), found.num_colours) == ("camvid", 11, 11)
    assert (found.splits, found.num_samples, found.num_bytes) == (("train", "val"), {"train": 3, "val": 2}, 700)
    assert summary_of(camvid, max_samples_per_split=1).num_bytes == 200 + 50
    # How small images get is known when they are read.
    assert summary_of(camvid, max_long_side=64).num_bytes is None


def note_listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of folders that are listed from now on."""
    listed: list[str] = []
    original = tree.list_tree

    def list_tree(uri: str, boundary: Boundary) -> Iterator[tuple[str, str]]:
        listed.append(Path(uri).name)
        return original(uri, boundary)

    monkeypatch.setattr(tree, "list_tree", list_tree)
    return listed


def test_describe__reads_no_file_and_lists_each_folder_once(camvid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = note_listings(monkeypatch)
    monkeypatch.setattr(storage, "open_uri", lambda uri: pytest.fail(f"{uri} was read"))
    summary_of(camvid)
    assert sorted(listed) == ["train", "trainannot", "val", "valannot"]


def test_describe__own_folder_is_listed_once_though_lists_and_splits_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("images/a.jpg", "images/b.jpg", "labels/a.png", "labels/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    listed = note_listings(monkeypatch)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("a.jpg\n")
    (tmp_path / "splits" / "val.txt").write_text("b\n")
    found = describe_source(DataConfig(dataset="folder", root=str(tmp_path), folder=FolderConfig()))
    assert (found.class_names, found.num_samples, found.num_bytes) == (("cat", "dog"), {"train": 1, "val": 1}, 10)
    assert sorted(listed) == ["images", "labels", "splits"]


def test_describe__archive_by_its_directory(camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "camvid.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(camvid.rglob("*.png")):
            packed.write(file, file.relative_to(camvid))
    monkeypatch.setattr(archive, "read_extent", lambda extent: pytest.fail(f"{extent} was read"))
    assert summary_of(tmp_path / "camvid.zip") == summary_of(camvid)


def test_describe__remote_folder_is_not_listed(camvid: Path) -> None:
    for file in camvid.rglob("*.png"):
        storage.publish_bytes(f"memory://described/{file.relative_to(camvid)}", file.read_bytes())
    found = summary_of("memory://described")
    assert (found.splits, found.num_samples, found.num_bytes) == (("train", "val"), {}, None)


def test_describe__digits_are_counted_and_not_composed() -> None:
    found = describe_source(DataConfig(dataset="digits", digits=DigitsConfig(num_train=7, num_val=3)))
    assert (found.class_names[-1], found.num_colours) == ("background", 11)
    assert (found.num_samples, found.num_bytes) == ({"train": 7, "val": 3}, None)


def test_describe__what_is_wrong_with_the_root(camvid: Path) -> None:
    with pytest.raises(UserError, match=r"data root .*/none does not exist; set data\.root to the CamVid folder"):
        summary_of(camvid / "none")
    with pytest.raises(UserError, match=r"dataset camvid needs data\.root, the folder or archive that holds it"):
        describe_source(DataConfig(dataset="camvid"))
    (camvid / "valannot").rename(camvid / "elsewhere")
    with pytest.raises(UserError, match=r"has no folder valannot; the CamVid layout is \{train,val\}/\*\.png with"):
        summary_of(camvid)
    (camvid / "elsewhere").rename(camvid / "valannot")
    for folder in ("val", "valannot"):
        for file in (camvid / folder).iterdir():
            file.unlink()
    with pytest.raises(UserError, match=r"dataset camvid has no images in split 'val' below .*; check data\.root"):
        summary_of(camvid)
