"""The shard format: reproducible tars that any WebDataset reader can use, and byte ranges that hit."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline import storage
from pipeline.config import DataConfig, DigitsConfig
from pipeline.datasets import open_dataset
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_check import check_shard_set
from pipeline.shards.shard_reader import open_shard_set
from pipeline.shards.shards import (
    Manifest,
    ShardSetError,
    ShardWriter,
    evenly_spaced,
    read_manifest,
)
from segvit.image_files import decode_label, encode_png

CONFIG = DataConfig(dataset="digits", samples_per_shard=5, digits=DigitsConfig(num_train=12, num_val=6))


def _silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare_shards(CONFIG, str(folder), progress=_silent)
    return folder


@pytest.fixture
def copied_folder(shard_folder: Path, tmp_path: Path) -> Path:
    storage.publish_folder(shard_folder, str(tmp_path / "copy"))
    return tmp_path / "copy"


def test_shard_writer__offsets_hold_the_bytes_that_tarfile_reads() -> None:
    buffer = io.BytesIO()
    writer = ShardWriter(buffer)
    # 512 bytes end on a block, 0 bytes have none, and the last name does not fit the plain tar header.
    samples = {"a": bytes(range(256)) * 2, "b": b"", "c": b"xyz", "ä" * 70: b"long"}
    offsets = {key: writer.add(key, "jpg", data, b"label" + data) for key, data in samples.items()}
    digest = writer.finish()
    data = buffer.getvalue()
    assert digest == hashlib.sha256(data).hexdigest()
    assert len(data) == writer.num_bytes
    assert len(data) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = [name for key in samples for name in (f"{key}.jpg", f"{key}.label.png")]
        assert tar.getnames() == names
        for key, (image_offset, label_offset) in offsets.items():
            for name, offset, content in [
                (f"{key}.jpg", image_offset, samples[key]),
                (f"{key}.label.png", label_offset, b"label" + samples[key]),
            ]:
                member = tar.getmember(name)
                assert (member.offset_data, member.size) == (offset, len(content))
                assert data[offset : offset + len(content)] == content
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
                assert (member.uname, member.gname) == ("", "")


def test_index__ranges_are_the_members_of_the_tars(shard_folder: Path) -> None:
    rows = pq.read_table(shard_folder / "index.parquet").to_pylist()
    assert len(rows) == 18
    for row in rows:
        with tarfile.open(shard_folder / row["shard"]) as tar:
            for kind, name in (("image", f"{row['key']}.png"), ("label", f"{row['key']}.label.png")):
                member = tar.getmember(name)
                assert (member.offset_data, member.size) == (row[f"{kind}_offset"], row[f"{kind}_size"])
            data = tar.extractfile(f"{row['key']}.label.png")
            assert data is not None
            label = np.asarray(Image.open(data))
        assert label.shape == (row["height"], row["width"]) == (112, 112)
        assert row["class_pixels"] == np.bincount(label.ravel(), minlength=11).tolist()


def test_webdataset__reads_the_same_samples(shard_folder: Path) -> None:
    dataset = open_dataset(CONFIG)
    for split, pattern in (("train", "train-{00000..00002}.tar"), ("val", "val-{00000..00001}.tar")):
        plain = webdataset.WebDataset(str(shard_folder / pattern), shardshuffle=False)
        read = {sample["__key__"].rsplit("/", 1)[-1]: sample for sample in plain.decode("rgb8")}
        samples = dataset.samples(split)
        assert set(read) == {sample.key for sample in samples}
        reader = open_shard_set(str(shard_folder))
        index = reader.index(split)
        for number, sample in enumerate(samples):
            content, label, _ = dataset.read(sample)
            np.testing.assert_array_equal(read[sample.key]["png"], np.asarray(Image.open(io.BytesIO(content))))
            ours = reader.read(index, number)
            assert (ours.key, ours.image) == (sample.key, content)
            np.testing.assert_array_equal(decode_label(ours.label), label)
            np.testing.assert_array_equal(read[sample.key]["label.png"][..., 0], label)


def test_reader__survives_pickling_and_many_shards(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.shard_reader.MAX_OPEN_SHARDS", 1)
    reader = open_shard_set(str(shard_folder))
    index = reader.index("train")
    before = [reader.read(index, number) for number in (0, 11, 5, 0)]
    thawed, same_index = pickle.loads(pickle.dumps((reader, index)))
    assert [thawed.read(same_index, number) for number in (0, 11, 5, 0)] == before


def test_reader__remote_ranges(shard_folder: Path) -> None:
    for file in shard_folder.iterdir():
        if file.is_file():
            storage.publish_bytes(f"memory://remote/{file.name}", file.read_bytes())
    assert check_shard_set("memory://remote").shard_set.digest == check_shard_set(str(shard_folder)).shard_set.digest
    local, remote = open_shard_set(str(shard_folder)), open_shard_set("memory://remote")
    for number in range(6):
        assert remote.read(remote.index("val"), number) == local.read(local.index("val"), number)


def test_reader__unknown_split_lists_the_choices(shard_folder: Path) -> None:
    with pytest.raises(ShardSetError, match=r"no split 'test'; choose from train, val"):
        open_shard_set(str(shard_folder)).index("test")


def test_manifest__digest_is_the_content_not_the_place(shard_folder: Path) -> None:
    manifest = read_manifest(str(shard_folder))
    record = manifest.to_record("elsewhere")
    assert record.digest == check_shard_set(str(shard_folder)).shard_set.digest
    assert (record.num_classes, record.splits["train"].num_samples) == (11, 12)
    assert (record.splits["train"].num_shards, record.splits["val"].num_shards) == (3, 2)
    touched = manifest.model_copy(update={"source_digest": "other", "index_sha256": "other"})
    assert touched.digest() == manifest.digest()
    renamed = manifest.model_copy(update={"classes": ("zero", *manifest.classes[1:])})
    assert renamed.digest() != manifest.digest()
    sums = "".join(hashlib.sha256((shard_folder / f"val-0000{n}.tar").read_bytes()).hexdigest() + "\n" for n in (0, 1))
    assert record.splits["val"].digest == hashlib.sha256(sums.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "manifest.json is missing; prepare it first"),
        ("{", "is not JSON"),
        ("[]", "format version None, this code reads 1"),
        ('{"format_version": 9}', "format version 9, this code reads 1"),
        ('{"format_version": 1}', "is damaged at name, classes, palette"),
    ],
)
def test_read_manifest__errors(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ShardSetError, match=message):
        read_manifest(str(tmp_path))


def test_reader__short_shard_is_named(copied_folder: Path) -> None:
    shard = copied_folder / "val-00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    reader = open_shard_set(str(copied_folder))
    with pytest.raises(ShardSetError, match=r"val-00000\.tar ends before byte \d+; prepare it again"):
        reader.read(reader.index("val"), 3)


def test_manifest__is_plain_json(shard_folder: Path) -> None:
    content = json.loads((shard_folder / "manifest.json").read_text())
    assert content["classes"][:2] == ["0", "1"]
    assert content["palette"][10] == [64, 64, 64]
    assert content["ignore_index"] == 255
    assert [shard["num_samples"] for shard in content["splits"]["train"]] == [5, 5, 2]
    assert Manifest.model_validate(content) == read_manifest(str(shard_folder))


def test_evenly_spaced__even_and_within() -> None:
    assert evenly_spaced(10, 3).tolist() == [0, 3, 6]
    assert evenly_spaced(3, None).tolist() == evenly_spaced(3, 5).tolist() == [0, 1, 2]


def test_encode_png__reproducible() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7)).astype(np.uint8)
    assert encode_png(pixels) == encode_png(pixels.copy())
    np.testing.assert_array_equal(decode_label(encode_png(pixels)), pixels)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/x.tar", "a/b.tar", "a\0.tar", "passwd"])
def test_manifest__names_no_file_outside_of_its_folder(shard_folder: Path, tmp_path: Path, name: str) -> None:
    content = json.loads((shard_folder / "manifest.json").read_text())
    content["splits"]["train"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardSetError, match=r"manifest.json is damaged at splits.train.0.name; prepare"):
        read_manifest(str(tmp_path))


def test_manifest__nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ShardSetError, match="is not JSON"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image_offset", 2**62, "puts sample .* outside of train-00000.tar"),
        ("image_size", 2**62, "puts sample .* outside of train-00000.tar"),
        ("label_size", -1, "puts sample .* outside of train-00000.tar"),
        ("label_offset", None, "has samples without a place"),
        ("shard", None, "has samples without a shard"),
        ("shard", "../x.tar", "names shard ../x.tar, which the manifest does not"),
    ],
)
def test_index__places_that_lie(shard_folder: Path, tmp_path: Path, column: str, value: object, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes((shard_folder / "manifest.json").read_bytes())
    rows = pq.read_table(shard_folder / "index.parquet")
    listed = rows.to_pylist()
    listed[0][column] = value
    pq.write_table(pa.Table.from_pylist(listed, rows.schema), tmp_path / "index.parquet")
    with pytest.raises(ShardSetError, match=message):
        open_shard_set(str(tmp_path)).index("train")


def test_index__of_more_rows_than_its_file_can_hold(shard_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((shard_folder / "manifest.json").read_bytes())
    schema = pq.read_schema(shard_folder / "index.parquet")
    nothing = pa.Table.from_arrays([pa.nulls(1 << 22, field.type) for field in schema], schema=schema)
    pq.write_table(nothing, tmp_path / "index.parquet", compression="zstd")
    with pytest.raises(ShardSetError, match=r"says 4194304 rows of \d+ bytes, which \d+ bytes do not hold"):
        open_shard_set(str(tmp_path)).index("train")
