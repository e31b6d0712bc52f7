"""Damage is found before the first batch: a flipped byte, a swapped, cut or missing file, another shard set."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import AugmentationConfig, DataConfig, DigitsConfig
from pipeline.records import ShardSet
from pipeline.shards.loader import TrainLoader
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_check import ShardCheck, check_shard_set
from pipeline.shards.shards import ShardSetError
from pipeline.storage.file_stamps import file_stamps


def make_set(folder: Path, seed: int) -> ShardSet:
    digits = DigitsConfig(num_train=9, num_val=4)
    config = DataConfig(dataset="digits", samples_per_shard=4, digits=digits, seed=seed)
    return prepare_shards(config, str(folder), progress=lambda _: None)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, ShardSet]:
    folder = tmp_path_factory.mktemp("originals")
    return make_set(folder / "first", 0), make_set(folder / "second", 1)


@pytest.fixture
def copied(originals: tuple[ShardSet, ShardSet], tmp_path: Path) -> ShardSet:
    storage.publish_folder(originals[0].uri, str(tmp_path / "copy"))
    # A file that has just been written is not remembered.
    time.sleep(0.05)
    return originals[0].model_copy(update={"uri": str(tmp_path / "copy")})


def flip_byte(file: Path, place: int) -> None:
    about = file.stat()
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    # As a careless copy leaves it.
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_check__whole_set_is_read_once_a_machine(copied: ShardSet, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    stamps = file_stamps(copied.uri)
    train = [name for name in stamps if name.startswith("train-") or name == "index.parquet"]
    num_bytes = sum(stamps[name].num_bytes for name in train)
    assert len(train) == 4
    assert check_shard_set(copied, ["train"], cache_folder=cache) == ShardCheck(copied, 4, 0, num_bytes)
    assert check_shard_set(copied, ["train"], cache_folder=cache) == ShardCheck(copied, 0, 4, 0)
    num_bytes = stamps["val-00000.tar"].num_bytes + stamps["quarantine.parquet"].num_bytes
    assert check_shard_set(copied, cache_folder=cache) == ShardCheck(copied, 2, 4, num_bytes)
    # Only what changed is read again, even when it comes out the same.
    (Path(copied.uri) / "train-00001.tar").touch()
    assert check_shard_set(copied, cache_folder=cache).num_read == 1


def test_check__flipped_byte(copied: ShardSet, tmp_path: Path) -> None:
    check_shard_set(copied, cache_folder=tmp_path)
    flip_byte(Path(copied.uri) / "train-00001.tar", 5000)
    for _ in range(2):
        with pytest.raises(ShardSetError, match=r"train-00001\.tar differs from the manifest in its sha256; prepare"):
            check_shard_set(copied, ["train"], cache_folder=tmp_path)
    check_shard_set(copied, ["val"], cache_folder=tmp_path)


def test_check__swapped_shards_of_equal_size(copied: ShardSet, tmp_path: Path) -> None:
    folder = Path(copied.uri)
    first, second = folder / "train-00000.tar", folder / "train-00001.tar"
    contents = first.read_bytes(), second.read_bytes()
    longest = max(map(len, contents))
    contents = contents[0].ljust(longest, b"\0"), contents[1].ljust(longest, b"\0")
    assert contents[0] != contents[1]
    # The manifest of padded tars is right about the sizes, so that only the sums can tell.
    manifest = storage.read_json(str(folder / "manifest.json"))
    for place in (0, 1):
        manifest["splits"]["train"][place]["num_bytes"] = longest
    storage.publish_json(str(folder / "manifest.json"), manifest)
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(ShardSetError, match=r"train-00000\.tar differs from the manifest in its sha256"):
        check_shard_set(copied.uri, cache_folder=tmp_path / "cache")
    with pytest.raises(ShardSetError, match="holds another shard set now"):
        check_shard_set(copied, cache_folder=tmp_path / "cache")


def test_check__truncated_and_missing_shards_need_no_reading(
    copied: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "file_digest", lambda uri: pytest.fail(f"{uri} was read"))
    shard = Path(copied.uri) / "val-00000.tar"
    size = shard.stat().st_size
    os.truncate(shard, size - 512)
    message = rf"val-00000\.tar has {size - 512} bytes, the manifest says {size}; prepare it again"
    with pytest.raises(ShardSetError, match=message):
        check_shard_set(copied, ["train"], cache_folder=tmp_path)
    shard.unlink()
    with pytest.raises(ShardSetError, match=r"val-00000\.tar is missing; prepare the shard set again"):
        check_shard_set(copied, cache_folder=tmp_path)
    (Path(copied.uri) / "manifest.json").unlink()
    with pytest.raises(ShardSetError, match=r"manifest\.json is missing; prepare it first"):
        check_shard_set(copied, cache_folder=tmp_path)


def test_check__swapped_index(copied: ShardSet, originals: tuple[ShardSet, ShardSet], tmp_path: Path) -> None:
    index = Path(copied.uri) / "index.parquet"
    index.write_bytes((Path(originals[1].uri) / "index.parquet").read_bytes())
    with pytest.raises(ShardSetError, match=r"index\.parquet differs from the manifest in its sha256"):
        check_shard_set(copied, cache_folder=tmp_path)
    index.unlink()
    with pytest.raises(ShardSetError, match=r"index\.parquet is missing"):
        check_shard_set(copied, cache_folder=tmp_path)


def test_check__another_set_at_the_place(originals: tuple[ShardSet, ShardSet], tmp_path: Path) -> None:
    first, second = originals
    moved = first.model_copy(update={"uri": second.uri})
    message = f"{re.escape(second.uri)} holds another shard set now .*expected {first.digest[:12]}.; prepare it again"
    with pytest.raises(ShardSetError, match=message):
        check_shard_set(moved, cache_folder=tmp_path)


def test_check__remote_set_and_no_cache(copied: ShardSet, tmp_path: Path) -> None:
    for file in Path(copied.uri).iterdir():
        if file.is_file():
            storage.publish_bytes(f"memory://checked/{file.name}", file.read_bytes())
    remote = copied.model_copy(update={"uri": "memory://checked"})
    assert check_shard_set(remote, cache_folder=tmp_path).num_read == 6
    assert check_shard_set(remote, cache_folder=tmp_path).num_read == 0
    # A file in the place of the cache folder: the sums are made, not cached.
    (tmp_path / "file").touch()
    assert check_shard_set(remote, cache_folder=tmp_path / "file").num_read == 6
    damaged = bytearray(storage.read_bytes("memory://checked/val-00000.tar"))
    damaged[700] ^= 4
    storage.publish_bytes("memory://checked/val-00000.tar", bytes(damaged))
    with pytest.raises(ShardSetError, match=r"val-00000\.tar differs"):
        check_shard_set(remote, cache_folder=tmp_path)


def test_check__damaged_cache_is_as_none(copied: ShardSet, tmp_path: Path) -> None:
    check_shard_set(copied, cache_folder=tmp_path)
    (file,) = tmp_path.glob("*.json")
    for content in ("{", "[]", '{"index.parquet": 3, "train-00000.tar": [1]}'):
        file.write_text(content)
        assert check_shard_set(copied, cache_folder=tmp_path).num_read == 6


def test_check__logs_when_much_is_to_be_read(copied: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.shard_check._LOG_FROM_BYTES", 1)
    lines: list[str] = []
    check_shard_set(copied, cache_folder=tmp_path, log=lines.append)
    check_shard_set(copied, cache_folder=tmp_path, log=lines.append)
    assert lines == [f"checking 6 files of {copied.uri}, 0.0 GiB, for the first time on this machine"]


@pytest.mark.parametrize("swapped", ["other samples", "other shards", "outside"])
def test_loader__an_index_that_does_not_fit_is_refused_before_the_first_batch(
    copied: ShardSet, tmp_path: Path, swapped: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = Path(copied.uri) / "index.parquet"
    table = pq.read_table(file)
    if swapped == "other samples":
        table, message = table.slice(1), r"has 3 samples of train-00000\.tar, the manifest says 4"
    elif swapped == "other shards":
        rows = table.to_pylist()
        table = pa.Table.from_pylist([*rows, {**rows[0], "shard": "other.tar"}], table.schema)
        message = r"names shard other\.tar, which the manifest does not"
    else:
        rows = table.to_pylist()
        rows[2]["label_offset"] += 10**6
        table, message = pa.Table.from_pylist(rows, table.schema), r"puts sample train-000002 outside of train-00000"
    pq.write_table(table, file)
    with pytest.raises(ShardSetError, match=message):
        TrainLoader(copied, crop=(56, 56), augmentation=AugmentationConfig(), seed=0, global_batch_size=2)
