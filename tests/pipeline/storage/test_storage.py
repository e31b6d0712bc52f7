from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.storage import uri


def test_publishing__failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    storage.publish_bytes(str(target), b"old")

    def fail_half_way() -> None:
        with storage.publishing(str(target)) as file:
            file.write(b"half")
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_publish_folder__replaces_as_a_whole(tmp_path: Path) -> None:
    for name, file in (("one", "a.txt"), ("two", "b.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(name)
    storage.publish_folder(tmp_path / "one", str(tmp_path / "out"))
    storage.publish_folder(tmp_path / "two", str(tmp_path / "out"))
    assert storage.list_names(str(tmp_path / "out")) == ["b.txt"]
    assert storage.list_names(str(tmp_path)) == ["one", "out", "two"]


def test_file_digest__is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"segvit" * 300_000)
    assert storage.file_digest(str(tmp_path / "x")) == hashlib.sha256(b"segvit" * 300_000).hexdigest()


def test_remote_location__publish_read_fetch(tmp_path: Path) -> None:
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "src" / "sub" / "x.txt").write_text("x")
    folder = "memory://bucket/folder"
    storage.publish_folder(tmp_path / "src", folder)
    storage.publish_json(storage.join(folder, "y.json"), {"b": 1, "a": [2]})
    assert storage.read_json(storage.join(folder, "y.json")) == {"a": [2], "b": 1}
    fetched = storage.fetch_folder(folder, tmp_path / "copy")
    assert (fetched / "sub" / "x.txt").read_text() == "x"
    assert storage.fetch_file(storage.join(folder, "y.json"), tmp_path).name == "y.json"
    with pytest.raises(ValueError, match="not on the local file system"):
        storage.local_path(folder)


def test_read_bytes__refuses_what_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uri, "MAX_READ_BYTES", 2 << 20)
    for size in (2 << 20, (2 << 20) + 1):
        (tmp_path / str(size)).touch()
        os.truncate(tmp_path / str(size), size)
    assert storage.read_bytes(str(tmp_path / str(2 << 20))) == bytes(2 << 20)
    with pytest.raises(OSError, match=r"larger than 2 MiB"):
        storage.read_bytes(str(tmp_path / str((2 << 20) + 1)))


def test_remove_files__those_that_are_there(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    storage.remove_files(str(tmp_path), ["a", "missing"])
    assert storage.list_names(str(tmp_path)) == ["b"]
