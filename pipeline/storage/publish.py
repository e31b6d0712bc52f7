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

from fsspec.implementations.local import LocalFileSystem

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


def publish_folder(local_folder: str | Path, uri: str) -> None:
    """Copy a finished local folder to `uri`; on local disks it appears by one rename, replacing what was there."""
    filesystem, path = filesystem_of(uri)
    if isinstance(filesystem, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        try:
            shutil.copytree(local_folder, partial)
            if target.exists():
                retired = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
                os.replace(target, retired)
                os.replace(partial, target)
                shutil.rmtree(retired)
            else:
                os.replace(partial, target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _first_error(error) from error
    else:
        filesystem.put(str(local_folder).rstrip("/") + "/", path.rstrip("/") + "/", recursive=True)


def _first_error(error: BaseException) -> BaseException:
    """What copytree's list of all files that could not be copied begins with, as the operating system said it."""
    if not isinstance(error, shutil.Error) or not error.args or not error.args[0]:
        return error
    _, target, message = error.args[0][0]
    number = next((code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(code) in message), None)
    return OSError(number, os.strerror(number), target) if number is not None else error
