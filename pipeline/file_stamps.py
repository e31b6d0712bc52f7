"""What storage says about files without reading them: size, and a stamp that changes when the content may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from pipeline import storage

# What remote file systems call the things that change with a file's content; each kind has some of them.
_STAMPS = (
    *("ETag", "etag", "VersionId", "generation", "md5Hash", "crc32c", "content_md5", "checksum"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "created"),
)


class FileStamp(NamedTuple):
    """One file as storage lists it; an empty `stamp` means that storage tells nothing but the size."""

    num_bytes: int
    stamp: str


def file_stamps(uri: str) -> dict[str, FileStamp]:
    """The files directly below the folder `uri` by name, from one listing; empty where there is no such folder."""
    if storage.is_local(uri):
        return _local_stamps(storage.local_path(uri))
    filesystem, folder = fsspec.core.url_to_fs(uri)
    # Listings are cached, and files may have changed since.
    filesystem.invalidate_cache()
    try:
        entries = filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    files = [entry for entry in entries if entry["type"] == "file"]
    return {entry["name"].rsplit("/", 1)[-1]: FileStamp(int(entry["size"] or 0), _stamp(entry)) for entry in files}


def _local_stamps(folder: Path) -> dict[str, FileStamp]:
    found = {}
    if folder.is_dir():
        for file in folder.iterdir():
            if file.is_file():
                about = file.stat()
                found[file.name] = FileStamp(about.st_size, f"{about.st_ino} {about.st_mtime_ns} {about.st_ctime_ns}")
    return found


def _stamp(info: dict[str, Any]) -> str:
    known = {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}
    return json.dumps(known, sort_keys=True) if known else ""
