"""The loader's promise: every sample exactly once, equal steps, an exact position, on any number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.config import AugmentationConfig, DataConfig, DigitsConfig
from pipeline.datasets.digits import Digits
from pipeline.errors import UserError
from pipeline.loader import Batch, BatchPlan, EvalLoader, TrainLoader
from pipeline.prepare import prepare_shards
from pipeline.records import ShardSet
from pipeline.shards import ShardSetError

SCENES = DigitsConfig(num_train=11, num_val=7)
CROP = (56, 70)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    config = DataConfig(dataset="digits", samples_per_shard=3, digits=SCENES)
    return prepare_shards(config, str(tmp_path_factory.mktemp("set")), progress=lambda _: None)


def train_batches(
    shard_set: ShardSet,
    num_steps: int,
    *,
    batch: int = 4,
    rank: int = 0,
    ranks: int = 1,
    start: int = 0,
    workers: int = 0,
    seed: int = 0,
) -> list[Batch]:
    loader = TrainLoader(
        shard_set,
        crop=CROP,
        augmentation=AugmentationConfig(),
        seed=seed,
        global_batch_size=batch,
        rank=rank,
        world_size=ranks,
        start_step=start,
        num_workers=workers,
    )
    return list(itertools.islice(loader, num_steps))


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.keys == right.keys
    assert torch.equal(left.images, right.images)
    assert torch.equal(left.labels, right.labels)


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        tuple(key for part in parts for key in part.keys),
    )


def test_train__shapes_and_types(shard_set: ShardSet) -> None:
    (batch,) = train_batches(shard_set, 1)
    assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (4, 3, *CROP))
    assert (batch.labels.dtype, tuple(batch.labels.shape)) == (torch.int64, (4, *CROP))
    assert set(batch.labels.flatten().tolist()) <= {*range(11), 255}
    assert batch.images.is_contiguous()


def test_train__every_sample_once_an_epoch_in_a_new_order(shard_set: ShardSet) -> None:
    keys = [key for batch in train_batches(shard_set, 33, batch=4) for key in batch.keys]
    epochs = [keys[start : start + 11] for start in range(0, 132, 11)]
    everything = {f"train-{number:06d}" for number in range(11)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other = [key for batch in train_batches(shard_set, 3, seed=1) for key in batch.keys]
    assert other != keys[:12]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 1), (4, 0)])
def test_train__ranks_and_workers_only_share_out_the_work(shard_set: ShardSet, ranks: int, workers: int) -> None:
    whole = train_batches(shard_set, 4)
    parts = [train_batches(shard_set, 4, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
    for step in range(4):
        assert_equal(joined([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("workers", [0, 2])
def test_train__resume_gives_the_same_batches(shard_set: ShardSet, workers: int) -> None:
    whole = train_batches(shard_set, 7)
    resumed = train_batches(shard_set, 3, start=4, workers=workers)
    for left, right in zip(resumed, whole[4:], strict=True):
        assert_equal(left, right)
    # And on another number of ranks.
    parts = [train_batches(shard_set, 1, start=6, rank=rank, ranks=2)[0] for rank in (0, 1)]
    assert_equal(joined(parts), whole[6])


def test_train__a_sample_looks_different_each_epoch(shard_set: ShardSet) -> None:
    first, second = train_batches(shard_set, 2, batch=11)
    place = second.keys.index(first.keys[0])
    assert not torch.equal(first.images[0], second.images[place])


def test_train__leaves_the_models_random_stream_alone(shard_set: ShardSet) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train_batches(shard_set, 2, workers=1)
    list(EvalLoader(shard_set))
    assert torch.equal(torch.rand(4), expected)


def test_train__errors(shard_set: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch size 2 gives some of the 3 workers no sample; raise"):
        train_batches(shard_set, 1, batch=2, ranks=3)
    with pytest.raises(ValueError, match="rank 2 is not among the 2 ranks 0 to 1"):
        train_batches(shard_set, 1, rank=2, ranks=2)
    with pytest.raises(ShardSetError, match=r"manifest\.json is missing"):
        train_batches(shard_set.model_copy(update={"uri": str(tmp_path)}), 1)


def test_train__damaged_sample_is_named(shard_set: ShardSet, tmp_path: Path) -> None:
    storage.publish_folder(shard_set.uri, str(tmp_path / "copy"))
    shard = tmp_path / "copy" / "val-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ShardSetError, match=r"sample val-000000 of .* cannot be decoded"):
        list(EvalLoader(str(tmp_path / "copy")))


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 300),
    batch=st.integers(1, 64),
    ranks=st.integers(1, 16),
    start=st.integers(0, 500),
    seed=st.integers(0, 3),
)
def test_plan__exactly_once_for_any_numbers(num_samples: int, batch: int, ranks: int, start: int, seed: int) -> None:
    batch = max(batch, ranks)
    plans = [BatchPlan(num_samples, batch, seed, rank, ranks, start) for rank in range(ranks)]
    first_epoch = -(-start * batch // num_samples)
    num_steps = -(-(first_epoch + 1) * num_samples // batch) - start
    drawn = [list(itertools.islice(plan, num_steps)) for plan in plans]
    sizes = [len(draws) for rank in drawn for draws in rank]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    epoch = Counter(draw.sample for rank in drawn for draws in rank for draw in draws if draw.epoch == first_epoch)
    assert epoch == Counter(range(num_samples))
    single = BatchPlan(num_samples, batch, seed, 0, 1, 0)
    for step in range(num_steps):
        together = [draw for rank in drawn for draw in rank[step]]
        assert together == single.draws(start + step)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (5, 0), (9, 0), (9, 2)])
def test_eval__exactly_once_over_all_ranks(shard_set: ShardSet, ranks: int, workers: int) -> None:
    keys: list[str] = []
    for rank in range(ranks):
        loader = EvalLoader(shard_set, rank=rank, world_size=ranks, num_workers=workers)
        mine = [sample.key for sample in loader]
        assert len(mine) == len(loader)
        keys += mine
    assert sorted(keys) == [f"val-{number:06d}" for number in range(7)]


def test_eval__pixels_and_labels_are_the_scene(shard_set: ShardSet) -> None:
    for number, sample in enumerate(EvalLoader(shard_set)):
        image, label = Digits(SCENES, seed=0).scene("val", number)
        assert (sample.image.dtype, sample.label.dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), image)
        np.testing.assert_array_equal(sample.label.numpy(), label)


def test_eval__limit_is_spread_and_the_same_for_all_ranks(shard_set: ShardSet) -> None:
    keys = [sample.key for rank in range(2) for sample in EvalLoader(shard_set, rank=rank, world_size=2, max_samples=3)]
    assert keys == ["val-000000", "val-000002", "val-000004"]


def test_loaders__take_an_address_too(shard_set: ShardSet) -> None:
    assert [sample.key for sample in EvalLoader(shard_set.uri, "train")] == [
        f"train-{number:06d}" for number in range(11)
    ]
