"""The stream's arithmetic: exact coverage, exact positions, orders that suit sequential reading."""

from __future__ import annotations

import itertools
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards.sample_stream import BatchPlan, Draw, SampleStream, share
from tests.examples import num_examples


def shards_of(num_samples: int, num_shards: int) -> np.ndarray:
    return np.arange(num_samples) * num_shards // num_samples


def make_stream(
    num_samples: int,
    *,
    seed: int = 0,
    num_shard_streams: int = 4,
    num_shards: int = 3,
    buffer: int | None = None,
    factors: np.ndarray | None = None,
) -> SampleStream:
    shards = shards_of(num_samples, num_shards)
    return SampleStream(
        num_samples, seed, repeat_factors=factors, shards=shards, num_shard_streams=num_shard_streams, buffer=buffer
    )


def test_order__is_the_seeded_permutation_of_the_epoch() -> None:
    # Written out: a change here would change every run that resumes.
    assert [draw.sample for draw in make_stream(7).draws(0, 14)] == [2, 4, 3, 6, 5, 0, 1, 3, 1, 4, 5, 6, 2, 0]
    for epoch in (0, 1, 5):
        rng = np.random.default_rng([4, 0, epoch])
        expected = rng.permutation(np.arange(100, dtype=np.uint32))
        order, copies = make_stream(100, seed=4).order(epoch)
        np.testing.assert_array_equal(order, expected)
        assert order.dtype == np.uint32
        assert copies is None


def test_order__factors_of_one_change_nothing() -> None:
    assert make_stream(50, factors=np.ones(50)).draws(0, 130) == make_stream(50).draws(0, 130)


@settings(max_examples=num_examples(25), deadline=None)
@given(
    num_samples=st.integers(1, 2000),
    num_shards=st.integers(1, 50),
    batch=st.integers(1, 64),
    ranks=st.integers(1, 16),
    other_ranks=st.integers(1, 16),
    start=st.integers(0, 500),
    seed=st.integers(0, 3),
    buffer=st.sampled_from([None, 1, 3, 16, 5000]),
    repeated=st.booleans(),
)
def test_plan__exactly_once_and_resumable_for_any_numbers(
    num_samples: int,
    num_shards: int,
    batch: int,
    ranks: int,
    other_ranks: int,
    start: int,
    seed: int,
    buffer: int | None,
    repeated: bool,
) -> None:
    batch = max(batch, ranks, other_ranks)
    num_shards = min(num_shards, num_samples)
    factors = np.random.default_rng(seed).uniform(1, 3, num_samples) if repeated else None

    def stream() -> SampleStream:
        return make_stream(
            num_samples, seed=seed, num_shard_streams=batch, num_shards=num_shards, buffer=buffer, factors=factors
        )

    whole = stream()
    first_epoch = whole.epoch_of(max(0, start * batch - 1)) + 1
    num_steps = -(-whole.start(first_epoch + 1) // batch) - start
    # The ranks change on the way, and a rank's plan knows nothing of the steps before its own.
    change = num_steps // 2
    together: list[Draw] = []
    for count, begin, steps in ((ranks, start, change), (other_ranks, start + change, num_steps - change)):
        plans = [BatchPlan(stream(), batch, rank, count, begin) for rank in range(count)]
        for draws in zip(*(itertools.islice(plan, steps) for plan in plans), strict=True):
            sizes = [len(mine) for mine in draws]
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1
            together += [draw for mine in draws for draw in mine]
    assert together == whole.draws(start * batch, (start + num_steps) * batch)
    times = Counter(draw.sample for draw in together if draw.epoch == first_epoch)
    assert set(times) == set(range(num_samples))
    if factors is None:
        assert set(times.values()) == {1}
    else:
        assert all(np.floor(factors[sample]) <= times[sample] <= np.floor(factors[sample]) + 1 for sample in times)
        copies = Counter((draw.sample, draw.repeat) for draw in together if draw.epoch == first_epoch)
        assert copies == Counter((sample, copy) for sample in times for copy in range(times[sample]))


@settings(max_examples=num_examples(15), deadline=None)
@given(
    num_samples=st.integers(1, 1000),
    num_shards=st.integers(1, 50),
    num_shard_streams=st.integers(1, 40),
    buffer=st.integers(1, 40),
    epoch=st.integers(0, 5),
)
def test_shard_streams__walk_through_the_shards_in_blocks(
    num_samples: int, num_shards: int, num_shard_streams: int, buffer: int, epoch: int
) -> None:
    num_shards = min(num_shards, num_samples)
    shards = shards_of(num_samples, num_shards)
    stream = make_stream(num_samples, num_shard_streams=num_shard_streams, num_shards=num_shards, buffer=buffer)
    start, end = stream.start(epoch), stream.start(epoch + 1)
    visited: list[int] = []
    for shard_stream in range(num_shard_streams):
        position = start + (shard_stream - start) % num_shard_streams
        while position < end:
            block = stream.block_of(position)
            block_end = stream.block_end(position)
            samples = [draw.sample for draw in stream.draws(position, block_end, num_shard_streams)]
            positions = range(position, block_end, num_shard_streams)
            assert {stream.block_of(one) for one in positions} == {block}
            assert {stream.block_end(one) for one in positions} == {block_end}
            assert 1 <= len(samples) == len(positions) <= buffer
            # Without gaps: what is read for the block is used by the block.
            by_shard = [sorted(group) for _, group in itertools.groupby(sorted(samples), key=lambda one: shards[one])]
            assert all(group == list(range(group[0], group[-1] + 1)) for group in by_shard)
            visited += sorted(samples, key=lambda one: visited_key(stream, shards, epoch, one))
            position += len(samples) * num_shard_streams
    # One shard_stream after the other, the blocks are the shards from front to back, each shard in one piece.
    assert sorted(visited) == list(range(num_samples))
    pieces = [shard for shard, _ in itertools.groupby(shards[visited])]
    assert len(pieces) == len(set(pieces))
    assert all(
        list(group) == sorted(np.flatnonzero(shards == shard))
        for shard, group in itertools.groupby(visited, key=lambda one: shards[one])
    )


def visited_key(stream: SampleStream, shards: np.ndarray, epoch: int, sample: int) -> tuple[int, int]:
    order = np.random.default_rng([stream.seed, 3, epoch]).permutation(int(shards.max()) + 1)
    return int(order[shards[sample]]), sample


def test_shard_streams__shuffle_anew_each_epoch() -> None:
    stream = make_stream(200, num_shard_streams=8, num_shards=10, buffer=16)
    orders = [tuple(draw.sample for draw in stream.draws(stream.start(e), stream.start(e + 1))) for e in range(4)]
    assert len(set(orders)) == 4
    # A batch takes its samples from many shards.
    shards = shards_of(200, 10)
    batches = [shards[list(orders[0][start : start + 8])] for start in range(0, 200, 8)]
    assert np.mean([len(set(batch.tolist())) for batch in batches]) > 5


def test_shard_streams__do_not_end_their_blocks_together() -> None:
    stream = make_stream(800, num_shard_streams=8, num_shards=10, buffer=16)
    ends = [stream.block_end(shard_stream) // 8 for shard_stream in range(8)]
    assert ends == [16, 14, 12, 10, 8, 6, 4, 2]


def test_repetition__follows_the_factors_over_epochs() -> None:
    factors = np.array([1.0, 1.25, 1.5, 2.0, 2.75, 3.9] + [1.0] * 40)
    stream = make_stream(46, factors=factors)
    num_epochs = 400
    times = Counter(draw.sample for draw in stream.draws(0, stream.start(num_epochs)))
    averages = np.array([times[sample] for sample in range(46)]) / num_epochs
    np.testing.assert_allclose(averages, factors, atol=0.08)
    assert averages[0] == 1.0
    assert averages[3] == 2.0
    lengths = {stream.start(epoch + 1) - stream.start(epoch) for epoch in range(num_epochs)}
    assert lengths == {52, 53}
    assert stream.start(num_epochs) == pytest.approx(num_epochs * factors.sum(), abs=1)


def test_repetition__is_another_draw_each_epoch_and_seed() -> None:
    factors = np.full(64, 1.5)

    def twice(seed: int, epoch: int) -> frozenset[int]:
        stream = make_stream(64, seed=seed, factors=factors)
        draws = stream.draws(stream.start(epoch), stream.start(epoch + 1))
        return frozenset(draw.sample for draw in draws if draw.repeat == 1)

    assert len(twice(0, 0)) == 32
    assert twice(0, 0) == twice(0, 0)
    assert len({twice(0, 0), twice(0, 1), twice(1, 0)}) == 3


@settings(max_examples=num_examples(20), deadline=None)
@given(st.lists(st.floats(1.0, 9.0), min_size=1, max_size=30), st.integers(0, 10**7), st.integers(0, 5))
def test_epoch_of__inverts_start(factors: list[float], epoch: int, seed: int) -> None:
    stream = make_stream(len(factors), seed=seed, num_shards=1, factors=np.array(factors))
    start, end = stream.start(epoch), stream.start(epoch + 1)
    assert stream.epoch_of(start) == stream.epoch_of(end - 1) == epoch
    assert stream.epoch_of(end) == epoch + 1
    assert end - start in (stream.start(1), stream.start(1) + 1, stream.start(1) - 1)


def test_share__covers_and_differs_by_one() -> None:
    slices = [share(10, rank, 4) for rank in range(4)]
    assert [item for part in slices for item in range(10)[part]] == list(range(10))
    assert [part.stop - part.start for part in slices] == [2, 3, 2, 3]


@pytest.mark.parametrize("options", [{}, {"buffer": 16}, {"repeat": True}, {"buffer": 16, "repeat": True}])
def test_simulation__small_form_of_the_benchmark(options: dict[str, int]) -> None:
    simulate = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_plan.py"))["simulate"]
    figures = simulate(20_000, 48, 5, **options)
    assert figures.num_steps in (84, 85) or "repeat" in options
    assert figures.num_draws == 20_000 or "repeat" in options
    assert figures.total_s < 20
