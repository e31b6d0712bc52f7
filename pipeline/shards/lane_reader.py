"""Sequential reading of a lane-ordered sample stream: blocks of samples, one request a block, fetched ahead."""

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


def read_lanes(
    reader: ShardReader, index: SplitIndex, stream: SampleStream, lanes: Sequence[int], start_step: int
) -> Iterator[list[DrawnSample]]:
    """For each step from `start_step` on, for ever, the samples of `lanes` in their order.

    A lane reads the shards of its part from their beginning to their end, a block a request, each byte once an
    epoch; a resumed lane asks for the rest of its block again. Two blocks a lane are in memory.
    Raises ShardSetError for a shard that is missing or too short.
    """
    pool = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="segvit-lanes")
    try:
        walks = [_walk(reader, index, stream, start_step * stream.lanes + lane, pool) for lane in lanes]
        while True:
            yield [next(walk) for walk in walks]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _walk(
    reader: ShardReader, index: SplitIndex, stream: SampleStream, position: int, pool: ThreadPoolExecutor
) -> Iterator[DrawnSample]:
    def request(first: int) -> _Ahead:
        draws = stream.draws(first, stream.block_end(first), stream.lanes)
        content = pool.submit(reader.read_block, index, [draw.sample for draw in draws])
        return _Ahead(draws, content, first + len(draws) * stream.lanes)

    ahead = request(position)
    while True:
        block, ahead = ahead, request(ahead.next_position)
        samples = block.content.result()
        for draw in block.draws:
            yield draw, samples[draw.sample]
