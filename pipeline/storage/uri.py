"""Reading files and folders on any fsspec location; a local folder is a plain path."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage.json_text import parse_json

# Longer files are no picture, list or record; they are opened and read in parts.
MAX_READ_BYTES = 1 << 29


def filesystem_of(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `uri`, and the path in it."""
    return cast("tuple[fsspec.AbstractFileSystem, str]", fsspec.core.url_to_fs(uri))


def _fresh_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Without what it remembers of listings: other processes write to the same place."""
    filesystem, path = filesystem_of(uri)
    filesystem.invalidate_cache()
    return filesystem, path


def is_local(uri: str) -> bool:
    """Whether `uri` is on this machine's file system."""
    return isinstance(filesystem_of(uri)[0], LocalFileSystem)


def join(uri: str, *parts: str) -> str:
    """`uri` with path `parts` below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def local_path(uri: str) -> Path:
    """The path of a local `uri`; raises ValueError for a remote one."""
    filesystem, path = filesystem_of(uri)
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
    filesystem, path = filesystem_of(uri)
    return cast("IO[bytes]", filesystem.open(path, "rb"))


def read_bytes(uri: str) -> bytes:
    """The whole content of the file at `uri`; raises OSError for one of more than MAX_READ_BYTES."""
    with open_uri(uri) as file:
        if file.seek(0, os.SEEK_END) > MAX_READ_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MAX_READ_BYTES >> 20} MiB", uri)
        file.seek(0)
        return file.read()


def read_json(uri: str) -> Any:
    """The parsed JSON file at `uri`; raises ValueError for what is none, OSError where it cannot be read."""
    return parse_json(read_bytes(uri))


def file_digest(uri: str) -> str:
    """sha256 of the file at `uri`, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open_uri(uri) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_folder(uri: str, local_folder: str | Path) -> Path:
    """A local copy of the folder at `uri`; the folder itself when it already is local."""
    filesystem, path = filesystem_of(uri)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    filesystem.get(path.rstrip("/") + "/", str(local_folder).rstrip("/") + "/", recursive=True)
    return Path(local_folder)


def fetch_file(uri: str, local_folder: str | Path) -> Path:
    """A local copy of the file at `uri`; the file itself when it already is local."""
    filesystem, path = filesystem_of(uri)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    copy = Path(local_folder) / path.rsplit("/", 1)[-1]
    filesystem.get_file(path, str(copy))
    return copy
