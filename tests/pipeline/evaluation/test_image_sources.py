from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.image_sources import list_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images at three depths, and what is none."""
    folder = tmp_path / "photos"
    for name in ("b.jpg", "a.PNG", "street/1.jpeg", "street/night/2.png", ".hidden/3.png", "._a.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def listed(*sources: str | Path) -> list[tuple[str, bytes]]:
    return [(image.path, image.read()) for image in list_images([str(source) for source in sources])]


def test_list_images__folder_gives_its_images_at_any_depth(photos: Path) -> None:
    assert listed(photos) == [
        ("a.PNG", b"a.PNG"),
        ("b.jpg", b"b.jpg"),
        ("street/1.jpeg", b"street/1.jpeg"),
        ("street/night/2.png", b"street/night/2.png"),
    ]


def test_list_images__file_is_taken_whatever_its_suffix(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed(photos / "notes.txt", photos / "b.jpg") == [("notes.txt", b"notes.txt"), ("b.jpg", b"b.jpg")]
    monkeypatch.chdir(photos)
    assert listed("b.jpg", "b.jpg", f"file://{photos}/a.PNG") == [("b.jpg", b"b.jpg"), ("a.PNG", b"a.PNG")]
    (photos / "c[1].png").write_bytes(b"c")
    assert listed("c[1].png") == [("c[1].png", b"c")]


def test_list_images__pattern_keeps_the_path_below_its_fixed_part(photos: Path) -> None:
    assert listed(f"{photos}/*.jpg") == [("b.jpg", b"b.jpg")]
    assert [path for path, _ in listed(f"{photos}/**/*.[jp]*g")] == ["b.jpg", "street/1.jpeg", "street/night/2.png"]
    assert [path for path, _ in listed(f"{photos}/str*/*")] == ["street/1.jpeg"]
    assert [path for path, _ in listed(f"file://{photos}/s*/1.jpe?")] == ["street/1.jpeg"]


def test_list_images__archives_are_read_in_place(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("street/1.jpeg", "notes.txt", "__MACOSX/x.png"):
            packed.writestr(name, name)
    assert listed(tmp_path / "p.zip") == [("street/1.jpeg", b"street/1.jpeg")]
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        tar.add(photos, "photos")
    assert [path for path, _ in listed(tmp_path / "p.tar")] == [
        "photos/a.PNG",
        "photos/b.jpg",
        "photos/street/1.jpeg",
        "photos/street/night/2.png",
    ]


def test_list_images__any_fsspec_location() -> None:
    store = fsspec.filesystem("memory")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("in/z.png", b"z")
    for name, data in (("x.png", b"x"), ("in/y.jpg", b"y"), ("p.zip", archive.getvalue())):
        store.pipe_file(f"/sources/{name}", data)
    assert listed("memory://sources") == [("in/y.jpg", b"y"), ("x.png", b"x")]
    assert listed("memory://sources/x.png", "memory://sources/p.zip") == [("x.png", b"x"), ("in/z.png", b"z")]
    assert listed("memory://sources/*/*.jpg") == [("in/y.jpg", b"y")]
    assert [image.uri for image in list_images(["memory://sources/*/*.jpg"])] == ["memory:///sources/in/y.jpg"]


def test_list_images__what_is_no_source_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as packed:
        packed.writestr("../x.png", b"x")
    (tmp_path / "p.tar.gz").write_bytes(b"")
    (tmp_path / "broken.zip").write_bytes(b"no archive")
    for source, message in (
        (f"{tmp_path}/none.png", "no image at .*none.png; check the path"),
        (f"{tmp_path}/*.png", r"no image at .*\*.png; check the path"),
        (f"{tmp_path}/empty", "no image at .*empty; check the path"),
        (f"{tmp_path}/evil.zip", r"holds '../x.png', a path that leads outside of it"),
        (f"{tmp_path}/p.tar.gz", "is compressed as a whole and cannot be read in place; unpack it"),
        (f"{tmp_path}/broken.zip", "broken.zip cannot be read"),
        ("nowhere://x/y.png", r"nowhere://x/y.png cannot be opened \(Protocol not known: nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            list_images([source])
