"""Samples from shards: an endless training stream with an exact position, and single coverage for evaluation.

Training is one stream of positions 0, 1, 2, ...: position p is place p % n in the seeded permutation of
epoch p // n over the n samples of the split. Global batch s of size G is positions s * G to (s + 1) * G - 1,
and a rank's batch is a contiguous slice of it. So every rank takes the same number of steps, every sample
comes once an epoch, and the step number alone says where to go on, on any number of ranks.
B = samples in a rank's batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.config import AugmentationConfig
from pipeline.decode import DecodeError, decode_image, decode_label, open_image
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.shards import SampleBytes, ShardReader, ShardSetError, SplitIndex, open_shard_set, spread
from pipeline.transforms import MEAN_PIXEL, augment

# Separates the random streams that share a seed.
_PERMUTATION, _AUGMENTATION = 0, 1


class Batch(NamedTuple):
    """A rank's share of a global batch."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B, H, W) int64
    keys: tuple[str, ...]


class EvalSample(NamedTuple):
    """A whole image with its labels."""

    image: Tensor  # (3, H, W) uint8
    label: Tensor  # (H, W) int64
    key: str


class Draw(NamedTuple):
    """One position of the training stream: which sample, seen in which epoch."""

    epoch: int
    sample: int


class TrainLoader:
    """Iterates this rank's batches from `start_step` on, for ever; each `iter` starts there anew.

    The stream depends on `seed`, the split and `global_batch_size`; a sample's augmentation on (`seed`,
    epoch, sample). Ranks and loader processes only share out the work. `num_workers` 0 decodes in the
    calling process.
    Raises UserError for an empty split, and for fewer samples a step than ranks.
    """

    def __init__(
        self,
        shard_set: ShardSet | str,
        split: str = "train",
        *,
        crop: tuple[int, int],
        augmentation: AugmentationConfig,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        num_workers: int = 0,
        pad_pixel: tuple[int, int, int] = MEAN_PIXEL,
    ) -> None:
        _check_rank(rank, world_size)
        if global_batch_size < world_size:
            raise UserError(
                f"batch size {global_batch_size} gives some of the {world_size} workers no sample; "
                "raise the batch size or use fewer workers"
            )
        reader = open_shard_set(shard_set)
        index = reader.index(split)
        if not len(index):
            raise UserError(f"split {split!r} of {reader.uri} has no samples; prepare more data")
        self.num_samples = len(index)
        self.num_workers = num_workers
        self._plan = BatchPlan(self.num_samples, global_batch_size, seed, rank, world_size, start_step)
        self._views = _TrainingViews(reader, index, crop, augmentation, seed, pad_pixel)

    def __iter__(self) -> Iterator[Batch]:
        batches = DataLoader(
            self._views,
            batch_sampler=self._plan,
            num_workers=self.num_workers,
            collate_fn=_collate,
            # Without a generator of its own it would draw from the model's random stream.
            generator=torch.Generator(),
        )
        # Labels leave the loader processes as uint8: an eighth of the bytes to hand over.
        return (batch._replace(labels=batch.labels.long()) for batch in batches)


class EvalLoader:
    """Iterates this rank's share of a split once: every sample on exactly one rank, none twice, none padded.

    `max_samples` takes that many, evenly spread over the split. With more ranks than samples, some get none.
    """

    def __init__(
        self,
        shard_set: ShardSet | str,
        split: str = "val",
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_samples: int | None = None,
    ) -> None:
        _check_rank(rank, world_size)
        reader = open_shard_set(shard_set)
        index = reader.index(split)
        chosen = spread(len(index), max_samples)
        self.num_workers = num_workers
        self._samples = chosen[_share(len(chosen), rank, world_size)]
        self._images = _WholeImages(reader, index)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[EvalSample]:
        samples = DataLoader(
            self._images,
            batch_size=None,
            sampler=self._samples.tolist(),
            num_workers=min(self.num_workers, len(self._samples)),
            generator=torch.Generator(),
        )
        return (sample._replace(label=sample.label.long()) for sample in samples)


class BatchPlan(Sampler[list[Draw]]):
    """Which samples a rank draws at each step: the arithmetic of the stream, without reading anything."""

    def __init__(
        self, num_samples: int, global_batch_size: int, seed: int, rank: int, world_size: int, start_step: int
    ) -> None:
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.share = _share(global_batch_size, rank, world_size)
        self.start_step = start_step
        self._epoch = -1
        self._order: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start_step
        while True:
            yield self.draws(step)
            step += 1

    def draws(self, step: int) -> list[Draw]:
        """This rank's draws at `step`."""
        first = step * self.global_batch_size
        positions = range(first + self.share.start, first + self.share.stop)
        return [self._draw(*divmod(position, self.num_samples)) for position in positions]

    def _draw(self, epoch: int, place: int) -> Draw:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, _PERMUTATION, epoch])
            self._order = rng.permutation(np.arange(self.num_samples, dtype=np.uint32))
            self._epoch = epoch
        return Draw(epoch, int(self._order[place]))


class _TrainingViews(Dataset[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]):
    def __init__(
        self,
        reader: ShardReader,
        index: SplitIndex,
        crop: tuple[int, int],
        augmentation: AugmentationConfig,
        seed: int,
        pad_pixel: tuple[int, int, int],
    ) -> None:
        self.reader, self.index = reader, index
        self.crop, self.augmentation, self.seed, self.pad_pixel = crop, augmentation, seed, pad_pixel

    def __getitem__(self, draw: Draw) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str]:
        sample = self.reader.read(self.index, draw.sample)
        rng = np.random.default_rng([self.seed, _AUGMENTATION, draw.epoch, draw.sample])
        try:
            image, label = open_image(sample.image)[0], decode_label(sample.label).astype(np.uint8)
        except DecodeError as error:
            raise _damaged(self.reader, sample, error) from error
        view = augment(image, label, self.crop, self.augmentation, rng, self.pad_pixel)
        return view.image, view.label, sample.key


class _WholeImages(Dataset[EvalSample]):
    def __init__(self, reader: ShardReader, index: SplitIndex) -> None:
        self.reader, self.index = reader, index

    def __getitem__(self, sample_number: int) -> EvalSample:
        sample = self.reader.read(self.index, sample_number)
        try:
            image, label = decode_image(sample.image), decode_label(sample.label)
        except DecodeError as error:
            raise _damaged(self.reader, sample, error) from error
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return EvalSample(pixels, torch.from_numpy(label.astype(np.uint8)), sample.key)


def _collate(views: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]) -> Batch:
    height, width = views[0][1].shape
    images = np.empty((len(views), 3, height, width), dtype=np.uint8)
    labels = np.empty((len(views), height, width), dtype=np.uint8)
    for place, (image, label, _) in enumerate(views):
        images[place] = image.transpose(2, 0, 1)
        labels[place] = label
    return Batch(torch.from_numpy(images), torch.from_numpy(labels), tuple(key for _, _, key in views))


def _share(count: int, rank: int, world_size: int) -> slice:
    """The contiguous slice of `count` items that is `rank`'s; sizes differ by one at most."""
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not among the {world_size} ranks 0 to {world_size - 1}")


def _damaged(reader: ShardReader, sample: SampleBytes, error: DecodeError) -> ShardSetError:
    return ShardSetError(f"sample {sample.key} of {reader.uri} {error}; prepare the shard set again")
