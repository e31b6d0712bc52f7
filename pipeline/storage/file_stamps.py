"""What storage says about files without reading them: size, and a stamp that changes when the content may have."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from pipeline import storage

# What remote file systems call the things that change with a file's content; each kind has some of them.
_STAMPS = (
    *("ETag", "etag", "VersionId", "generation", "md5Hash", "crc32c", "content_md5", "checksum"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "created"),
)


# Times of files tick every few milliseconds: after a change this recent, the next one may leave the same time.
SETTLED_AFTER_NS = 20_000_000


class FileStamp(NamedTuple):
    """One file as storage lists it; an empty `stamp` means that storage tells nothing to rely on but the size."""

    num_bytes: int
    stamp: str


def file_stamps(uri: str, *, recursive: bool = False) -> dict[str, FileStamp]:
    """The files directly below the folder `uri` by name, from one listing; empty where there is no such folder.

    `recursive`: those in folders below it, too, by their path from `uri`.
    """
    if storage.is_local(uri):
        return _local_stamps(storage.local_path(uri), recursive)
    filesystem, folder = fsspec.core.url_to_fs(uri)
    # Listings are cached, and files may have changed since.
    filesystem.invalidate_cache()
    try:
        if recursive:
            entries = list(filesystem.find(folder, detail=True).values())
        else:
            entries = filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    prefix = f"{folder.rstrip('/')}/"
    return {
        entry["name"].partition(prefix)[2]: FileStamp(int(entry["size"] or 0), _stamp(entry))
        for entry in entries
        # Asked for a file, object stores list it as what lies below itself.
        if entry["type"] == "file" and prefix in entry["name"]
    }


def folder_bytes(uri: str) -> int:
    """Bytes of all files at or below `uri`; 0 where there is nothing."""
    return sum(stamp.num_bytes for stamp in file_stamps(uri, recursive=True).values())


def _local_stamps(folder: Path, recursive: bool) -> dict[str, FileStamp]:
    found = {}
    if folder.is_dir():
        settled_ns = time.time_ns() - SETTLED_AFTER_NS
        for file in folder.rglob("*") if recursive else folder.iterdir():
            if file.is_file():
                about = file.stat()
                stamp = f"{about.st_ino} {about.st_mtime_ns} {about.st_ctime_ns}"
                name = file.relative_to(folder).as_posix()
                found[name] = FileStamp(about.st_size, stamp if about.st_ctime_ns < settled_ns else "")
    return found


def _stamp(info: dict[str, Any]) -> str:
    known = {name: str(info[name]) for name in _STAMPS if info.get(name) is not None}
    return json.dumps(known, sort_keys=True) if known else ""
