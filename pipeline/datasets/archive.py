"""Files inside .zip and .tar archives, read in place: one pass for the index, then one ranged read a member.

Nothing is ever unpacked to disk, so no member's name can lead to a file outside the archive.
"""

from __future__ import annotations

import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

import fsspec

from pipeline import storage
from pipeline.errors import UserError
from segvit.image_files import one_line

SUFFIXES = (".zip", ".tar")
# Compressed as one stream: reading one member would mean reading all before it.
SEQUENTIAL_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
# Far above any image or label map; it bounds what one damaged or hostile file can take of a task's memory.
MAX_FILE_BYTES = 1 << 28
# Of a zip's index, or one of a tar's headers: some millions of names.
MAX_INDEX_BYTES = 1 << 28
_ZIP_HEADER = struct.Struct("<4s5H3I2H")
# Room for a local header's name and extra fields, so that one read is enough.
_ZIP_HEADER_SLACK = 1024
_ENCRYPTED = 0x1


class ExtentError(ValueError):
    """Bytes that cannot be read or are not what the index says; `remedy` helps."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class Extent(NamedTuple):
    """Where a file's bytes lie inside another file. What a task needs to read a member, without the index.

    Attributes:
        uri: the file that holds them, such as an archive.
        offset: of the data; in a zip of the member's local header, bytes.
        packed_size: bytes as stored.
        size: bytes as they are when unpacked.
        kind: `range` (as they are), `zip`, `link` (a member that is a link and has no bytes), or `row` (of a Parquet
            file, which `parquet_rows` reads: `offset` is its number, the sizes are estimates).
        crc: of the unpacked bytes in a zip.
    """

    uri: str
    offset: int
    packed_size: int
    size: int
    kind: str = "range"
    crc: int = 0


class Member(NamedTuple):
    """One file of an archive."""

    extent: Extent
    stamp: str  # changes with the content


def is_archive(uri: str) -> bool:
    """Whether `uri` has the name of an archive; raises UserError for one that cannot be read in place."""
    name = uri.lower().rstrip("/")
    if name.endswith(SEQUENTIAL_SUFFIXES):
        raise UserError(
            f"{uri} is compressed as a whole and cannot be read in place; unpack it, or repack it as .zip or .tar"
        )
    return name.endswith(SUFFIXES)


def index_archive(uri: str, stamp: str) -> dict[str, Member]:
    """All files in the archive at `uri` by path; hidden ones and what macOS adds are left out.

    `stamp` is the archive's own and enters the members' where an archive keeps no sums of them. Raises UserError
    for a damaged archive, and for a member whose path is absolute or leads upwards.
    """
    index: dict[str, Member] = {}
    read = _index_zip if uri.lower().endswith(".zip") else _index_tar
    try:
        for path, member in read(uri, stamp):
            parts = path.replace("\\", "/").split("/")
            if ".." in parts or parts[0] == "" or parts[0].endswith(":") or "\0" in path:
                raise UserError(f"archive {uri} holds {path!r}, a path that leads outside of it; pack it again")
            parts = [part for part in path.split("/") if part not in ("", ".")]
            if parts and not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                index["/".join(parts)] = member
    except UserError:
        raise
    # Damaged archives raise nearly anything from inside the readers; each means the same to the user.
    except Exception as error:
        raise UserError(f"archive {uri} cannot be read ({one_line(error)}); fetch it again") from error
    return index


def read_extent(extent: Extent) -> bytes:
    """The bytes that `extent` stands for; raises ExtentError, and OSError where the file cannot be read."""
    if extent.kind == "link":
        raise ExtentError("is a link, which is not followed inside an archive", "pack the file itself")
    if max(extent.size, extent.packed_size) > MAX_FILE_BYTES:
        raise too_large(max(extent.size, extent.packed_size))
    if extent.kind == "zip":
        return _read_zipped(extent)
    return _read_range(extent.uri, extent.offset, extent.size)


def read_file(uri: str) -> bytes:
    """The file at `uri`; raises ExtentError where it exceeds MAX_FILE_BYTES, and OSError."""
    if storage.is_local(uri):
        if not stat.S_ISREG(storage.local_path(uri).stat().st_mode):
            # Opening a named pipe would wait for ever.
            raise ExtentError("is no regular file", "replace it or remove it")
        data = _read_opened(uri)
    else:
        filesystem, path = fsspec.core.url_to_fs(uri)
        try:
            # One request, where opening the file would ask for its size first.
            data = bytes(filesystem.cat_file(path, start=0, end=MAX_FILE_BYTES + 1))
        except FileNotFoundError:
            raise
        # An empty file has no range; stores say so in ways of their own.
        except Exception:
            data = _read_opened(uri)
    if len(data) > MAX_FILE_BYTES:
        raise too_large(storage.file_size(uri))
    return data


def too_large(num_bytes: int) -> ExtentError:
    """The error for a file of `num_bytes`."""
    return ExtentError(f"has {num_bytes} bytes, more than the {MAX_FILE_BYTES} allowed", "replace it or remove it")


def _index_zip(uri: str, stamp: str) -> Iterator[tuple[str, Member]]:
    with storage.open_uri(uri) as file, zipfile.ZipFile(cast("IO[bytes]", _BoundedReads(file))) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            kind = "link" if is_link else "zip"
            if info.header_offset < 0:
                raise UserError(f"archive {uri} is damaged at {info.filename!r}; fetch it again")
            extent = Extent(uri, info.header_offset, info.compress_size, info.file_size, kind, info.CRC)
            yield _zip_name(info), Member(extent, f"{info.file_size}:{info.CRC:08x}")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name; UTF-8 also where the packer forgot to say so."""
    # zipfile cuts the name at a NUL, which hides what other readers would see.
    name = info.orig_filename
    if info.create_system == 0:
        # Some packers of Windows write its own separator, against the format.
        name = name.replace("\\", "/")
    if not info.flag_bits & 0x800:
        try:
            return name.encode("cp437").decode("utf-8")
        except UnicodeError:
            return name
    return name


def _index_tar(uri: str, stamp: str) -> Iterator[tuple[str, Member]]:
    with storage.open_uri(uri) as file:
        total = file.seek(0, 2)
        file.seek(0)
        with tarfile.open(fileobj=cast("IO[bytes]", _BoundedReads(file)), mode="r:") as archive:
            for info in archive:
                if info.isdir():
                    continue
                kind = "range" if info.isreg() and not info.issparse() else "link"
                if info.size < 0 or (kind == "range" and info.offset_data + info.size > total):
                    raise UserError(f"archive {uri} ends inside {info.name!r}; fetch it again")
                extent = Extent(uri, info.offset_data, info.size, info.size, kind)
                yield info.name, Member(extent, f"{info.size}:{info.mtime}:{info.offset_data}:{stamp}")
                # tarfile remembers every member; the index has what is needed of them.
                cast("Any", archive).members.clear()
            file.seek(archive.offset)
            # tarfile takes a damaged header, and a copy that broke off between members, for the archive's end.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"archive {uri} is damaged or ends early at byte {archive.offset}; fetch it again")


class _BoundedReads:
    """`file`, of which its reader gets an index or a header at once and not all of it, whatever sizes these claim."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int | None = None) -> bytes:
        """At most `size` bytes, or what is left; raises ValueError for more than MAX_INDEX_BYTES."""
        if size is not None and not 0 <= size <= MAX_INDEX_BYTES:
            raise ValueError(f"it claims an index or a header of {size} bytes")
        data = self._file.read(MAX_INDEX_BYTES + 1 if size is None else size)
        if len(data) > MAX_INDEX_BYTES:
            raise ValueError(f"its index exceeds {MAX_INDEX_BYTES} bytes")
        return data

    def seekable(self) -> bool:
        """Yes: zipfile asks."""
        return True


def _read_zipped(extent: Extent) -> bytes:
    damaged = ExtentError("is damaged in its archive", "fetch the archive again")
    data = _read_range(
        extent.uri, extent.offset, _ZIP_HEADER.size + _ZIP_HEADER_SLACK + extent.packed_size, whole=False
    )
    if len(data) < _ZIP_HEADER.size:
        raise damaged
    mark, _, flags, method, *_, name_size, extra_size = _ZIP_HEADER.unpack_from(data)
    if mark != b"PK\3\4":
        raise damaged
    if flags & _ENCRYPTED:
        raise ExtentError("is encrypted in its archive", "pack it again without a password")
    start = _ZIP_HEADER.size + name_size + extra_size
    packed = data[start : start + extent.packed_size]
    if start > _ZIP_HEADER.size + _ZIP_HEADER_SLACK:
        packed = _read_range(extent.uri, extent.offset + start, extent.packed_size)
    if method == zipfile.ZIP_STORED:
        content = packed
    elif method == zipfile.ZIP_DEFLATED:
        content = _inflate(packed, extent.size, damaged)
    else:
        raise ExtentError(f"is compressed by method {method}", "pack it again with deflate or without compression")
    if len(content) != extent.size or zlib.crc32(content) != extent.crc:
        raise damaged
    return content


def _inflate(packed: bytes, size: int, damaged: ExtentError) -> bytes:
    """At most one byte more than `size`: a member that swells beyond what it declares never fills the memory."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    except zlib.error as error:
        raise damaged from error


def _read_opened(uri: str) -> bytes:
    with storage.open_uri(uri) as file:
        return file.read(MAX_FILE_BYTES + 1)


def _read_range(uri: str, offset: int, size: int, whole: bool = True) -> bytes:
    if storage.is_local(uri):
        with storage.open_uri(uri) as file:
            file.seek(offset)
            data = file.read(size)
    else:
        filesystem, path = fsspec.core.url_to_fs(uri)
        data = bytes(filesystem.cat_file(path, start=offset, end=offset + size))
    if whole and len(data) != size:
        raise ExtentError("is cut off", "fetch the file that holds it again")
    return data
