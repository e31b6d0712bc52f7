"""Folders that are published while others publish and read the same one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import storage
from pipeline.storage import publish
from pipeline.storage.exchange import exchange_names

NAMES = ("a.txt", "b.txt", "sub/c.txt", "z.txt")


def make_folder(folder: Path, text: str, names: tuple[str, ...] = NAMES) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def publish_often(tmp_path: Path, times: int, read: Callable[[Path], None]) -> list[BaseException]:
    """Four threads publish one folder, each its own content, while two more read it; what went wrong."""
    target = tmp_path / "out" / "folder"
    sources = [make_folder(tmp_path / f"source{index}", str(index) * 1000) for index in range(4)]
    storage.publish_folder(sources[0], str(target))
    wrong: list[BaseException] = []
    ended = threading.Event()

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                wrong.append(error)

        return run

    def write(source: Path) -> None:
        for _ in range(times):
            storage.publish_folder(source, str(target))

    def read_until_end() -> None:
        while not ended.is_set():
            read(target)

    writers = [threading.Thread(target=guarded(partial(write, source))) for source in sources]
    readers = [threading.Thread(target=guarded(read_until_end)) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for writer in writers:
        writer.join()
    ended.set()
    for reader in readers:
        reader.join()
    texts = {(target / name).read_text() for name in NAMES}
    assert len(texts) == 1, "the folder that was left is of several"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["folder"]
    return wrong


def read_all(folder: Path) -> None:
    for name in NAMES:
        text = (folder / name).read_text()
        assert len(text) == 1000, f"{name} has {len(text)} characters"
        assert len(set(text)) == 1


def test_publish_folder__at_once_and_read_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    if not exchange_names(tmp_path / "x", tmp_path / "y"):
        pytest.skip("this file system cannot exchange two names")
    assert publish_often(tmp_path, 100, read_all) == []


def test_publish_folder__at_once_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "exchange_names", lambda _one, _other: False)
    assert publish_often(tmp_path, 50, lambda _folder: time.sleep(0.01)) == []


def test_exchange_names__of_what_is_missing_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("x")
    assert not exchange_names(tmp_path / "here", tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_publish_folder__to_an_object_store_the_file_that_counts_is_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "memory://publish-folder/out"
    storage.publish_folder(make_folder(tmp_path / "old", "old", (*NAMES, "gone.txt")), uri, last="b.txt")
    calls: list[str] = []
    put, remove = MemoryFileSystem.put_file, MemoryFileSystem.rm_file

    def put_file(self: MemoryFileSystem, local: str, remote: str, *rest: Any, **named: Any) -> None:
        calls.append(f"put {remote.rpartition('out/')[2]}")
        put(self, local, remote, *rest, **named)

    def rm_file(self: MemoryFileSystem, path: str) -> None:
        calls.append(f"remove {path.rpartition('out/')[2]}")
        remove(self, path)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", rm_file)
    storage.publish_folder(make_folder(tmp_path / "new", "new"), uri, last="b.txt")
    assert calls == ["remove b.txt", "put a.txt", "put sub/c.txt", "put z.txt", "put b.txt", "remove gone.txt"]
    assert {storage.read_bytes(storage.join(uri, name)) for name in NAMES} == {b"new"}
