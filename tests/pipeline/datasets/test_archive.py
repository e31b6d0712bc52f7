"""Archives read in place: every member by its range, hostile and damaged ones refused, memory bounded."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.datasets import archive
from pipeline.datasets.archive import ExtentError, index_archive, is_archive, read_extent
from pipeline.errors import UserError

FILES = {
    "top/images/a.jpg": b"one" * 100,
    "top/images/déjà vu.b.jpg": bytes(range(256)) * 50,
    "top/labels/" + "long/" * 30 + "a.png": b"",
    "top/labels/a.png": np.random.default_rng(0).bytes(5000),
}


def write_zip(place: Path, files: dict[str, bytes] = FILES, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(place, "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return place


def write_tar(place: Path, files: dict[str, bytes] = FILES) -> Path:
    with tarfile.open(place, "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return place


Write = Callable[[Path], Path]
WRITERS: list[tuple[str, Write]] = [
    ("deflated.zip", write_zip),
    ("stored.zip", lambda place: write_zip(place, compression=zipfile.ZIP_STORED)),
    ("plain.TAR", write_tar),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_every_member_reads_back_local_and_remote(tmp_path: Path, name: str, write: Write) -> None:
    place = write(tmp_path / name)
    remote = f"memory://archives/{name}"
    fsspec.filesystem("memory").pipe(f"/archives/{name}", place.read_bytes())
    for uri in (str(place), remote):
        assert is_archive(uri)
        index = index_archive(uri, "s")
        assert {path: read_extent(member.extent) for path, member in index.items()} == FILES
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_one_read_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/archives/x.zip", write_zip(tmp_path / "x.zip").read_bytes())
    index = index_archive("memory://archives/x.zip", "")
    reads: list[int] = []
    original = archive._read_range

    def count(uri: str, offset: int, size: int, whole: bool = True) -> bytes:
        reads.append(size)
        return original(uri, offset, size, whole)

    monkeypatch.setattr(archive, "_read_range", count)
    for member in index.values():
        read_extent(member.extent)
    assert len(reads) == len(FILES)


def test_stamps__change_with_the_content(tmp_path: Path) -> None:
    one = index_archive(str(write_zip(tmp_path / "a.zip")), "1")
    changed = {**FILES, "top/images/a.jpg": b"two" * 100}
    other = index_archive(str(write_zip(tmp_path / "b.zip", changed)), "2")
    assert {path for path in FILES if one[path].stamp != other[path].stamp} == {"top/images/a.jpg"}
    # A tar keeps no sums: the archive's own stamp stands for all of it.
    place = str(write_tar(tmp_path / "a.tar"))
    first, second = index_archive(place, "1"), index_archive(place, "2")
    assert all(first[path].stamp != second[path].stamp for path in FILES)


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "C:/evil.jpg", "a\\..\\evil.jpg"])
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_hostile_names__the_archive_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    write = write_zip if suffix == "zip" else write_tar
    place = write(tmp_path / f"x.{suffix}", {"images/a.jpg": b"1", name: b"2"})
    with pytest.raises(UserError, match="a path that leads outside of it; pack it again"):
        index_archive(str(place), "")


def test_links__are_listed_and_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, kind in (
            ("soft.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    link = zipfile.ZipInfo("soft.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(link, "/etc/passwd")
    members = [
        *index_archive(str(tmp_path / "x.tar"), "").values(),
        *index_archive(str(tmp_path / "x.zip"), "").values(),
    ]
    assert len(members) == 4
    for member in members:
        with pytest.raises(ExtentError, match="is a link, which is not followed"):
            read_extent(member.extent)


def test_hidden_files__left_out(tmp_path: Path) -> None:
    names = ("./images/a.jpg", "__MACOSX/images/._a.jpg", "images/.DS_Store", ".git/x.png")
    place = write_tar(tmp_path / "x.tar", dict.fromkeys(names, b"1"))
    assert list(index_archive(str(place), "")) == ["images/a.jpg"]


def test_names_of_other_systems(tmp_path: Path) -> None:
    windows = zipfile.ZipInfo("x")
    windows.filename, windows.create_system = "images\\a.jpg", 0
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(windows, b"1")
        packed.writestr("images/b.jpg", b"2")
    assert list(index_archive(str(tmp_path / "x.zip"), "")) == ["images/a.jpg", "images/b.jpg"]
    # UTF-8 without the flag that says so.
    data = write_zip(tmp_path / "y.zip", {"images/é.jpg": b"1"}).read_bytes()
    flag = struct.pack("<H", 0x800)
    (tmp_path / "y.zip").write_bytes(data.replace(b"PK\3\4\x14\0" + flag, b"PK\3\4\x14\0\0\0").replace(flag, b"\0\0"))
    assert list(index_archive(str(tmp_path / "y.zip"), "")) == ["images/é.jpg"]


def test_limits__declared_and_swelling_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 10_000)
    place = write_zip(tmp_path / "x.zip", {"a": bytes(20_000), "b": b"small"})
    index = index_archive(str(place), "")
    with pytest.raises(ExtentError, match="has 20000 bytes, more than the 10000 allowed"):
        read_extent(index["a"].extent)
    assert read_extent(index["b"].extent) == b"small"
    # A bomb: the directory says 9 bytes, the data swell to more.
    swelling = index["a"].extent._replace(size=9)
    with pytest.raises(ExtentError, match="is damaged in its archive"):
        read_extent(swelling)
    tar = write_tar(tmp_path / "x.tar", {"a": bytes(20_000)})
    with pytest.raises(ExtentError, match="has 20000 bytes"):
        read_extent(index_archive(str(tar), "")["a"].extent)
    (tmp_path / "plain.jpg").write_bytes(bytes(20_000))
    with pytest.raises(ExtentError, match="has 20000 bytes"):
        archive.read_file(str(tmp_path / "plain.jpg"))


def test_inflate__stops_at_the_declared_size() -> None:
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(bytes(10_000_000)) + packed.flush()
    assert len(archive._inflate(data, 100, ExtentError("", ""))) == 101


def test_unreadable_kinds__say_what_to_do(tmp_path: Path) -> None:
    place = write_zip(tmp_path / "x.zip", {"a": b"123"}, zipfile.ZIP_LZMA)
    with pytest.raises(ExtentError, match="is compressed by method 14") as caught:
        read_extent(index_archive(str(place), "")["a"].extent)
    assert caught.value.remedy == "pack it again with deflate or without compression"
    data = bytearray(write_zip(place, {"a": b"123"}).read_bytes())
    data[6] |= 1
    place.write_bytes(data)
    with pytest.raises(ExtentError, match="is encrypted"):
        read_extent(index_archive(str(place), "")["a"].extent)
    for name in ("x.tar.gz", "x.TGZ", "x.7z"):
        with pytest.raises(UserError, match=r"compressed as a whole and cannot be read in place; unpack it"):
            is_archive(f"/data/{name}")
    assert not is_archive("/data/folder.zipped")


def test_pipe_instead_of_a_file__does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(ExtentError, match="is no regular file"):
        archive.read_file(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_any_damage__is_one_clear_error_or_the_right_bytes(tmp_path: Path, name: str, write: Write) -> None:
    good = write(tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    errors: list[str] = []
    for number in range(150):
        data = bytearray(good[: rng.integers(len(good))] if number % 2 else good)
        for place in rng.integers(len(data), size=4) if data else ():
            data[place] ^= int(rng.integers(1, 256))
        (tmp_path / name).write_bytes(data)
        try:
            index = index_archive(str(tmp_path / name), "")
            for path, member in index.items():
                content = read_extent(member.extent)
                # A tar has no sums of its members; a zip vouches for them.
                assert name.endswith("TAR") or path not in FILES or content == FILES[path]
        except (UserError, ExtentError) as error:
            errors.append(str(error))
    assert len(errors) > 75
    assert not any("\n" in error for error in errors)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_cut_tar__is_damage_also_between_two_members(tmp_path: Path) -> None:
    place = write_tar(tmp_path / "x.tar", {"a": b"1" * 512, "b": b"2" * 512})
    data = place.read_bytes()
    for size in (512, 1024, 1536, 2048):
        place.write_bytes(data[:size])
        with pytest.raises(UserError, match="fetch it again"):
            index_archive(str(place), "")
    header = bytearray(data)
    header[1024 + 5] ^= 255
    place.write_bytes(header)
    with pytest.raises(UserError, match=r"is damaged or ends early at byte 1024; fetch it again"):
        index_archive(str(place), "")


def test_headers__that_claim_more_than_an_index_has(tmp_path: Path) -> None:
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "x.tar").write_bytes(long_name.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(UserError, match=r"x.tar cannot be read \(it claims an index or a header of 8589934592 bytes"):
        index_archive(str(tmp_path / "x.tar"), "")


def test_sizes__below_zero_are_damage(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = -512
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(UserError, match=r"archive .*x.tar (cannot be read|is damaged|ends inside)"):
        index_archive(str(tmp_path / "x.tar"), "")
