"""Parquet files of images and label maps: pixels, splits, names, classes, and files that lie."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RejectedSampleError, open_dataset, parquet_rows
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_reader import open_shard_set
from segvit.image_files import decode_label, encode_png
from tests.pipeline.datasets.layouts import VOID, label_of, pack

NAMES = {"0": "ground", "1": "thing"}
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture_of(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (*VOID.shape, 3), dtype=np.uint8))


def rows_of(numbers: Sequence[int], image: str = "image", label: str = "label") -> dict[str, list[Any]]:
    return {
        image: [{"bytes": picture_of(number), "path": f"f{number}.jpg"} for number in numbers],
        label: [{"bytes": encode_png(label_of(number)), "path": None} for number in numbers],
    }


def write(file: Path, rows: dict[str, list[Any]], features: Any = None, kinds: Any = None) -> Path:
    """Row groups of two."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fields = [(name, (kinds or {}).get(name, PICTURE)) for name in rows]
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else {}
    pq.write_table(pa.table(rows, pa.schema(fields, metadata)), file, row_group_size=2)
    return file


def make(root: Path, **config: Any) -> Path:
    write(root / "data/train-00000-of-00002.parquet", rows_of([0, 1, 2], **config))
    write(root / "data/train-00001-of-00002.parquet", rows_of([3, 4], **config))
    write(root / "data/validation-00000-of-00001.parquet", rows_of([5, 6, 7], **config))
    (root / "id2label.json").write_text(json.dumps(NAMES))
    return root


def open_parquet(root: Path | str, **config: Any) -> RawDataset:
    return open_dataset(DataConfig.model_validate({"dataset": "parquet", "root": str(root), "parquet": config}))


def keys(dataset: RawDataset) -> dict[str, list[str]]:
    return {split: [sample.key for sample in dataset.samples(split)] for split in dataset.splits()}


def test_rows__are_images_and_label_maps_in_any_order(tmp_path: Path) -> None:
    dataset = open_parquet(make(tmp_path))
    assert dataset.class_names == ("ground", "thing")
    assert keys(dataset) == {"train": ["f0", "f1", "f2", "f3", "f4"], "val": ["f5", "f6", "f7"]}
    sent: RawDataset = pickle.loads(pickle.dumps(dataset))
    samples = list(dataset.samples("train"))
    for number in (0, 1, 1, 4, 2, 0, 3):
        pair = sent.read(pickle.loads(pickle.dumps(samples[number])))
        assert pair.image == picture_of(number)
        np.testing.assert_array_equal(pair.label, label_of(number))
    assert samples[3].image == f"{tmp_path}/data/train-00001-of-00002.parquet#0/image"
    assert len({sample.stamp for sample in samples[:3]}) == 3


@pytest.mark.parametrize(
    ("image", "label", "config"),
    [
        ("img", "mask", {}),
        ("pixel_values", "segmentation", {}),
        ("Image", "annotation", {}),
        ("photo", "truth", {"image": "photo", "label": "truth"}),
    ],
)
def test_columns__by_their_usual_names_or_as_set(tmp_path: Path, image: str, label: str, config: Any) -> None:
    dataset = open_parquet(make(tmp_path, image=image, label=label), **config)
    np.testing.assert_array_equal(dataset.read(dataset.samples("val")[0]).label, label_of(5))


def test_columns__plain_binary_is_named_by_file_and_row(tmp_path: Path) -> None:
    rows = {name: [cell["bytes"] for cell in cells] for name, cells in rows_of([0, 1, 2]).items()}
    rows["label"] = [{"bytes": label} for label in rows["label"]]
    kinds = {"image": pa.large_binary(), "label": pa.struct([("bytes", pa.binary())])}
    write(tmp_path / "train.parquet", rows, kinds=kinds)
    write(tmp_path / "valid.parquet", rows_of([3, 3]))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    dataset = open_parquet(tmp_path)
    assert keys(dataset) == {
        "train": ["train%2F000000", "train%2F000001", "train%2F000002"],
        "val": ["valid%2F000000", "valid%2F000001"],  # one path twice is no name
    }
    pair = dataset.read(dataset.samples("train")[2])
    assert pair.image == picture_of(2)
    np.testing.assert_array_equal(pair.label, label_of(2))


def test_columns__that_are_none_or_several_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", {**rows_of([0, 1]), "mask": rows_of([0, 1])["label"]})
    with pytest.raises(UserError, match=r"has pictures in label, mask; set data\.parquet\.label to one of image \(pic"):
        open_parquet(tmp_path)
    write(file, {"image": rows_of([0])["image"], "label": [3]}, kinds={"label": pa.int64()})
    with pytest.raises(
        UserError, match=r"has no pictures in a column mask, label, .* image \(pictures\), label \(int64"
    ):
        open_parquet(tmp_path)
    with pytest.raises(UserError, match=r"has no pictures in a column truth; set data\.parquet\.label"):
        open_parquet(tmp_path, label="truth")


def test_splits__drawn_from_train_stay_as_rows_are_added(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    write(tmp_path / "all.parquet", rows_of(range(6)))
    write(tmp_path / "more.parquet", rows_of([6, 7]))
    drawn = keys(open_parquet(tmp_path, val_fraction=0.4))
    assert sorted(drawn["train"] + drawn["val"]) == [f"f{number}" for number in range(8)]
    write(tmp_path / "more.parquet", rows_of([8, 6, 7]))
    assert set(drawn["val"]) <= set(keys(open_parquet(tmp_path, val_fraction=0.4))["val"])
    with pytest.raises(UserError, match=r"has no Parquet file for val; set data\.parquet\.val_fraction"):
        open_parquet(tmp_path).splits()
    write(tmp_path / "default/test/0000.parquet", rows_of([9]))
    with pytest.raises(UserError, match=r"all\.parquet has no split in its name, and other files have"):
        open_parquet(tmp_path)


def test_splits__of_folders_and_those_that_are_not_whole(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        write(tmp_path / f"default/{split}/0000.parquet", rows_of([number]))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    assert keys(open_parquet(tmp_path)) == {"train": ["f0"], "val": ["f1"], "test": ["f2"]}
    with pytest.raises(UserError, match=r"has its own val split, default/validation/0000\.parquet, and"):
        open_parquet(tmp_path, val_fraction=0.5).splits()
    write(tmp_path / "default/train/train-00001-of-00003.parquet", rows_of([5]))
    with pytest.raises(UserError, match=r"train-00001-of-00003\.parquet is one of 3 parts, and part 0 is missing"):
        open_parquet(tmp_path)


CLASSES = {"names": ["ground", "thing"], "_type": "ClassLabel"}
SCENES = {"names": ["kitchen", "street"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    "features",
    [
        {"label": {"_type": "Image", "classes": CLASSES}, "scene": SCENES},
        {"objects": {"feature": {"category": CLASSES}, "_type": "Sequence"}, "scene": SCENES},
        {"objects": [{"category": CLASSES}]},
    ],
)
def test_classes__of_pixels_in_the_metadata(tmp_path: Path, features: Any) -> None:
    write(tmp_path / "train.parquet", rows_of([0, 1]), features)
    dataset = open_parquet(tmp_path, val_fraction=0.5)
    assert dataset.class_names == ("ground", "thing")
    (tmp_path / "names.txt").write_text("floor\nchair\n")
    assert open_parquet(tmp_path, val_fraction=0.5, classes="names.txt").class_names == ("floor", "chair")


def test_classes__of_images_are_none_of_pixels(tmp_path: Path) -> None:
    deep: Any = [CLASSES]
    for _ in range(500):
        deep = [deep]
    for features in ({"scene": SCENES}, {"deep": deep}, [CLASSES], {"a": [CLASSES], "b": [SCENES]}):
        write(tmp_path / "train.parquet", rows_of([0, 1]), features)
        with pytest.raises(UserError, match=r"nothing names the classes of .*: write id2label\.json or classes\.txt"):
            open_parquet(tmp_path)
    write(tmp_path / "train.parquet", rows_of([0, 1]), {"classes": [CLASSES]})
    write(tmp_path / "val.parquet", rows_of([2]), {"classes": [SCENES]})
    with pytest.raises(UserError, match=r"train\.parquet and .*val\.parquet name other classes"):
        open_parquet(tmp_path)


def test_labels__by_colour_where_the_classes_have_colours(tmp_path: Path) -> None:
    colours = np.array([[0, 0, 0], [10, 20, 30]], np.uint8)
    rows = rows_of([0, 1])
    rows["label"] = [{"bytes": encode_png(colours[label_of(number)]), "path": None} for number in (0, 1)]
    write(tmp_path / "train.parquet", rows)
    classes = {"names": ["ground", "thing"], "palette": colours.tolist()}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    dataset = open_parquet(tmp_path, classes="classes.json", val_fraction=0.5)
    labels = {sample.key: dataset.read(sample).label for split in dataset.splits() for sample in dataset.samples(split)}
    for number in (0, 1):
        np.testing.assert_array_equal(labels[f"f{number}"], label_of(number))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    plain = open_parquet(tmp_path, val_fraction=0.5)
    with pytest.raises(RejectedSampleError, match=r"is a colour picture, .* palette in data\.parquet\.classes"):
        plain.read(plain.samples("train")[0])


def test_rows__without_a_usable_picture_are_rejected(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.fromarray(label_of(0)).save(jpeg, "JPEG")
    rows = rows_of(range(4))
    rows["image"][0] = {"bytes": None, "path": "/etc/passwd"}
    rows["label"][1] = None
    rows["label"][2] = {"bytes": jpeg.getvalue(), "path": "x.png"}
    rows["label"][3] = {"bytes": encode_png(label_of(0) * 7), "path": None}
    make(tmp_path)
    write(tmp_path / "data/validation-00000-of-00001.parquet", rows)
    dataset = open_parquet(tmp_path)
    problems = (
        "#0/image holds no bytes of a picture, at most its path",
        "#1/label holds no bytes",
        "#2/label is JPEG, which changes ids",
        r"#3/label holds label id 7, outside the class list \(0-1 id2label.json",
    )
    for sample, problem in zip(dataset.samples("val"), problems, strict=True):
        with pytest.raises(RejectedSampleError, match=problem):
            dataset.read(sample)


def test_files__that_are_none_or_damaged(tmp_path: Path) -> None:
    make(tmp_path)
    dataset = open_parquet(tmp_path)
    sample = dataset.samples("train")[1]
    file = tmp_path / "data/train-00000-of-00002.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(RejectedSampleError, match=r"#1 cannot be read"):
        dataset.read(sample)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet cannot be read as Parquet .* `git lfs pull`"):
        open_parquet(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_parquet(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no Parquet file; add those for train"):
        open_parquet(tmp_path / "empty")
    write(tmp_path / "packed/train.parquet", rows_of([0]))
    packed = pack(tmp_path / "packed")
    with pytest.raises(UserError, match=r"train\.parquet lies in an archive, where single rows cannot be read; unpack"):
        open_parquet(packed)


def test_row_groups__are_bounded_and_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    dataset = open_parquet(tmp_path)
    opened: list[list[int]] = []
    kept = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, batch_size: int, row_groups: list[int], **settings: Any) -> Any:
        assert batch_size == 1
        opened.append(row_groups)
        return kept(self, batch_size, row_groups=row_groups, **settings)

    samples = list(dataset.samples("val"))
    parquet_rows._open_rows.cache_clear()
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    for sample in samples:
        dataset.read(sample)
    assert opened == [[0], [1]]
    monkeypatch.undo()
    monkeypatch.setattr(parquet_rows, "MAX_GROUP_BYTES", 100)
    with pytest.raises(UserError, match=r"bytes in one row group, more than the 100 allowed; write it with row_"):
        open_parquet(tmp_path)


def test_end_to_end__to_shards_from_memory(tmp_path: Path) -> None:
    make(tmp_path / "data")
    root = "memory://parquet_data"
    for file in (tmp_path / "data").rglob("*.*"):
        storage.publish_bytes(f"{root}/{file.relative_to(tmp_path / 'data')}", file.read_bytes())
    config = DataConfig.model_validate({"dataset": "parquet", "root": root})
    shards = prepare_shards(config, str(tmp_path / "shards"), progress=lambda _: None)
    assert {split: one.num_samples for split, one in shards.splits.items()} == {"train": 5, "val": 3}
    reader = open_shard_set(shards)
    index = reader.index("train")
    for number in range(5):
        np.testing.assert_array_equal(decode_label(reader.read(index, number).label), label_of(number))
