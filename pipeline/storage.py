"""Reading and publishing files on any fsspec location; a local folder is a plain path.

Publishing means: written under a temporary name, then renamed. A reader sees the whole file or none.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

PARTIAL = ".partial"
# Longer files are no picture, list or record; they are opened and read in parts.
MAX_READ_BYTES = 1 << 29


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    return cast("tuple[fsspec.AbstractFileSystem, str]", fsspec.core.url_to_fs(uri))


def _fresh_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Without what it remembers of listings: other processes write to the same place."""
    filesystem, path = _filesystem(uri)
    filesystem.invalidate_cache()
    return filesystem, path


def is_local(uri: str) -> bool:
    """Whether `uri` is on this machine's file system."""
    return isinstance(_filesystem(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with path `parts` below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(uri: str) -> Path:
    """The path of a local `uri`; raises ValueError for a remote one."""
    filesystem, path = _filesystem(uri)
    if not isinstance(filesystem, LocalFileSystem):
        raise ValueError(f"{uri} is not on the local file system; copy it to a local folder first")
    return Path(path)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = _fresh_filesystem(uri)
    return bool(filesystem.exists(path))


def file_size(uri: str) -> int:
    """Bytes of the file at `uri`; raises FileNotFoundError."""
    filesystem, path = _fresh_filesystem(uri)
    return int(filesystem.size(path))


def list_names(uri: str) -> list[str]:
    """Names of the files and folders directly below `uri`, sorted; empty where there is no such folder."""
    filesystem, path = _fresh_filesystem(uri)
    if not filesystem.exists(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False))


def open_uri(uri: str) -> IO[bytes]:
    """A binary file opened for reading; raises FileNotFoundError."""
    filesystem, path = _filesystem(uri)
    return cast("IO[bytes]", filesystem.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    """The whole content of the file at `uri`; raises OSError for one of more than MAX_READ_BYTES."""
    with open_uri(uri) as file:
        if file.seek(0, os.SEEK_END) > MAX_READ_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_READ_BYTES >> 20} MiB", uri)
        file.seek(0)
        return file.read()


def read_json(uri: str) -> Any:
    """The parsed JSON file at `uri`."""
    return json.loads(read_bytes(uri))


def file_digest(uri: str) -> str:
    """sha256 of the file at `uri`, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open_uri(uri) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def publishing(uri: str) -> Iterator[IO[bytes]]:
    """A binary file to write; it appears at `uri` when the block ends well, and nowhere when it does not."""
    filesystem, path = _filesystem(uri)
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
    filesystem, folder = _filesystem(uri)
    for name in names:
        with suppress(FileNotFoundError):
            filesystem.rm_file(f"{folder}/{name}")


def publish_folder(local_folder: str | Path, uri: str) -> None:
    """Copy a finished local folder to `uri`; on local disks it appears by one rename, replacing what was there."""
    filesystem, path = _filesystem(uri)
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


def fetch_folder(uri: str, local_folder: str | Path) -> Path:
    """A local copy of the folder at `uri`; the folder itself when it already is local."""
    filesystem, path = _filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    filesystem.get(path.rstrip("/") + "/", str(local_folder).rstrip("/") + "/", recursive=True)
    return Path(local_folder)


def fetch_file(uri: str, local_folder: str | Path) -> Path:
    """A local copy of the file at `uri`; the file itself when it already is local."""
    filesystem, path = _filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    copy = Path(local_folder) / path.rsplit("/", 1)[-1]
    filesystem.get_file(path, str(copy))
    return copy
