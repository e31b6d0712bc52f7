"""Data of one's own: pairing, classes files, splits, and every odd file through to the loader."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import AugmentationConfig, DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset
from pipeline.datasets.folder import default_palette
from pipeline.errors import UserError
from pipeline.shards.balance import count_classes
from pipeline.shards.loader import EvalLoader, TrainLoader
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_reader import open_shard_set
from segvit.image_files import open_image

HEIGHT, WIDTH = 24, 32


def label_map(seed: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Class ids 0 to 2 and 255, without symmetry."""
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], dtype=np.uint8), (height, width))


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    """Smooth enough for JPEG to keep it, and without symmetry."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).convert(mode)


def put(root: Path, name: str, label: Image.Image | NDArray[Any], seed: int, suffixes: str = ".jpg .png") -> None:
    """An image and its label map with the suffixes given."""
    image_suffix, label_suffix = suffixes.split()
    image, mask = root / "images" / f"{name}{image_suffix}", root / "labels" / f"{name}{label_suffix}"
    for file in (image, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(image, "PNG" if image_suffix.lower() == ".png" else "JPEG", quality=95)
    (label if isinstance(label, Image.Image) else Image.fromarray(label)).save(mask)


def make_folder(root: Path, names: tuple[str, ...] = ("a", "b", "c"), classes: str = "sky\nroad\ncar\n") -> Path:
    for seed, name in enumerate(names):
        put(root, name, label_map(seed), seed)
    (root / "classes.txt").write_text(classes, encoding="utf-8")
    (root / "splits").mkdir(exist_ok=True)
    (root / "splits/train.txt").write_text("\n".join(names[:-1]), encoding="utf-8")
    (root / "splits/val.txt").write_text(names[-1], encoding="utf-8")
    return root


def config_of(root: Path | str, **folder: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "folder", "root": str(root), "folder": folder})


def open_folder(root: Path | str, **folder: Any) -> RawDataset:
    return open_dataset(config_of(root, **folder))


def test_lists__order_suffixes_and_line_ends(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ("b.v2", "a", "nested/deep/c", "d"))
    (root / "splits/train.txt").write_bytes("\ufeffnested/deep/c.jpg\r\n\r\n b.v2 \r\na.jpg\r\n".encode())
    dataset = open_folder(root)
    assert dataset.splits() == ("train", "val")
    assert [sample.key for sample in dataset.samples("train")] == ["nested%2Fdeep%2Fc", "b%2Ev2", "a"]
    for seed, sample in zip((2, 0, 1), dataset.samples("train"), strict=True):
        np.testing.assert_array_equal(dataset.read(sample).label, label_map(seed))
    (root / "splits/test.txt").write_text("a\n")
    with pytest.raises(UserError, match="'a' is in the lists of train and of test; keep one"):
        open_folder(root).splits()
    (root / "splits/test.txt").write_text("")
    assert open_folder(root).splits() == ("train", "val", "test")


def test_lists__what_is_listed_and_not_there_is_rejected(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "splits/train.txt").write_text("a\nghost\n")
    (root / "labels/a.png").unlink()
    dataset = open_folder(root)
    reasons = []
    for sample in dataset.samples("train"):
        with pytest.raises(RejectedSampleError) as caught:
            dataset.read(sample)
        reasons.append((caught.value.file, caught.value.reason))
    assert reasons == [
        (f"{root}/labels/a.png", "is missing: there is no such label map"),
        (f"{root}/images/ghost", "is missing: there is no such image"),
    ]


@pytest.mark.parametrize("folder", ["set {v1}", "{}", "a {0} 100% b", "Bilder ä"])
def test_lists__odd_signs_in_the_root(tmp_path: Path, folder: str) -> None:
    root = make_folder(tmp_path / folder)
    (root / "labels/a.png").unlink()
    dataset = open_folder(root)
    with pytest.raises(RejectedSampleError) as caught:
        dataset.read(next(iter(dataset.samples("train"))))
    assert caught.value.file == f"{root}/labels/a.png"
    (root / "splits/train.txt").write_text("b\n")
    np.testing.assert_array_equal(open_folder(root).read(open_folder(root).samples("train")[0]).label, label_map(1))


def test_fraction__seeded_by_name_so_that_new_images_move_none(tmp_path: Path) -> None:
    names = tuple(f"image_{number}" for number in range(40))
    root = make_folder(tmp_path, names)

    def drawn(fraction: float = 0.25, seed: int = 0) -> set[str]:
        dataset = open_dataset(config_of(root, val_fraction=fraction).model_copy(update={"seed": seed}))
        val, train = ({sample.key for sample in dataset.samples(split)} for split in ("val", "train"))
        assert not val & train
        assert len(val | train) == len(list((root / "images").iterdir()))
        return val

    before = drawn()
    assert 4 <= len(before) <= 16
    assert before <= drawn(0.5)
    assert before != drawn(seed=1)
    for number in range(40, 60):
        put(root, f"image_{number}", label_map(number), number)
    assert {key for key in drawn() if key in names} == before


def test_fraction__label_without_image_is_rejected_not_forgotten(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "images/b.jpg").unlink()
    (root / "images/notes.txt").write_text("not an image")
    Image.new("RGB", (4, 4)).save(root / "images" / "x.bmp")
    dataset = open_folder(root, val_fraction=0.5)
    samples = [*dataset.samples("train"), *dataset.samples("val")]
    assert {sample.key for sample in samples} == {"a", "b", "c", "x"}
    (lost,) = [sample for sample in samples if sample.key == "b"]
    with pytest.raises(RejectedSampleError, match=r"images/b\.\* is missing: there is no such image"):
        dataset.read(lost)


def test_same_name_twice__one_clear_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    picture(0).save(root / "images/a.png")
    with pytest.raises(UserError, match=r"images/a\.png: another image in split 'train' has this name; rename one"):
        open_folder(root).samples("train")


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_classes__names_palette_ids_and_ignored_ones(tmp_path: Path, suffix: str) -> None:
    root = make_folder(tmp_path)
    raw = np.array([[1000, 7, 65535], [0, 40000, 7]], dtype=np.uint16)
    put(root, "deep", raw, 0)
    (root / "splits/val.txt").write_text("deep")
    content = {
        "names": ["déjà", "vu"],
        "palette": [[1, 2, 3], [4, 5, 6]],
        "ids": [1000, 7],
        "ignore_ids": [0, 40000, 65535],
    }
    (root / f"classes.{suffix}").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    dataset = open_folder(root, classes=f"classes.{suffix}")
    assert dataset.class_names == ("déjà", "vu")
    assert dataset.palette == ((1, 2, 3), (4, 5, 6))
    np.testing.assert_array_equal(dataset.read(dataset.samples("val")[0]).label, [[0, 1, 255], [255, 255, 1]])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", "sky\nroad\nsky\n", "holds 'sky' twice; remove one"),
        ("classes.txt", "", r"names: .*at least 1 item"),
        ("classes.txt", "\n".join(map(str, range(256))), "names holds 256 classes; label maps of 8 bits tell 255"),
        ("classes.json", '{"names": ["a"], "colour": 1}', "colour: Extra inputs are not permitted; it holds names and"),
        ("classes.json", '{"names": ["a", "b"], "ids": [1]}', "ids has 1 entries for 2 names; give one a name"),
        ("classes.json", '{"names": ["a", "a"]}', "names holds a more than once"),
        ("classes.json", '{"names": ["a"], "ignore_ids": [0]}', "ignore_ids holds 0, the id of class 'a'"),
        ("classes.json", '{"names": ["a"], "ids": [65536]}', "ids and ignore_ids are 0 to 65535"),
        ("classes.json", '{"names": ["a"], "palette": [[0, 0, 256]]}', "palette levels are 0 to 255"),
        ("classes.json", '{"names": ', r"classes\.json cannot be read \(Expecting value"),
        ("classes.yaml", "names: [a\nb: c: d", r"classes\.yaml cannot be read"),
        ("classes.yaml", "just text", r"classes\.yaml: "),
    ],
)
def test_classes__mistakes_are_one_clear_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    root = make_folder(tmp_path)
    (root / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_folder(root, classes=name)
    assert "\n" not in str(caught.value)


def test_wrong_tree__says_what_is_missing(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "splits/val.txt").unlink()
    with pytest.raises(UserError, match=r"has no splits/val\.txt; add it, or set data\.folder\.val_fraction"):
        open_folder(root).splits()
    with pytest.raises(UserError, match=r"has no folder masks; the Folder layout is images/NAME\.jpg with masks/NAME"):
        open_folder(root, labels="masks").splits()
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"has no classes\.txt; write one class name a line into it"):
        open_folder(root)
    with pytest.raises(UserError, match=r"nowhere does not exist; set data\.root to the folder with classes\.txt"):
        open_folder(root / "nowhere")


def test_stamps__change_when_the_meaning_of_ids_does(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "classes.json").write_text('{"names": ["a", "b", "c"]}')
    before = open_folder(root, classes="classes.json")
    (root / "classes.json").write_text('{"names": ["a", "b", "c"], "ids": [2, 1, 0]}')
    after = open_folder(root, classes="classes.json")
    assert before.samples("train")[0].stamp != after.samples("train")[0].stamp
    assert before.source_digest() != after.source_digest()


def test_default_palette__all_different_and_none_black() -> None:
    colours = default_palette(255)
    assert colours[:3] == ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert len({*colours, (0, 0, 0)}) == 256


def palette_png(ids: NDArray[np.uint8]) -> Image.Image:
    image = Image.frombytes("P", ids.shape[::-1], ids.tobytes())
    image.putpalette([7, 99, 3] * 256)
    return image


def make_odd_folder(root: Path) -> dict[str, NDArray[np.uint8]]:
    """One sample of everything that is unusual and right; the label map that each should come out with."""
    expected: dict[str, NDArray[np.uint8]] = {}

    def add(name: str, label: Image.Image | NDArray[Any] | None = None, suffixes: str = ".jpg .png") -> Path:
        seed = len(expected)
        put(root, name, label_map(seed) if label is None else label, seed, suffixes)
        expected[unicodedata.normalize("NFC", name)] = label_map(seed)
        return root / "images" / (name + suffixes.split()[0])

    add("palette", palette_png(label_map(0)))
    add("sixteen", label_map(1).astype(np.uint16))
    picture(2, "L").save(add("grey"), "JPEG")
    picture(3, "RGBA").save(add("rgba", suffixes=".png .png"))
    picture(4, "CMYK").save(add("cmyk"), "JPEG", quality=95)
    add("upper", suffixes=".JPG .PNG")
    add("x/y z/nested", suffixes=".jpeg .png")
    add("ключ 鍵 é")
    add("dots.in.the.name", suffixes=".Png .tif")
    picture(9).save(add("camera"), "MPO", save_all=True, append_images=[picture(99)])
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        seed = len(expected)
        file = add(f"turned_{orientation}")
        picture(seed).save(file, "JPEG", quality=95, exif=exif)
        if orientation != 3:
            # On the upright image, as label tools show it.
            upright = label_map(seed, WIDTH, HEIGHT)
            Image.fromarray(upright).save(root / "labels" / f"{file.stem}.png")
            expected[file.stem] = upright
    exif[0x0112] = 6
    seed = len(expected)
    picture(seed).save(add("stored_way"), "JPEG", quality=95, exif=exif)
    # Drawn on the pixels as stored: turned with the image, a quarter to the right.
    expected["stored_way"] = np.rot90(label_map(seed), -1)
    return expected


@pytest.mark.parametrize("packed", [False, True])
def test_end_to_end__odd_files_reach_the_loader_as_they_are(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "data"
    expected = make_odd_folder(root)
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    (root / "splits").mkdir()
    names = sorted(expected)
    (root / "splits/train.txt").write_text("\n".join(names[::2]), encoding="utf-8")
    (root / "splits/val.txt").write_text("\n".join(names[1::2]), encoding="utf-8")
    source = root
    if packed:
        source = tmp_path / "data.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(root.rglob("*.*")):
                archive.write(file, Path("my data") / file.relative_to(root))
    config = DataConfig(dataset="folder", root=str(source), samples_per_shard=3)
    shard_set = prepare_shards(config, str(tmp_path / "shards"), progress=lambda _: None)
    assert shard_set.num_quarantined == 0
    files = {
        file.relative_to(root / "images").with_suffix("").as_posix(): file for file in (root / "images").rglob("*.*")
    }
    seen = set()
    for split in ("train", "val"):
        reader = open_shard_set(shard_set)
        index = reader.index(split)
        originals = {sample.key: sample.image for sample in (reader.read(index, place) for place in range(len(index)))}
        for loaded in EvalLoader(shard_set, split):
            name = loaded.key.replace("%2E", ".").replace("%2F", "/")
            seen.add(name)
            np.testing.assert_array_equal(loaded.label.numpy(), expected[name], err_msg=name)
            content = files[name].read_bytes()
            assert originals[loaded.key] == content, name
            with Image.open(io.BytesIO(content)) as image:
                stored = np.asarray(image.convert("RGB")).astype(int)
            turns = {"turned_3": 2, "turned_6": -1, "turned_8": 1, "stored_way": -1}.get(name, 0)
            pixels = loaded.image.permute(1, 2, 0).numpy().astype(int)
            assert np.abs(np.rot90(stored, turns) - pixels).max() <= 3, name
    assert seen == set(expected)


def test_end_to_end__training_sees_the_same_pixels_and_labels(tmp_path: Path) -> None:
    root = tmp_path / "data"
    expected = make_odd_folder(root)
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    config = config_of(root, val_fraction=0.3)
    shard_set = prepare_shards(config, str(tmp_path / "shards"), progress=lambda _: None)
    # The whole image, unchanged but for the padding to a common size.
    still = AugmentationConfig(
        scale_range=(1.0, 1.0),
        max_class_fraction=1.0,
        flip_probability=0.0,
        brightness=0.0,
        contrast=(1.0, 1.0),
        saturation=(1.0, 1.0),
        hue=0.0,
    )
    seen = 0
    for split in ("train", "val"):
        whole = {sample.key: sample for sample in EvalLoader(shard_set, split)}
        loader = TrainLoader(shard_set, split, crop=(40, 40), augmentation=still, seed=0, global_batch_size=len(whole))
        batch = next(iter(loader))
        assert set(batch.keys) == set(whole)
        for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
            height, width = expected[key.replace("%2E", ".").replace("%2F", "/")].shape
            np.testing.assert_array_equal(label[:height, :width], whole[key].label, err_msg=key)
            assert (label[height:] == 255).all()
            assert (label[:, width:] == 255).all()
            difference = image[:, :height, :width].int() - whole[key].image.int()
            assert difference.abs().max() <= 4, key
            seen += 1
    assert seen == len(expected)


@pytest.mark.parametrize("packed", [False, True])
def test_end_to_end__remote_root_gives_the_same_shards(tmp_path: Path, packed: bool) -> None:
    names = ("a", "b.c", "n/ключ", "d", "e")
    local = make_folder(tmp_path / "data", names)
    memory = fsspec.filesystem("memory")
    base = f"/remote_folder_{packed}"
    if packed:
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            archive.add(local, "data")
        memory.pipe(f"{base}/data.tar", (tmp_path / "data.tar").read_bytes())
    else:
        for file in local.rglob("*.*"):
            memory.pipe(f"{base}/{file.relative_to(local).as_posix()}", file.read_bytes())
    digests = [
        prepare_shards(config_of(root), str(tmp_path / f"shards{number}"), progress=lambda _: None).digest
        for number, root in enumerate((str(local), f"memory:/{base}"))
    ]
    assert digests[0] == digests[1]


CVAT = "# label:color_rgb:parts:actions\nsky:0,0,0::\nroad:128,0,0::\ncar:0,128,0::\n"
COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)


def with_palette(indices: NDArray[np.uint8], colours: list[list[int]]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([level for colour in colours for level in colour])
    return image


def ids_without_ignored(seed: int) -> NDArray[np.uint8]:
    return np.where(label_map(seed) == 255, 0, label_map(seed)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["colours", "transparent", "same order", "sorted anew", "greys", "no palette"])
def test_colours__read_by_the_classes_file_whatever_the_indices(tmp_path: Path, kind: str) -> None:
    root, ids = make_folder(tmp_path, classes=CVAT), ids_without_ignored(3)
    order = COLOURS.tolist()
    written = {
        "colours": lambda: Image.fromarray(COLOURS[ids]),
        "transparent": lambda: Image.fromarray(COLOURS[ids]).convert("RGBA"),
        "same order": lambda: with_palette(ids, order),
        "sorted anew": lambda: with_palette((2 - ids).astype(np.uint8), order[::-1]),
        "greys": lambda: with_palette(ids, [[0] * 3, [1] * 3, [2] * 3]),
        "no palette": lambda: Image.fromarray(ids),
    }
    put(root, "a", written[kind](), 3)
    dataset = open_folder(root)
    pair = dataset.read(next(iter(dataset.samples("train"))))
    np.testing.assert_array_equal(pair.label, ids)
    assert not pair.index_colours
    assert dataset.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (
            Image.new("RGB", (WIDTH, HEIGHT), (1, 0, 0)),
            r"has 1 colour\(s\) that no class has: \[1, 0, 0\] \(768 pixels\)",
        ),
        (
            with_palette(np.ones((HEIGHT, WIDTH), np.uint8), [[0, 0, 0], [7, 7, 8]]),
            r"has the colour \[7, 7, 8\] at index 1 of its palette, where classes.txt says \[128, 0, 0\]",
        ),
    ],
)
def test_colours__that_contradict_the_classes_file_are_rejected(
    tmp_path: Path, label: Image.Image, problem: str
) -> None:
    root = make_folder(tmp_path, classes=CVAT)
    put(root, "a", label, 0)
    dataset = open_folder(root)
    with pytest.raises(RejectedSampleError, match=problem):
        dataset.read(next(iter(dataset.samples("train"))))


def test_colours__without_a_class(tmp_path: Path) -> None:
    root, ids = make_folder(tmp_path), label_map(3)
    content = {"names": ["sky", "road", "car"], "palette": COLOURS.tolist(), "ignore_colours": [[224, 224, 192]]}
    (root / "classes.json").write_text(json.dumps(content))
    table = np.full((256, 3), (224, 224, 192), np.uint8)
    table[:3] = COLOURS
    for label in (Image.fromarray(table[ids]), with_palette(ids, table.tolist())):
        put(root, "a", label, 3)
        dataset = open_folder(root, classes="classes.json")
        np.testing.assert_array_equal(dataset.read(next(iter(dataset.samples("train")))).label, ids)


@pytest.mark.parametrize("samples_per_shard", [1, 128])
def test_colours__each_file_with_a_palette_of_its_own_is_refused(tmp_path: Path, samples_per_shard: int) -> None:
    root, colours = make_folder(tmp_path / "data", ("a", "b", "c")), COLOURS.tolist()
    for seed, name in enumerate("abc"):
        put(root, name, with_palette(ids_without_ignored(seed), colours), seed)
    config = config_of(root).model_copy(update={"samples_per_shard": samples_per_shard})
    # All alike: indices are ids, as before.
    prepare_shards(config, str(tmp_path / "alike"), progress=lambda _: None)
    put(root, "b", with_palette(ids_without_ignored(1), colours[::-1]), 1)
    with pytest.raises(
        UserError, match=r"b\.png has the colour .* of its palette, where .*a\.png has .*: each file has"
    ):
        prepare_shards(config, str(tmp_path / "shards"), progress=lambda _: None)
    assert not (tmp_path / "shards/manifest.json").exists()


def binary_folder(root: Path, classes: str, name: str = "classes.txt") -> Path:
    """Masks of 0 and 255, as many label tools export them."""
    make_folder(root, classes="background\nobject\n")
    for seed, stem in enumerate("abc"):
        put(root, stem, np.where(label_map(seed) == 1, 255, 0).astype(np.uint8), seed)
    (root / name).write_text(classes)
    return root


def test_classes_without_pixels__are_refused_and_0_255_is_named(tmp_path: Path) -> None:
    root = binary_folder(tmp_path / "data", "background\nobject\n")
    target = str(tmp_path / "shards")
    message = (
        r"folder: train shows no pixel of 'object'; val shows no pixel of 'object'; .* \(\d+\.\d% of the pixels are "
        r"ignored: where 255 is the id of a class, .* "
        r"\{names: \[background, object\], ids: \[0, 255\], ignore_ids: \[\]\}\)"
    )
    with pytest.raises(UserError, match=message):
        prepare_shards(config_of(root), target, progress=lambda _: None)
    assert not (tmp_path / "shards/manifest.json").exists()

    said: list[str] = []
    allowed = config_of(root).model_copy(update={"classes_without_pixels": "allow"})
    prepare_shards(allowed, target, progress=said.append)
    assert any("train shows no pixel of 'object'" in line for line in said)
    # What is there already is judged, too.
    with pytest.raises(UserError, match="train shows no pixel of 'object'"):
        prepare_shards(config_of(root), target, progress=lambda _: None)


def test_classes_without_pixels__0_255_with_the_remedy(tmp_path: Path) -> None:
    content = "{names: [background, object], ids: [0, 255], ignore_ids: []}"
    root = binary_folder(tmp_path / "data", content, "classes.yaml")
    shard_set = prepare_shards(config_of(root, classes="classes.yaml"), str(tmp_path / "s"), progress=lambda _: None)
    reader = open_shard_set(shard_set)
    for split, seeds in (("train", (0, 1)), ("val", (2,))):
        wanted = [int((label_map(seed) == 1).sum()) for seed in seeds]
        counts = count_classes(reader, split)
        assert counts.pixels.tolist() == [counts.num_pixels - sum(wanted), sum(wanted)]


def test_end_to_end__unreadable_kinds_are_quarantined_with_a_remedy(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", tuple(f"good{number}" for number in range(3)))
    put(root, "tiff", label_map(10), 10)
    (root / "images/tiff.jpg").unlink()
    picture(10).save(root / "images/tiff.tif", save_all=True, append_images=[picture(11)])
    put(root, "colour", Image.new("RGB", (WIDTH, HEIGHT)), 11)
    put(root, "two_bits", label_map(12), 12)
    buffer = io.BytesIO()
    Image.new("1", (WIDTH, HEIGHT)).save(buffer, "PNG")
    (root / "labels/two_bits.png").write_bytes(buffer.getvalue())
    (root / "splits/train.txt").write_text("good0\ngood1\ntiff\ncolour\ntwo_bits\n")
    config = DataConfig(dataset="folder", root=str(root), on_bad_sample="quarantine", max_quarantined_fraction=1.0)
    shard_set = prepare_shards(config, str(tmp_path / "shards"), progress=lambda _: None)
    rows = pq.read_table(tmp_path / "shards/quarantine.parquet").to_pylist()
    reasons = {row["key"]: row["reason"] for row in rows}
    assert shard_set.num_quarantined == 3
    assert reasons["tiff"] == "holds 2 pages, and which of them is labelled cannot be told; save one alone"
    assert reasons["colour"] == "is a colour picture, and classes.txt gives its classes no colours"
    assert reasons["two_bits"].startswith("is greyscale of 1 bits, which may mean two ids; save it with 8 bits")
    assert all(row["remedy"] for row in rows)
    image, _ = open_image((root / "images/good0.jpg").read_bytes())
    assert image.size == (WIDTH, HEIGHT)
