"""Trees of files: folders, links, archives beside each other, Unicode forms, and few requests."""

from __future__ import annotations

import os
import pickle
import unicodedata
import zipfile
from pathlib import Path

import fsspec
import pytest

from pipeline.datasets.boundary import Boundary
from pipeline.datasets.tree import FileTree, list_tree
from pipeline.errors import UserError


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def pack(place: Path, *paths: str) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for path in paths:
            archive.writestr(path, path)
    return place


def test_files__nested_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    put(tmp_path, "images/b/2.jpg", "images/a.jpg", "images/.hidden/x.jpg", "images/b/._2.jpg", "labels/a.png")
    tree = FileTree(str(tmp_path))
    assert list(tree.files("images")) == ["a.jpg", "b/2.jpg"]
    assert tree.files("images")["b/2.jpg"].uri == f"{tmp_path}/images/b/2.jpg"
    assert tree.files("nowhere") == {}
    assert tree.has_folder("images")
    assert not tree.has_folder("images/a.jpg")
    entry = tree.file("labels/a.png")
    assert entry is not None
    assert tree.read(entry) == b"labels/a.png"
    assert tree.file("labels") is None


def test_wrappers__the_root_itself_comes_first(tmp_path: Path) -> None:
    put(tmp_path, "VOC/VOC2010/images/a.jpg", "VOC/VOC2010/list.txt")
    tree = FileTree(str(tmp_path), ["VOC/VOC2010", "VOC2010"])
    assert list(tree.files("images")) == ["a.jpg"]
    assert tree.file("list.txt") is not None
    put(tmp_path, "images/b.jpg")
    assert list(tree.files("images")) == ["a.jpg"]  # listed once
    assert list(FileTree(str(tmp_path), tree.wrappers).files("images")) == ["b.jpg"]


def test_links__followed_and_a_circle_ends(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "deep/x.jpg")
    put(tmp_path / "root", "images/a.jpg")
    disk = Boundary(str(tmp_path / "root"), [str(tmp_path / "elsewhere")])
    images = tmp_path / "root" / "images"
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "circle").symlink_to(images)
    (images / "b.jpg").symlink_to(images / "a.jpg")
    (images / "broken.jpg").symlink_to(tmp_path / "nothing")
    stamps = dict(list_tree(str(images), disk))
    assert sorted(stamps) == ["a.jpg", "b.jpg", "broken.jpg", "linked/deep/x.jpg"]
    assert stamps["b.jpg"] == stamps["a.jpg"]
    before = stamps["a.jpg"]
    os.utime(images / "a.jpg", (1, 1))
    assert dict(list_tree(str(images), disk))["a.jpg"] != before


def test_unicode__names_in_the_composed_form_and_files_as_they_are(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é.jpg")
    put(tmp_path, f"images/{decomposed}")
    tree = FileTree(str(tmp_path))
    ((name, entry),) = tree.files("images").items()
    assert name == "é.jpg"
    assert tree.read(entry) == f"images/{decomposed}".encode()
    put(tmp_path, "images/é.jpg")
    if len(list((tmp_path / "images").iterdir())) == 2:
        with pytest.raises(UserError, match="have the same name; keep one of the two"):
            FileTree(str(tmp_path)).files("images")


def test_unicode__a_name_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    try:
        put(tmp_path, os.fsdecode(b"images/\xff.jpg"))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(UserError, match=r"images/\\udcff\.jpg' has a name that is not UTF-8; rename it"):
        FileTree(str(tmp_path)).files("images")


def test_archives__beside_each_other_and_folders_win(tmp_path: Path) -> None:
    pack(tmp_path / "one.zip", "set/images/a.jpg", "set/images/b.jpg")
    pack(tmp_path / "two.ZIP", "labels/a.png")
    pack(tmp_path / "more.zip", "images/c.jpg")
    tree = FileTree(str(tmp_path))
    assert list(tree.files("images")) == ["a.jpg", "b.jpg", "c.jpg"]
    assert tree.files("images")["a.jpg"].uri == f"{tmp_path}/one.zip/set/images/a.jpg"
    assert tree.has_folder("labels")
    assert tree.read(tree.files("labels")["a.png"]) == b"labels/a.png"
    assert tree.file("images/c.jpg") is not None
    copy = pickle.loads(pickle.dumps(tree))
    assert len(pickle.dumps(copy)) < 500
    put(tmp_path, "images/plain.jpg")
    assert list(copy.files("images")) == ["plain.jpg"]


def test_archives__twice_the_same_is_an_error(tmp_path: Path) -> None:
    pack(tmp_path / "a.zip", "images/a.jpg")
    pack(tmp_path / "b.zip", "images/a.jpg")
    with pytest.raises(UserError, match=r"b\.zip/images/a\.jpg have the same name|a\.zip/images/a\.jpg have the same"):
        FileTree(str(tmp_path)).files("images")
    twice = pack(tmp_path / "c.zip", "x/images/a.jpg", "y/images/a.jpg")
    with pytest.raises(UserError, match=r"holds images twice, as x/images and as y/images; unpack the one"):
        FileTree(str(twice)).files("images")
    nested = pack(tmp_path / "d.zip", "images/a.jpg", "backup/images/old.jpg")
    assert list(FileTree(str(nested)).files("images")) == ["a.jpg"]


def test_remote__listed_without_a_request_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(50):
        memory.pipe(f"/tree/images/{number % 5}/{number:03d}.jpg", b"x" * number)
    calls: list[str] = []
    for name in ("info", "cat_file", "_open"):
        original = getattr(type(memory), name)

        def count(
            self: object, *args: object, original: object = original, name: str = name, **kwargs: object
        ) -> object:
            calls.append(name)
            return original(self, *args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(type(memory), name, count)
    files = FileTree("memory://tree").files("images")
    assert len(files) == 50
    assert next(iter(files)) == "0/000.jpg"
    assert files["1/001.jpg"].stamp.startswith("1:")
    assert len(calls) < 15
    assert FileTree("memory://tree").read(files["1/001.jpg"]) == b"x"
