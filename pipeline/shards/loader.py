"""Samples from shards: an endless training stream with an exact position, and single coverage for evaluation.

What comes in which order is arithmetic (pipeline.shards.sample_stream); here it is read, decoded and augmented.
B = samples in a rank's batch, H W pixels.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from pipeline.config import AugmentationConfig
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.shards.balance import repeat_factors
from pipeline.shards.hold_out import hold_out
from pipeline.shards.sample_stream import BatchPlan, Draw, SampleStream, share
from pipeline.shards.shard_reader import SampleBytes, ShardReader, SplitIndex, open_shard_set
from pipeline.shards.shard_streams import DrawnSample, read_shard_streams
from pipeline.shards.shards import ShardSetError, evenly_spaced
from pipeline.shards.transforms import MEAN_PIXEL, AugmentedPair, training_view
from segvit.image_files import DecodeError, decode_image, decode_label

if TYPE_CHECKING:
    from segvit.losses.segmentation_loss import LossTargets

T = TypeVar("T")

# Separates augmentation from the other random streams that share a seed (pipeline.shards.sample_stream).
_AUGMENTATION = 1


class LoaderProcessError(Exception):
    """A loader process died; a restarted training run continues from its last checkpoint."""


class Batch(NamedTuple):
    """A rank's share of a global batch."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B, H, W) uint8: an eighth of the bytes to hand over and to send to a GPU
    keys: tuple[str, ...]
    targets: LossTargets | None = None
    """Of the labels, where they are known ahead of the step."""


class EvalSample(NamedTuple):
    """A whole image with its labels."""

    image: Tensor  # (3, H, W) uint8
    label: Tensor  # (H, W) int64
    key: str


class TrainLoader:
    """Iterates this rank's batches from `start_step` on, for ever; each `iter` starts there anew.

    The stream depends on `seed`, the split, `global_batch_size`, `repeat_factor_threshold` and `stream_buffer`; a
    sample's augmentation on (`seed`, epoch, sample, which repeat of it in the epoch). Ranks and loader
    processes only share out the work: over all ranks every sample comes once an epoch (or as often as its repeat
    factor says), every rank takes equally many steps, and any step can be continued from, on any number of ranks.

    Samples are read one by one, wherever they lie, in a fully shuffled order. With `stream_buffer`, for storage
    where a request is slow, each index in the global batch is a shard stream that reads its part of the shards from
    front to back, this many samples a request. All promises above hold as well, with fewer shards than ranks, too. What
    is weaker is the shuffle: shards come in a random order, a batch takes its samples from as many shard streams as
    it has, and samples are shuffled within a block; two that are neighbours in a shard mostly stay within
    `stream_buffer` steps of each other. A rank keeps two blocks for each of its shard streams in memory.

    Args:
        repeat_factor_threshold: share of the images below which a class is rare, and images that hold it come
            more often (pipeline.shards.balance); None: every sample once an epoch.
        held_apart: share of the split that is left out (pipeline.shards.hold_out).
        stream_buffer: samples a shard stream reads with one request; None: no shard streams.
        num_workers: loader processes; 0 decodes in the calling process.
        for_gpu: whether a thread lays batches into memory that a GPU reads by itself; needs loader processes.

    Raises:
        UserError: an empty split, or fewer samples a step than ranks.
        ShardSetError: the shard set is missing, damaged, or not what its record stands for.
        LoaderProcessError: while iterating, when a loader process died.
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
        repeat_factor_threshold: float | None = None,
        stream_buffer: int | None = None,
        held_apart: float = 0.0,
        for_gpu: bool = False,
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
        factors = None if repeat_factor_threshold is None else repeat_factors(reader, split, repeat_factor_threshold)
        if held_apart:
            remaining, _ = hold_out(index.keys, held_apart)
            index, factors = index.take(remaining), None if factors is None else factors[remaining]
        self.num_samples = len(index)
        self.num_workers = num_workers
        self._pin_memory = for_gpu and num_workers > 0
        stream = SampleStream(
            self.num_samples,
            seed,
            repeat_factors=factors,
            shards=index.shard,
            num_shard_streams=global_batch_size,
            buffer=stream_buffer,
        )
        self._plan = BatchPlan(stream, global_batch_size, rank, world_size, start_step)
        self._views = _TrainingViews(reader, index, crop, augmentation, seed, pad_pixel)

    def __iter__(self) -> Iterator[Batch]:
        streamed = self._plan.stream.buffer is not None
        return self._streamed_batches() if streamed else self._random_access_batches()

    def _random_access_batches(self) -> Iterator[Batch]:
        return _iterate(self._views, self.num_workers, batch_sampler=self._plan, pin_memory=self._pin_memory)

    def _streamed_batches(self) -> Iterator[Batch]:
        shard_streams = range(self._plan.share.start, self._plan.share.stop)
        # A process that owns no shard stream would have nothing to hand over.
        num_workers = min(self.num_workers, len(shard_streams))
        views = _StreamedViews(self._views, self._plan)
        parts = _iterate(views, num_workers, batch_size=None, pin_memory=self._pin_memory and num_workers == 1)
        # Processes take turns, so that the parts of a batch come one after the other.
        return (_join(list(itertools.islice(parts, max(1, num_workers)))) for _ in itertools.count())


class EvalLoader:
    """Iterates this rank's share of a split once: every sample on exactly one rank, none twice, none padded.

    `held_apart`: of the part alone that a TrainLoader with the same share leaves out; 0: of the whole split.
    `max_samples` takes that many, evenly spread over them. With more ranks than samples, some get none.
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
        held_apart: float = 0.0,
    ) -> None:
        _check_rank(rank, world_size)
        reader = open_shard_set(shard_set)
        index = reader.index(split)
        samples = hold_out(index.keys, held_apart)[1] if held_apart else np.arange(len(index))
        chosen = samples[evenly_spaced(len(samples), max_samples)]
        self.num_workers = num_workers
        self._samples = chosen[share(len(chosen), rank, world_size)]
        self._images = _WholeImages(reader, index)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[EvalSample]:
        num_workers = min(self.num_workers, len(self._samples))
        samples = _iterate(self._images, num_workers, batch_size=None, sampler=self._samples.tolist())
        return (sample._replace(label=sample.label.long()) for sample in samples)


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way from a loader process; PyTorch would put a traceback into its message."""

    error: UserError


class _TrainingViews(Dataset["Batch | _Failure"]):
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

    def __getitems__(self, draws: list[Draw]) -> Batch | _Failure:
        """A batch, which DataLoader asks for as a whole."""
        try:
            return self.batch([(draw, self.reader.read(self.index, draw.sample)) for draw in draws])
        except UserError as error:
            return _Failure(error)

    def batch(self, drawn: list[DrawnSample]) -> Batch:
        """What training sees of `drawn`."""
        images = np.empty((len(drawn), 3, *self.crop), dtype=np.uint8)
        labels = np.empty((len(drawn), *self.crop), dtype=np.uint8)
        for (draw, sample), planes, label in zip(drawn, images, labels, strict=True):
            self._view(draw, sample, AugmentedPair(planes.transpose(1, 2, 0), label))
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), tuple(sample.key for _, sample in drawn))

    def _view(self, draw: Draw, sample: SampleBytes, out: AugmentedPair) -> None:
        repeat = [draw.repeat] if draw.repeat else []
        rng = np.random.default_rng([self.seed, _AUGMENTATION, draw.epoch, draw.sample, *repeat])
        try:
            training_view(sample.image, sample.label, self.crop, self.augmentation, rng, self.pad_pixel, out)
        except DecodeError as error:
            raise _damaged(self.reader, sample, error) from error


class _StreamedViews(IterableDataset["Batch | _Failure"]):
    """A rank's shard streams; each loader process takes a contiguous part of them."""

    def __init__(self, views: _TrainingViews, plan: BatchPlan) -> None:
        self.views, self.plan = views, plan

    def __iter__(self) -> Iterator[Batch | _Failure]:
        worker = get_worker_info()
        shard_streams = range(self.plan.share.start, self.plan.share.stop)
        if worker is not None:
            shard_streams = shard_streams[share(len(shard_streams), worker.id, worker.num_workers)]
        reader, index = self.views.reader, self.views.index
        try:
            for drawn in read_shard_streams(reader, index, self.plan.stream, shard_streams, self.plan.start_step):
                yield self.views.batch(drawn)
        except UserError as error:
            yield _Failure(error)


class _WholeImages(Dataset["EvalSample | _Failure"]):
    def __init__(self, reader: ShardReader, index: SplitIndex) -> None:
        self.reader, self.index = reader, index

    def __getitem__(self, sample_number: int) -> EvalSample | _Failure:
        try:
            return self._whole_image(sample_number)
        except UserError as error:
            return _Failure(error)

    def _whole_image(self, sample_number: int) -> EvalSample:
        sample = self.reader.read(self.index, sample_number)
        try:
            image, label = decode_image(sample.image), decode_label(sample.label)
        except DecodeError as error:
            raise _damaged(self.reader, sample, error) from error
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return EvalSample(pixels, torch.from_numpy(label.astype(np.uint8)), sample.key)


def _iterate(dataset: Dataset[T | _Failure], num_workers: int, **options: Any) -> Iterator[T]:
    """What the loader processes hand over, their errors raised here."""
    # Without a generator of its own it would draw from the model's random stream.
    generator = torch.Generator()
    items = DataLoader(dataset, num_workers=num_workers, collate_fn=_as_it_is, generator=generator, **options)
    try:
        for item in items:
            if isinstance(item, _Failure):
                raise item.error
            yield cast("T", item)
    except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
        if not (num_workers and _tells_of_a_death(error)):
            raise
        # They hold PyTorch's iterator, and with it the other processes and a signal handler that raises anywhere.
        traceback.clear_frames(error.__traceback__)
        raise LoaderProcessError(
            f"a loader process was killed or died ({type(error).__name__}: {' '.join(str(error).split())}); where "
            "memory is short, lower runtime.loader_workers"
        ) from error


def _tells_of_a_death(error: Exception) -> bool:
    """PyTorch has no class for it, and lets the failed connection through where it fetches what a dead process held."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    return "in DataLoader worker process" not in str(error)  # so it marks what was raised in one that lives


def _as_it_is(batch: Any) -> Any:
    return batch


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    keys = tuple(key for part in parts for key in part.keys)
    return Batch(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]), keys)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not among the {world_size} ranks 0 to {world_size - 1}")


def _damaged(reader: ShardReader, sample: SampleBytes, error: DecodeError) -> ShardSetError:
    return ShardSetError(f"sample {sample.key} of {reader.uri} {error}; prepare the shard set again")
