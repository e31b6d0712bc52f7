"""The order of the training stream: arithmetic on positions, without reading anything.

Training is one stream of positions 0, 1, 2, ..., cut into epochs. Global batch s of size G is positions s * G to
(s + 1) * G - 1, and a rank's batch is a contiguous slice of it. So every rank takes the same number of steps, an
epoch holds every sample as often as it should, and the step number alone says where to go on, on any number of
ranks. Position p stands for item p - start of its epoch's order, which is made from the seed:

- by default a permutation of all samples;
- with a buffer, an order for sequential reading: shard stream j is the positions p with p % G = j, and
  reads a contiguous part of the shards, which come in a random order; samples are shuffled within its blocks.

Neither depends on ranks or loader processes. With repeat factors a sample with factor r comes floor(r) times an
epoch, and once more in a share r - floor(r) of the epochs.
n = samples of the split, m = positions of an epoch, G = shard streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

# Separates the random streams that share a seed; augmentation's is 1.
_PERMUTATION, _REPETITION, _SHARD_ORDER = 0, 2, 3
# Shares of a repetition are counted in these, exactly, so that epochs of any number have exact bounds.
_UNIT_BITS = 32
_UNIT = 1 << _UNIT_BITS
# Shard streams look ahead into the next epoch while others are in this one.
_KEPT_ORDERS = 2


class Draw(NamedTuple):
    """One position of the training stream: which sample, in which epoch, and which of its repeats in it (from 0)."""

    epoch: int
    sample: int
    repeat: int = 0


class SampleStream:
    """The stream of one split.

    Args:
        num_samples: n, at least 1.
        seed: of everything random here.
        repeat_factors: (n,) how often a sample comes an epoch on average, each at least 1; None: once.
        shards: (n,) which shard each sample lies in, samples of a shard in the order of their bytes; only
            needed with `buffer`.
        num_shard_streams: G, the global batch size; only needed with `buffer`.
        buffer: samples in a block of a shard stream; None: no shard streams, full shuffle.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        repeat_factors: NDArray[np.float64] | None = None,
        shards: NDArray[np.integer] | None = None,
        num_shard_streams: int = 1,
        buffer: int | None = None,
    ) -> None:
        assert num_samples >= 1, "there is no stream of no samples"
        assert buffer is None or shards is not None, "shard streams read shards"
        self.num_samples, self.seed, self.buffer = num_samples, seed, buffer
        self.num_shard_streams = num_shard_streams
        self._shards = shards
        self._whole: NDArray[np.int64] | None = None
        self._least, self._rest_sum, self._phase = num_samples, 0, 0
        if repeat_factors is not None and (repeat_factors > 1).any():
            self._whole = np.floor(repeat_factors).astype(np.int64)
            self._rest = ((repeat_factors - self._whole) * _UNIT).astype(np.uint64)
            self._least, self._rest_sum = int(self._whole.sum()), int(self._rest.sum())
            self._phase = int(np.random.default_rng([seed, _REPETITION]).integers(_UNIT))
        self._orders: dict[int, tuple[NDArray[np.uint32], NDArray[np.uint16] | None]] = {}

    def start(self, epoch: int) -> int:
        """The first position of `epoch`; the next epoch's is where it ends."""
        return epoch * self._least + ((self._phase + epoch * self._rest_sum) >> _UNIT_BITS)

    def epoch_of(self, position: int) -> int:
        """The epoch that `position` lies in."""
        epoch = (position << _UNIT_BITS) // ((self._least << _UNIT_BITS) + self._rest_sum)
        while self.start(epoch) > position:
            epoch -= 1
        while self.start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def draws(self, first: int, last: int, step: int = 1) -> list[Draw]:
        """What positions `first` to `last` - 1 stand for, or every `step`-th of them."""
        found: list[Draw] = []
        while first < last:
            epoch = self.epoch_of(first)
            start, end = self.start(epoch), self.start(epoch + 1)
            indices = slice(first - start, min(last, end) - start, step)
            order, repeats = self.order(epoch)
            if repeats is None:
                found += [Draw(epoch, sample) for sample in order[indices].tolist()]
            else:
                pairs = zip(order[indices].tolist(), repeats[indices].tolist(), strict=True)
                found += [Draw(epoch, sample, repeat) for sample, repeat in pairs]
            first += -(-(min(last, end) - first) // step) * step
        return found

    def order(self, epoch: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16] | None]:
        """The samples of `epoch` in order (m,), and for which time each comes; None: all for the first."""
        if epoch not in self._orders:
            while len(self._orders) >= _KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
            samples, repeats = self._content(epoch)
            if self.buffer is None:
                rng = np.random.default_rng([self.seed, _PERMUTATION, epoch])
                # Of indices, not of samples: the repeats must follow.
                indices = rng.permutation(np.arange(len(samples), dtype=np.uint32))
            else:
                indices = self._shard_stream_order(epoch, len(samples), self.buffer)
            self._orders[epoch] = samples[indices], None if repeats is None else repeats[indices]
        return self._orders[epoch]

    def block_of(self, position: int) -> tuple[int, int]:
        """Epoch and number of the block at `position` of its shard stream; samples of a block lie close together."""
        assert self.buffer is not None, "only shard streams have blocks"
        epoch = self.epoch_of(position)
        shard_stream = position % self.num_shard_streams
        in_stream = (position - self._first_position(shard_stream, self.start(epoch))) // self.num_shard_streams
        return epoch, (in_stream + self._offset(shard_stream)) // self.buffer

    def block_end(self, position: int) -> int:
        """The first position after `position`'s block, of the epoch or of the shard stream."""
        assert self.buffer is not None, "only shard streams have blocks"
        epoch, number = self.block_of(position)
        shard_stream = position % self.num_shard_streams
        first = self._first_position(shard_stream, self.start(epoch))
        in_stream = (number + 1) * self.buffer - self._offset(shard_stream)
        return min(first + int(in_stream) * self.num_shard_streams, self.start(epoch + 1))

    def _content(self, epoch: int) -> tuple[NDArray[np.uint32], NDArray[np.uint16] | None]:
        """What comes in `epoch`: in the order of its shards for shard streams, in any order for a full shuffle."""
        samples = np.arange(self.num_samples, dtype=np.uint32) if self.buffer is None else self._shard_order(epoch)
        if self._whole is None:
            return samples, None
        counts = (self._whole + self._extra(epoch))[samples]
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(samples, counts), (np.arange(len(starts)) - starts).astype(np.uint16)

    def _extra(self, epoch: int) -> NDArray[np.int64]:
        """(n,) 1 for samples that come once more in `epoch`.

        Systematic sampling: samples in a random order lay their shares end to end, and whoever covers a whole
        number comes once more. Each does so with the chance that its share is, and epochs that continue each
        other's line have bounds that need no draw.
        """
        assert self._whole is not None, "nothing comes more than once"
        order = np.random.default_rng([self.seed, _REPETITION, epoch]).permutation(self.num_samples)
        phase = (self._phase + epoch * self._rest_sum) % _UNIT
        line = (np.cumsum(self._rest[order]) + np.uint64(phase)) >> np.uint64(_UNIT_BITS)
        extra = np.empty(self.num_samples, dtype=np.int64)
        extra[order] = np.diff(line.astype(np.int64), prepend=0)
        return extra

    def _shard_order(self, epoch: int) -> NDArray[np.uint32]:
        assert self._shards is not None, "shard streams read shards"
        num_shards = int(self._shards.max()) + 1
        rank = np.random.default_rng([self.seed, _SHARD_ORDER, epoch]).permutation(num_shards)
        return np.argsort(rank[self._shards], kind="stable").astype(np.uint32)

    def _shard_stream_order(self, epoch: int, length: int, buffer: int) -> NDArray[np.int64]:
        """(m,) for each position of `epoch` its index in the shards' sequence."""
        start = self.start(epoch)
        positions = np.arange(start, start + length)
        shard_stream = positions % self.num_shard_streams
        first_rows = -((np.arange(self.num_shard_streams) - start) // self.num_shard_streams)
        in_stream = positions // self.num_shard_streams - first_rows[shard_stream]
        lengths = np.bincount(shard_stream, minlength=self.num_shard_streams)
        sequence = (np.cumsum(lengths) - lengths)[shard_stream] + in_stream
        block = (in_stream + self._offset(shard_stream)) // buffer
        # Rises along the sequence, by whole numbers: with a random fraction added, one sort shuffles every block.
        key = np.empty(length)
        key[sequence] = shard_stream * (int(block.max()) + 1) + block
        key += np.random.default_rng([self.seed, _PERMUTATION, epoch]).random(length)
        return np.argsort(key)[sequence]

    def _first_position(self, shard_stream: int, start: int) -> int:
        return start + (shard_stream - start) % self.num_shard_streams

    def _offset(self, shard_stream: Any) -> Any:
        # Shard streams end their blocks one after the other, not all at the same step.
        assert self.buffer is not None, "only shard streams have blocks"
        return shard_stream * self.buffer // self.num_shard_streams


class BatchPlan(Sampler[list[Draw]]):
    """Which samples a rank draws at each step, from `start_step` on, for ever."""

    def __init__(self, stream: SampleStream, global_batch_size: int, rank: int, world_size: int, start_step: int):
        self.stream = stream
        self.global_batch_size = global_batch_size
        self.share = share(global_batch_size, rank, world_size)
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self.draws, itertools.count(self.start_step))

    def draws(self, step: int) -> list[Draw]:
        """This rank's draws at `step`."""
        first = step * self.global_batch_size
        return self.stream.draws(first + self.share.start, first + self.share.stop)


def share(count: int, rank: int, world_size: int) -> slice:
    """The contiguous slice of `count` items that is `rank`'s; sizes differ by one at most."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)
