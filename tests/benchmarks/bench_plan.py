"""Time and memory of planning an epoch of many samples over many ranks, every sample exactly once over all ranks.

    python tests/benchmarks/bench_plan.py                      # 10 million samples, 1,024 ranks, 16 images each
    python tests/benchmarks/bench_plan.py --samples 100000 --buffer 64 --repeat

All ranks are played in one process, with the very calls that a rank's loader makes: `draws` of its BatchPlan at
every step. On a real cluster each rank does its own part of this, and its own copy of the order.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.shards.sample_stream import BatchPlan, SampleStream


@dataclass(frozen=True)
class PlanFigures:
    """What one simulation took; `order_s` is the share of one rank that nothing shares."""

    num_samples: int
    num_ranks: int
    num_steps: int
    num_draws: int
    order_s: float
    total_s: float
    peak_gib: float


def simulate(
    num_samples: int, num_ranks: int, batch_of_rank: int, *, buffer: int | None = None, repeat: bool = False
) -> PlanFigures:
    """Plan all steps that touch epoch 1 on all ranks; asserts that each sample comes as often as it should."""
    started = time.monotonic()
    factors = np.random.default_rng(0).uniform(1.0, 2.5, num_samples) if repeat else None
    batch = num_ranks * batch_of_rank
    shards = np.arange(num_samples) // 1000 if buffer else None
    stream = SampleStream(num_samples, 0, repeat_factors=factors, shards=shards, num_shard_streams=batch, buffer=buffer)
    begin, end = stream.start(1), stream.start(2)
    before = time.monotonic()
    stream.order(1)
    order_s = time.monotonic() - before
    first_step, last_step = begin // batch, -(-end // batch)
    times = np.zeros(num_samples, dtype=np.uint16)
    num_draws = 0
    for rank in range(num_ranks):
        plan = BatchPlan(stream, batch, rank, num_ranks, first_step)
        mine = [draw.sample for step in range(first_step, last_step) for draw in plan.draws(step) if draw.epoch == 1]
        assert len(mine) <= (last_step - first_step) * batch_of_rank, "a rank draws more than its share"
        np.add.at(times, mine, 1)
        num_draws += len(mine)
    least = np.ones(num_samples) if factors is None else np.floor(factors)
    assert num_draws == end - begin, "ranks left positions out, or shared some"
    assert ((times == least) | ((factors is not None) & (times == least + 1))).all(), "a sample comes too often, or not"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.monotonic() - started
    return PlanFigures(num_samples, num_ranks, last_step - first_step, num_draws, order_s, seconds, peak)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16, help="images a rank and step")
    parser.add_argument("--buffer", type=int, help="plan shard streams with blocks of this many samples")
    parser.add_argument("--repeat", action="store_true", help="with repeat factors between 1 and 2.5")
    chosen = parser.parse_args()
    figures = simulate(chosen.samples, chosen.ranks, chosen.batch, buffer=chosen.buffer, repeat=chosen.repeat)
    print(json.dumps(asdict(figures), indent=1))


if __name__ == "__main__":
    main()
