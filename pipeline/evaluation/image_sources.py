"""The images that people name: files, folders, patterns and archives, on this machine or elsewhere."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pipeline import storage
from pipeline.datasets import archive
from pipeline.datasets.paired import IMAGE_SUFFIXES
from pipeline.datasets.tree import Entry, FileTree
from pipeline.errors import UserError

WILDCARDS = "*?["


class SourceImage(NamedTuple):
    """One image file; `path` is where it lies below the source that named it, with forward slashes.

    `source`: the folder that links may not lead out of; None: the file was named itself.
    """

    path: str
    entry: Entry
    source: str | None = None

    @property
    def uri(self) -> str:
        """As the user knows it."""
        return self.entry.uri

    def read(self) -> bytes:
        """Its bytes; raises UserError, and OSError where storage does not give it."""
        return FileTree(self.source or self.uri).read(self.entry)


def list_images(sources: Sequence[str]) -> list[SourceImage]:
    """All images that the sources name, in their order, each file once.

    A source is a file (taken whatever its suffix), a folder (its image files at any depth), a pattern with `*`, `?`,
    `[...]` or `**` (image files that match, by their path below the folder before the first wildcard), or a .zip or
    .tar archive (image files in it); a path or any fsspec URL. Hidden files are left out. Raises UserError for a
    source that is not there, cannot be read or holds no image.
    """
    found: dict[tuple[str, str], SourceImage] = {}
    for source in sources:
        images = _images_of(source)
        if not images:
            raise UserError(
                f"no image at {source}; check the path (image files end in {', '.join(IMAGE_SUFFIXES[:5])}, ...)"
            )
        found |= {(image.path, image.uri): image for image in images}
    return list(found.values())


def _images_of(source: str) -> list[SourceImage]:
    try:
        filesystem, path = storage.filesystem_of(source)
    except (ValueError, ImportError) as error:
        raise UserError(f"{source} cannot be opened ({error}); give a path or an fsspec URL") from error
    name = source.lower().rstrip("/")
    # Over HTTP, asking whether a file is a folder would fetch it.
    named_as_file = name.endswith((*IMAGE_SUFFIXES, *archive.SUFFIXES)) and not storage.is_local(source)
    if not named_as_file and filesystem.isdir(path):
        return _pictures(((below, entry) for below, entry in FileTree(source).files("").items()), source)
    if filesystem.exists(path):
        if archive.is_archive(source):
            members = archive.index_archive(source, "")
            return _pictures(
                (below, Entry(f"{source}/{below}", member.stamp, (member.extent,))) for below, member in members.items()
            )
        return [SourceImage(path.rstrip("/").rpartition("/")[2], Entry(source, ""))]
    if any(wildcard in path for wildcard in WILDCARDS):
        return _pictures(_matches(source), _start_of(source) or ".")
    return []


def _matches(pattern: str) -> Iterator[tuple[str, Entry]]:
    filesystem, path = storage.filesystem_of(pattern)
    start = len(_start_of(path))
    for name, about in sorted(filesystem.glob(path, detail=True).items()):
        below = name[start:]
        if about["type"] != "directory" and not any(part.startswith(".") for part in below.split("/")):
            yield below, Entry(name if storage.is_local(pattern) else filesystem.unstrip_protocol(name), "")


def _start_of(pattern: str) -> str:
    """The part before the name that holds the first wildcard, with the slash at its end."""
    first = min(pattern.index(wildcard) for wildcard in WILDCARDS if wildcard in pattern)
    return pattern[: pattern.rfind("/", 0, first) + 1]


def _pictures(files: Iterable[tuple[str, Entry]], source: str | None = None) -> list[SourceImage]:
    """Those with the suffix of an image; `source` as in SourceImage."""
    return [
        SourceImage(unicodedata.normalize("NFC", below), entry, source)
        for below, entry in files
        if below.lower().endswith(IMAGE_SUFFIXES)
    ]
