"""Sequential reading: what is asked of storage, and what comes when storage fails."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config import DataConfig, DigitsConfig
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.sample_stream import SampleStream
from pipeline.shards.shard_reader import ShardReader
from pipeline.shards.shard_streams import read_shard_streams
from pipeline.shards.shards import ShardSetError

NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    digits = DigitsConfig(num_train=NUM_SAMPLES, num_val=1)
    config = DataConfig(dataset="digits", samples_per_shard=13, digits=digits)
    return prepare_shards(config, str(tmp_path_factory.mktemp("streams")), progress=lambda _: None).uri


class CountingReader(ShardReader):
    """Notes every range that is read."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.ranges: list[tuple[str, int, int]] = []

    def _read_local(self, name: str, start: int, end: int) -> bytes:
        self.ranges.append((name, start, end))
        return super()._read_local(name, start, end)


def test_shard_streams__samples_are_those_of_random_access(uri: str) -> None:
    reader = ShardReader(uri)
    index = reader.index("train")
    stream = SampleStream(NUM_SAMPLES, 3, shards=index.shard, num_shard_streams=6, buffer=5)
    steps = list(itertools.islice(read_shard_streams(reader, index, stream, range(6), 2), 20))
    drawn = [pair for step in steps for pair in step]
    assert [draw for draw, _ in drawn] == stream.draws(2 * 6, 22 * 6)
    for draw, sample in drawn:
        assert sample == reader.read(index, draw.sample)


def test_shard_streams__each_byte_is_read_once_an_epoch_in_few_requests(uri: str) -> None:
    reader = CountingReader(uri)
    index = reader.index("train")
    stream = SampleStream(NUM_SAMPLES, 0, shards=index.shard, num_shard_streams=4, buffer=5)
    streams = read_shard_streams(reader, index, stream, range(4), 0)
    list(itertools.islice(streams, NUM_SAMPLES // 4))
    streams.close()  # type: ignore[attr-defined]
    # What the streams asked for ahead belongs to the next epoch; it may or may not have come yet.
    wanted: list[tuple[str, int, int]] = []
    for shard_stream in range(4):
        position = shard_stream
        while position < NUM_SAMPLES:
            end = stream.block_end(position)
            samples = sorted(draw.sample for draw in stream.draws(position, end, 4))
            for shard, group in itertools.groupby(samples, key=lambda sample: int(index.shard[sample])):
                members = list(group)
                last = members[-1]
                stop = int(index.label_offset[last] + index.label_size[last])
                wanted.append((index.shard_names[shard], int(index.image_offset[members[0]]), stop))
                assert members == list(range(members[0], last + 1))
            position += len(samples) * 4
    assert not set(wanted) - set(reader.ranges)
    # 10 samples a shard stream make 2 or 3 blocks, and each end of a shard cuts one block in two.
    assert 4 * 2 <= len(wanted) <= 4 * 3 + 3
    for left, right in itertools.pairwise(sorted(wanted)):
        assert left[0] != right[0] or left[2] <= right[1]


def test_shard_streams__read_remote_shards(uri: str) -> None:
    for file in Path(uri).iterdir():
        if file.is_file():
            storage.publish_bytes(f"memory://streams/{file.name}", file.read_bytes())
    taken = []
    for place in (uri, "memory://streams"):
        reader = ShardReader(place)
        index = reader.index("train")
        stream = SampleStream(NUM_SAMPLES, 1, shards=index.shard, num_shard_streams=5, buffer=4)
        taken.append(list(itertools.islice(read_shard_streams(reader, index, stream, range(1, 4), 3), 12)))
    assert taken[0] == taken[1]


def test_shard_streams__end_their_threads(uri: str) -> None:
    reader = ShardReader(uri)
    index = reader.index("train")
    stream = SampleStream(NUM_SAMPLES, 0, shards=index.shard, num_shard_streams=4, buffer=5)
    streams = read_shard_streams(reader, index, stream, range(4), 0)
    next(streams)
    streams.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("segvit-shard-streams"):
            thread.join(10)
            assert not thread.is_alive()


def test_shard_streams__missing_and_short_shards_are_named(uri: str, tmp_path: Path) -> None:
    reader = ShardReader(uri)
    index = reader.index("train")
    for file in Path(uri).iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    stream = SampleStream(NUM_SAMPLES, 0, shards=index.shard, num_shard_streams=4, buffer=5)
    shard = tmp_path / "train-00001.tar"
    for damage, message in (
        (lambda: shard.write_bytes(shard.read_bytes()[:2000]), r"train-00001\.tar ends before byte \d+; prepare it"),
        (shard.unlink, r"shard .*train-00001\.tar is missing; prepare the shard set again"),
    ):
        damage()
        with pytest.raises(ShardSetError, match=message):
            list(itertools.islice(read_shard_streams(ShardReader(str(tmp_path)), index, stream, range(4), 0), 40))
