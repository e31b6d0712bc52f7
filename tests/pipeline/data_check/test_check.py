"""Everything that is wrong with raw data at once: with counts, first files and remedies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data_check.check import SourceCheck, check_source
from pipeline.errors import UserError

HEIGHT, WIDTH = 48, 64
NAMES = tuple(f"f{number:02d}" for number in range(10))


def scene(seed: int) -> Image.Image:
    """Blurred blocks of colour: unlike those of any other seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


def halves(left: int = 0, right: int = 1) -> NDArray[np.uint8]:
    return np.repeat(np.array([[left] * 40 + [right] * 24], np.uint8), HEIGHT, axis=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images of train and two of val, each with both classes; eight rows of every label map are unlabelled."""
    root = tmp_path / "data"
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        scene(seed).save(root / f"images/{name}.png")
        label = halves()
        label[:8] = 255
        Image.fromarray(label).save(root / f"labels/{name}.png")
    (root / "classes.txt").write_text("road\ncar\n")
    (root / "splits/train.txt").write_text("\n".join(NAMES[:8]))
    (root / "splits/val.txt").write_text("\n".join(NAMES[8:]))
    return root


def look(root: Path, max_samples: int | None = None, **settings: Any) -> SourceCheck:
    config = DataConfig.model_validate({"dataset": "folder", "root": str(root), **settings})
    return check_source(config, ("as it is",), max_samples)


def test_check__good_data(root: Path) -> None:
    found = look(root)
    assert (found.problems, found.warnings, found.layout) == ((), (), ("as it is",))
    assert found.class_names == ("road", "car")
    train, val = found.splits
    assert (train.name, train.num_samples, train.num_checked, train.num_good) == ("train", 8, 8, 8)
    assert (val.name, val.num_samples, val.num_good) == ("val", 2, 2)
    assert train.class_pixels == (8 * 40 * 40, 8 * 40 * 24)
    assert train.class_images == (8, 8)
    assert train.ignored_share == pytest.approx(8 / 48)
    assert train.sizes == ((HEIGHT, WIDTH),) * 3
    assert train.kinds == {"PNG RGB 8 bit": 8}
    assert train.unknown == {}


def test_check__all_problems_with_counts_and_files(root: Path) -> None:
    for name in ("f01", "f03", "f08"):
        Image.fromarray(halves(0, 7)).save(root / f"labels/{name}.png")
    Image.fromarray(halves(3, 7)).save(root / "labels/f04.png")
    (root / "labels/f05.png").unlink()
    (root / "images/f06.png").write_bytes(b"no image")
    scene(2).resize((32, 24)).save(root / "images/f02.png")
    found = look(root)
    train, val = found.splits
    assert (train.num_good, val.num_good) == (2, 1)
    assert train.unknown == {"7": 3 * 48 * 24, "3": 48 * 40}
    assert val.unknown == {"7": 48 * 24}
    assert train.sizes == ((24, 32), (HEIGHT, WIDTH), (HEIGHT, WIDTH))
    most, *others = found.problems
    assert most.count == 3
    assert most.files == tuple(f"{root}/labels/{name}.png" for name in ("f01", "f03", "f08"))
    assert most.example == (
        f"{root}/labels/f01.png holds label id 7, outside the class list (0-1 classes.txt, ignored: 255); correct the "
        "label map or remove the sample"
    )
    assert [(problem.count, problem.files) for problem in others] == [
        (1, (f"{root}/images/f02.png",)),
        (1, (f"{root}/labels/f04.png",)),
        (1, (f"{root}/labels/f05.png",)),
        (1, (f"{root}/images/f06.png",)),
    ]
    assert "is 24x32 (height x width) but its label map" in others[0].example
    assert "holds label ids 3, 7" in others[1].example
    assert "is missing: there is no such label map; add it" in others[2].example
    assert "cannot be decoded (unknown format); replace the file" in others[3].example


def test_check__classes_without_pixels(root: Path) -> None:
    for name in NAMES[8:]:
        Image.fromarray(halves(0, 0)).save(root / f"labels/{name}.png")
    (problem,) = look(root).problems
    assert problem.example.startswith("folder: val shows no pixel of 'car'; correct the label maps")
    # A part of the images may miss what the rest shows.
    partial = look(root, max_samples=1)
    assert partial.problems == ()
    assert [split.num_checked for split in partial.splits] == [1, 1]
    assert "val shows no pixel of 'car'" in partial.warnings[0]
    assert look(root, classes_without_pixels="allow").problems[0].example.endswith("measure, these classes")


def test_check__copies_and_images_that_look_alike_across_splits(root: Path) -> None:
    shutil.copy(root / "images/f00.png", root / "images/f05.png")
    # A frame of one video, brighter and a little moved; and a mirror image of another.
    moved = np.roll(np.asarray(scene(1)), 1, axis=1)
    Image.fromarray(np.minimum(moved.astype(int) + 12, 255).astype(np.uint8)).save(root / "images/f08.png")
    scene(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "images/f09.png")
    found = look(root)
    (problem,) = found.problems
    assert problem.count == 1
    assert problem.example.startswith(
        f"{root}/images/f05.png is the same image, byte for byte, as {root}/images/f00.png of split train; remove one"
    )
    (warning,) = found.warnings
    assert warning.startswith(
        f"2 of 2 images of val look like images of train, such as {root}/images/f08.png like {root}/images/f01.png"
    )


def test_check__more_than_8_bits(root: Path) -> None:
    for seed, name in enumerate(NAMES):
        grey = np.asarray(scene(seed).convert("L"), np.uint16) * 8 + 29000
        grey[0, 0], grey[0, 1] = 29000, 31040
        Image.fromarray(np.repeat(grey, 1, axis=0)).save(root / f"images/{name}.png")
    found = look(root)
    assert (found.problems, found.warnings) == ((), ())
    assert found.splits[0].kinds == {"PNG L 16 bit": 8}
    low, high = found.grey_range or (0, 0)
    assert 29000 <= low < 29300
    assert 30600 < high <= 31040
    assert look(root, grey_range=[29000, 31040]).grey_range == (29000, 31040)


def test_check__palettes_that_contradict_each_other(root: Path) -> None:
    for name, colours in (("f00", (9, 9, 9, 200, 0, 0)), ("f01", (200, 0, 0, 9, 9, 9))):
        picture = Image.fromarray(halves()).convert("P")
        picture.putpalette(colours)
        picture.save(root / f"labels/{name}.png")
    (problem,) = look(root).problems
    assert f"{root}/labels/f01.png has the colour [200, 0, 0] at index 0 of its palette" in problem.example


def test_check__no_data_set_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data root .* does not exist|no classes"):
        look(tmp_path / "nothing")


def test_check__progress_is_told_of_long_looks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data_check.check.PROGRESS_INTERVAL_S", 0.0)
    lines: list[str] = []
    (root / "labels/f05.png").unlink()
    config = DataConfig(dataset="folder", root=str(root))
    check_source(config, progress=lines.append)
    assert lines == ["check train: 8/8 images, 1 bad, ETA 0:00", "check val: 2/2 images, 0 bad, ETA 0:00"]
