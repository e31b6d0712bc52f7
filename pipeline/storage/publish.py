"""Publishing files and folders: written under a temporary name, then renamed. A reader sees the whole or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage.exchange import exchange_names
from pipeline.storage.uri import filesystem_of

PARTIAL = ".partial"


@contextmanager
def publishing(uri: str) -> Iterator[IO[bytes]]:
    """A binary file to write; it appears at `uri` when the block ends well, and nowhere when it does not."""
    filesystem, path = filesystem_of(uri)
    partial = f"{path}.{uuid.uuid4().hex[:8]}{PARTIAL}"
    local = isinstance(filesystem, LocalFileSystem)
    if local:
        filesystem.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with filesystem.open(partial, "wb") as file:
            yield cast("IO[bytes]", file)
            file.flush()
            if local:
                os.fsync(file.fileno())
        if local:
            os.replace(partial, path)
        else:
            filesystem.mv(partial, path)
    except BaseException as error:
        if filesystem.exists(partial):
            filesystem.rm(partial)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # A full disk, told by a write, names no file.
            error.filename = uri
        raise


def publish_bytes(uri: str, data: bytes) -> None:
    """Write `data` to `uri`, whole or not at all."""
    with publishing(uri) as file:
        file.write(data)


def publish_json(uri: str, value: Any) -> None:
    """Write `value` as JSON with sorted keys to `uri`, whole or not at all."""
    publish_bytes(uri, (json.dumps(value, sort_keys=True, indent=1) + "\n").encode())


def remove_files(uri: str, names: Iterable[str]) -> None:
    """Remove the files `names` below `uri` that are there."""
    filesystem, folder = filesystem_of(uri)
    for name in names:
        with suppress(FileNotFoundError):
            filesystem.rm_file(f"{folder}/{name}")


def publish_folder(local_folder: str | Path, uri: str, *, last: str | None = None) -> None:
    """Copy a finished local folder to `uri`, in place of what is there.

    On a local disk the path names one whole folder at every instant, the former or the new one, and of several that
    publish at once the last one wins; a reader that goes from file to file meanwhile may see some of each. An object
    store knows no folders: the file `last`, by which readers know that all is there, is removed first and comes last.
    """
    filesystem, path = filesystem_of(uri)
    if isinstance(filesystem, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        try:
            shutil.copytree(local_folder, partial)
            _replace_folder(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _first_error(error) from error
        # What was there before, if anything.
        shutil.rmtree(partial, ignore_errors=True)
    else:
        _upload_folder(Path(local_folder), filesystem, path.rstrip("/"), last)


def _replace_folder(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`; afterwards `partial` names what was there, or nothing."""
    while True:
        try:
            # Onto nothing, or an empty folder.
            os.replace(partial, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if exchange_names(partial, target):
            return
        # Some file systems (NFS) cannot: for a moment there is no folder, and another may put one there.
        retired = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        with suppress(FileNotFoundError):
            os.replace(target, retired)
            shutil.rmtree(retired, ignore_errors=True)


def _upload_folder(folder: Path, filesystem: AbstractFileSystem, path: str, last: str | None) -> None:
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    filesystem.invalidate_cache()
    before = set(filesystem.find(path)) if filesystem.exists(path) else set()
    if last is not None and f"{path}/{last}" in before:
        filesystem.rm_file(f"{path}/{last}")
    for name in sorted(files, key=lambda name: (name == last, name)):
        filesystem.put_file(str(files[name]), f"{path}/{name}")
    for stale in before - {f"{path}/{name}" for name in files} - {f"{path}/{last}"}:
        with suppress(FileNotFoundError):
            filesystem.rm_file(stale)


def _first_error(error: BaseException) -> BaseException:
    """What copytree's list of all files that could not be copied begins with, as the operating system said it."""
    if not isinstance(error, shutil.Error) or not error.args or not error.args[0]:
        return error
    _, target, message = error.args[0][0]
    number = next((code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(code) in message), None)
    return OSError(number, os.strerror(number), target) if number is not None else error
