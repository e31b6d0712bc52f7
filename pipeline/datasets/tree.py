"""The files of a raw data set, wherever they lie: a folder, an archive, or a folder that holds the archives.

Any fsspec location will do. A tree is listed once, folder by folder and not file by file.
"""

from __future__ import annotations

import errno
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from pipeline import storage
from pipeline.datasets import archive
from pipeline.datasets.archive import Extent, ExtentError, Member
from pipeline.datasets.boundary import Boundary
from pipeline.errors import UserError

NO_FILE = "none"  # the stamp of what is listed and is none that may be read
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


class Entry(NamedTuple):
    """One file of a tree."""

    uri: str  # as the user knows it; a member of an archive is `<archive>/<path in it>`
    stamp: str
    extents: tuple[Extent, ...] = ()  # where it lies, or its parts, if inside another file

    def require_file(self) -> None:
        """Raise UserError for a device, a pipe or a link out of the root: to open one may wait for ever."""
        if self.stamp == NO_FILE:
            raise UserError(f"{self.uri} is no file, or a link out of the data root; replace it or remove it")

    @property
    def num_bytes(self) -> int:
        """Its size by the listing; 0 where that does not tell."""
        size = self.stamp.partition(":")[0]
        return sum(extent.size for extent in self.extents) or (int(size) if size.isdigit() else 0)


class FileTree:
    """All that lies below `root`, a folder or an archive; `wrappers` are folders that publishers put around it.

    A folder of the data set is looked for right below `root`, then in the `wrappers`, then in the archives
    right below `root`, and in an archive at any depth; `.` is the root, in an archive the folder that holds all.
    Where all of the folders `whole`, if given, lie there unpacked, archives beside them are not opened. Each folder
    is listed once. Nothing outside of the root is read, but for the folders `linked`. Pickles as its root alone.
    """

    def __init__(
        self, root: str, wrappers: Sequence[str] = (), whole: Sequence[str] = (), linked: Sequence[str] = ()
    ) -> None:
        self.root = root
        self.boundary = Boundary(root, linked)
        self.wrappers = tuple(wrappers)
        self.whole = tuple(whole)
        self._archives: dict[str, _Archive] | None = None
        self._listed: dict[str, dict[str, Entry]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": None, "_listed": {}}

    def exists(self) -> bool:
        """Whether there is anything at the root."""
        return storage.exists(self.root)

    def has_folder(self, folder: str) -> bool:
        """Whether `folder` is there, in a folder or in an archive."""
        return self.has_plain_folder(folder) or any(item.find(folder) is not None for item in self._packed())

    def has_plain_folder(self, folder: str) -> bool:
        """Whether `folder` is there, and not in an archive."""
        return self._plain_folder(folder) is not None

    def files(self, folder: str) -> dict[str, Entry]:
        """All files below `folder`, at any depth, by their path below it, sorted; empty where there is none.

        Names are in Unicode's composed form (NFC), so that lists match files whatever system made either. Hidden
        files (a leading dot) are left out.
        """
        if folder not in self._listed:
            found: dict[str, Entry] = {}
            for path, entry in self._entries(folder):
                _add(found, path, entry)
            self._listed[folder] = dict(sorted(found.items()))
        return self._listed[folder]

    def file(self, path: str) -> Entry | None:
        """The file at `path`, looked for as folders are; None where there is none.

        Raises OutsideError where it leads out of the root.
        """
        if not archive.is_archive(self.root):
            for wrapper in ("", *self.wrappers):
                uri = storage.join(self.root, *filter(None, (wrapper, path)))
                # Before it is looked at: whether there is such a file elsewhere is nobody's business either.
                self.boundary.check(uri)
                stamp = _stamp_of(uri)
                if stamp is not None:
                    return Entry(uri, stamp)
        for item in self._packed():
            found = item.find_file(path)
            if found is not None:
                member = item.members[found]
                return Entry(f"{item.uri}/{found}", member.stamp, (member.extent,))
        return None

    def read(self, entry: Entry) -> bytes:
        """The content of `entry`; raises UserError."""
        if not entry.extents:
            self.boundary.check(entry.uri)
        try:
            return b"".join(map(archive.read_extent, entry.extents)) if entry.extents else archive.read_file(entry.uri)
        except ExtentError as error:
            raise UserError(f"{entry.uri} {error}; {error.remedy}") from error

    def _entries(self, folder: str) -> Iterator[tuple[str, Entry]]:
        folder_uri = self._plain_folder(folder)
        if folder_uri is not None:
            for path, stamp in list_tree(folder_uri, self.boundary):
                yield path, Entry(f"{folder_uri}/{path}", stamp)
            return
        for item in self._packed():
            prefix = item.find(folder)
            if prefix is not None:
                for path, member in item.below(prefix):
                    yield path, Entry(f"{item.uri}/{prefix}{path}", member.stamp, (member.extent,))

    def _plain_folder(self, folder: str) -> str | None:
        if archive.is_archive(self.root):
            return None
        filesystem, _ = fsspec.core.url_to_fs(self.root)
        for wrapper in ("", *self.wrappers):
            uri = storage.join(self.root, *(part for part in (wrapper, folder) if part not in ("", ".")))
            if filesystem.isdir(fsspec.core.url_to_fs(uri)[1]):
                self.boundary.check(uri)
                return uri
        return None

    def _packed(self) -> list[_Archive]:
        """The archives, each indexed once."""
        if self._archives is None:
            self._archives = {}
            if archive.is_archive(self.root):
                uris = [self.root]
            elif self.whole and all(map(self.has_plain_folder, self.whole)):
                uris = []
            else:
                names = storage.list_names(self.root)
                uris = [storage.join(self.root, name) for name in names if name.lower().endswith(archive.SUFFIXES)]
            for uri in uris:
                self.boundary.check(uri)
                self._archives[uri] = _Archive(uri)
        return list(self._archives.values())


class _Archive:
    """The index of one archive, with its folders."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.members: dict[str, Member] = archive.index_archive(uri, _stamp_of(uri) or "")
        self._folders = {""}
        for path in self.members:
            folder = path.rpartition("/")[0]
            while folder not in self._folders:
                self._folders.add(folder)
                folder = folder.rpartition("/")[0]

    def find(self, folder: str) -> str | None:
        """The path of `folder` with a slash at its end, whatever is around it; the outermost if there are several.

        That of the folder that holds all is empty where it is the archive itself.
        """
        if folder == ".":
            around = posixpath.commonpath([path.rpartition("/")[0] for path in self.members]) if self.members else ""
            return f"{around}/" if around else ""
        paths = [path for path in self._folders if path == folder or path.endswith(f"/{folder}")]
        return f"{self._outermost(paths, folder)}/" if paths else None

    def find_file(self, path: str) -> str | None:
        """The member at `path`, whatever is around it."""
        paths = [name for name in self.members if name == path or name.endswith(f"/{path}")]
        return self._outermost(paths, path) if paths else None

    def below(self, prefix: str) -> Iterator[tuple[str, Member]]:
        """The members whose path starts with `prefix`, without it."""
        return ((path[len(prefix) :], member) for path, member in self.members.items() if path.startswith(prefix))

    def _outermost(self, paths: list[str], wanted: str) -> str:
        ordered = sorted(paths, key=lambda path: (path.count("/"), path))
        if len(ordered) > 1 and ordered[0].count("/") == ordered[1].count("/"):
            raise UserError(
                f"archive {self.uri} holds {wanted} twice, as {ordered[0]} and as {ordered[1]}; "
                "unpack the one that is meant and set data.root to it"
            )
        return ordered[0]


def list_tree(uri: str, boundary: Boundary) -> Iterator[tuple[str, str]]:
    """Paths of all visible files below the folder `uri`, each with a stamp of size and time.

    Symbolic links are followed within the `boundary`, a folder that holds itself once. A file that lies outside is
    listed, as what is no file is: whoever reads it refuses it. Raises OutsideError for a folder that does. Remote
    folders cost a request or two each, or a request a thousand files on object stores; never one a file.
    """
    if storage.is_local(uri):
        found = _walk(str(storage.local_path(uri)), "", frozenset(), boundary)
    else:
        filesystem, path = fsspec.core.url_to_fs(uri)
        filesystem.invalidate_cache()
        start = len(path.rstrip("/")) + 1
        entries = filesystem.find(path, detail=True)
        found = ((name[start:], _stamp(entry)) for name, entry in entries.items())
    return ((path, stamp) for path, stamp in found if not any(part[:1] == "." for part in path.split("/")))


def _add(found: dict[str, Entry], path: str, entry: Entry) -> None:
    name = unicodedata.normalize("NFC", path)
    if "::" in path and not entry.extents:
        raise UserError(f"{entry.uri} has '::' in its name, which storage takes for another location; rename it")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{entry.uri!r} has a name that is not UTF-8; rename it") from error
    if name in found:
        raise UserError(f"{entry.uri} and {found[name].uri} have the same name; keep one of the two")
    found[name] = entry


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]], boundary: Boundary) -> Iterator[tuple[str, str]]:
    status = Path(folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                # A link to itself, or to where one may not look.
                is_folder = is_file = False
            is_outside = entry.is_symlink() and boundary.end_of(entry.path) is not None
            if is_folder:
                if is_outside:
                    boundary.check(entry.path)
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {identity}, boundary)
            elif is_file and not is_outside:
                status = entry.stat()
                yield f"{prefix}{entry.name}", f"{status.st_size}:{status.st_mtime}"
            else:
                # A link to nothing or out of the root, a device, a socket: it is listed, and reading it is what rejects
                # the sample.
                yield f"{prefix}{entry.name}", NO_FILE


def _stamp_of(uri: str) -> str | None:
    """Stamp of the file at `uri`; None where there is none."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        # A link to itself.
        return None
    return _stamp(info) if info["type"] == "file" else None


def _stamp(info: dict[str, Any]) -> str:
    time = next((info[field] for field in _STAMPS if field in info), "")
    return f"{info['size']}:{time}"
