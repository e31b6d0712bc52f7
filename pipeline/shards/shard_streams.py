"""Sequential reading of a sample stream in shard streams: blocks of samples, one request a block, fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from pipeline.shards.sample_stream import Draw, SampleStream
from pipeline.shards.shard_reader import SampleBytes, ShardReader, SplitIndex

# Requests under way at a time in one process: enough to hide the latency of remote storage.
MAX_REQUESTS = 4

DrawnSample = tuple[Draw, SampleBytes]


class _Ahead(NamedTuple):
    """A block that is on its way."""

    draws: list[Draw]
    content: Future[dict[int, SampleBytes]]
    next_position: int


def read_shard_streams(
    reader: ShardReader, index: SplitIndex, stream: SampleStream, shard_streams: Sequence[int], start_step: int
) -> Iterator[list[DrawnSample]]:
    """For each step from `start_step` on, for ever, the samples of `shard_streams` in their order.

    A shard stream reads the shards of its part from front to back, a block a request, each byte once an epoch;
    a resumed one asks for the rest of its block again. Two blocks a shard stream are in memory.
    Raises ShardSetError for a shard that is missing or too short.
    """
    pool = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="segvit-shard-streams")
    try:
        streams = [
            _read_blocks(reader, index, stream, start_step * stream.num_shard_streams + shard_stream, pool)
            for shard_stream in shard_streams
        ]
        while True:
            yield [next(samples) for samples in streams]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read_blocks(
    reader: ShardReader, index: SplitIndex, stream: SampleStream, position: int, pool: ThreadPoolExecutor
) -> Iterator[DrawnSample]:
    def request(first: int) -> _Ahead:
        draws = stream.draws(first, stream.block_end(first), stream.num_shard_streams)
        content = pool.submit(reader.read_block, index, [draw.sample for draw in draws])
        return _Ahead(draws, content, first + len(draws) * stream.num_shard_streams)

    ahead = request(position)
    while True:
        block, ahead = ahead, request(ahead.next_position)
        samples = block.content.result()
        for draw in block.draws:
            yield draw, samples[draw.sample]
