"""The loader's promise: every sample exactly once, equal steps, an exact position, on any number of ranks."""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.config import AugmentationConfig, DataConfig, DigitsConfig
from pipeline.datasets.digits import Digits
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.shards.loader import Batch, EvalLoader, LoaderProcessError, TrainLoader
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.sample_stream import SampleStream
from pipeline.shards.shard_reader import ShardReader
from pipeline.shards.shards import INDEX_SCHEMA, QUARANTINE_SCHEMA, Manifest, ShardEntry, ShardSetError, ShardWriter
from segvit.image_files import encode_png
from tests.examples import LONG_FORM, num_examples

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
    threshold: float | None = None,
    buffer: int | None = None,
    held_apart: float = 0.0,
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
        repeat_factor_threshold=threshold,
        stream_buffer=buffer,
        held_apart=held_apart,
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
    assert (batch.labels.dtype, tuple(batch.labels.shape)) == (torch.uint8, (4, *CROP))
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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("buffer", [None, 2])
def test_train__damaged_sample_is_named_by_loader_processes_too(
    shard_set: ShardSet, tmp_path: Path, workers: int, buffer: int | None
) -> None:
    storage.publish_folder(shard_set.uri, str(tmp_path / "copy"))
    for shard in (tmp_path / "copy").glob("train-*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    broken = shard_set.model_copy(update={"uri": str(tmp_path / "copy")})
    with pytest.raises(ShardSetError, match=r"^sample train-\d+ of .* cannot be decoded.*prepare the shard set again$"):
        train_batches(broken, 1, workers=workers, buffer=buffer)


@pytest.fixture
def no_child_handler() -> Iterator[None]:
    """Without the handler that other loaders have left: it raises in the main thread when a loader process dies."""
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, previous)


# Killed at once, or when batches that a dead process still had to hand over wait in the queue.
@pytest.mark.parametrize(("buffer", "victims", "wait"), [(None, 1, 0.0), (None, 2, 1.0), (2, 2, 0.0), (2, 1, 1.0)])
@pytest.mark.usefixtures("no_child_handler")
def test_train__killed_loader_process_is_told_and_nothing_hangs(
    shard_set: ShardSet, buffer: int | None, victims: int, wait: float
) -> None:
    strangers = set(multiprocessing.active_children())

    def batches_until_one_dies() -> None:
        loader = TrainLoader(
            shard_set,
            crop=CROP,
            augmentation=AugmentationConfig(),
            seed=0,
            global_batch_size=4,
            num_workers=2,
            stream_buffer=buffer,
        )
        batches = iter(loader)
        next(batches)
        time.sleep(wait)
        mine = [child for child in multiprocessing.active_children() if child not in strangers]
        for child in mine[:victims]:
            child.kill()
        for _ in itertools.islice(batches, 1000):
            pass

    # As Ray Train does it; in the main thread PyTorch hears of it by a signal.
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(batches_until_one_dies)
        with pytest.raises(LoaderProcessError, match=r"^a loader process was killed .*lower runtime.loader_workers$"):
            done.result(timeout=60)
    assert not [child for child in multiprocessing.active_children() if child not in strangers]


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


@pytest.mark.parametrize(("threshold", "buffer"), [(None, None), (0.9, None), (None, 2)])
def test_loaders__what_is_held_apart_is_not_trained_on(
    shard_set: ShardSet, threshold: float | None, buffer: int | None
) -> None:
    loaders = [EvalLoader(shard_set, "train", rank=rank, world_size=2, held_apart=0.3) for rank in range(2)]
    held = [sample for loader in loaders for sample in loader]
    assert [sample.key for sample in held] == ["train-000000", "train-000003", "train-000007"]
    limited = EvalLoader(shard_set, "train", held_apart=0.3, max_samples=2)
    assert [sample.key for sample in limited] == ["train-000000", "train-000003"]
    image, _ = Digits(SCENES, seed=0).scene("train", 7)
    np.testing.assert_array_equal(held[2].image.permute(1, 2, 0).numpy(), image)
    batches = train_batches(shard_set, 8, threshold=threshold, buffer=buffer, held_apart=0.3)
    rest = {f"train-{number:06d}" for number in range(11)} - {sample.key for sample in held}
    drawn = [key for batch in batches for key in batch.keys]
    assert set(drawn) == rest
    if threshold is None:
        assert set(Counter(drawn).values()) == {4}  # four epochs of eight


def test_loaders__take_an_address_too(shard_set: ShardSet) -> None:
    assert [sample.key for sample in EvalLoader(shard_set.uri, "train")] == [
        f"train-{number:06d}" for number in range(11)
    ]


# From here on: real tars of many shapes, whose images say which sample they are.

UNCHANGED = AugmentationConfig(
    scale_range=(1.0, 1.0),
    max_class_fraction=1.0,
    flip_probability=0.0,
    brightness=0.0,
    contrast=(1.0, 1.0),
    saturation=(1.0, 1.0),
    hue=0.0,
)


@contextlib.contextmanager
def must_end_within(seconds: float) -> Iterator[None]:
    def give_up(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    limit_of_the_test, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, limit_of_the_test)
        signal.signal(signal.SIGALRM, before)


def picture(number: int) -> np.ndarray:
    return np.full((2, 3, 3), [number % 256, number // 256, 7], dtype=np.uint8)


def numbers_in(batch: Batch) -> list[int]:
    pixels = batch.images[:, :, 1, 1].long()
    assert set(pixels[:, 2].tolist()) == {7}
    numbers = (pixels[:, 0] + 256 * pixels[:, 1]).tolist()
    assert batch.keys == tuple(f"{number:06d}" for number in numbers)
    return list(numbers)


def write_set(folder: Path, num_samples: int, num_shards: int, seed: int) -> str:
    """A shard set with shards of very unequal sizes, some perhaps with a single sample."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.permutation(np.arange(1, num_samples))[: num_shards - 1])
    rows, entries = [], []
    label = encode_png(np.zeros((2, 3), dtype=np.uint8))
    for place, numbers in enumerate(np.split(np.arange(num_samples), cuts)):
        name = f"train-{place:05d}.tar"
        buffer = io.BytesIO()
        writer = ShardWriter(buffer)
        for number in numbers.tolist():
            image = encode_png(picture(number))
            offsets = writer.add(f"{number:06d}", "png", image, label)
            sizes = {"image_size": len(image), "label_size": len(label), "height": 2, "width": 3, "class_pixels": [6]}
            row = {"key": f"{number:06d}", "split": "train", "shard": name, **sizes}
            rows.append({**row, "image_offset": offsets[0], "label_offset": offsets[1]})
        sha256 = writer.finish()
        entry = ShardEntry(name=name, sha256=sha256, num_bytes=writer.num_bytes, num_samples=writer.num_samples)
        entries.append(entry)
        (folder / name).write_bytes(buffer.getvalue())
    pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), folder / "index.parquet")
    pq.write_table(pa.Table.from_pylist([], QUARANTINE_SCHEMA), folder / "quarantine.parquet")
    manifest = Manifest(
        name="numbers",
        classes=("all",),
        palette=((1, 2, 3),),
        ignore_index=255,
        splits={"train": tuple(entries)},
        num_quarantined=0,
        source_digest="",
        plan_digest="",
        index_sha256=storage.file_digest(str(folder / "index.parquet")),
        quarantine_sha256=storage.file_digest(str(folder / "quarantine.parquet")),
    )
    storage.publish_json(str(folder / "manifest.json"), manifest.model_dump(mode="json"))
    return str(folder)


def take(
    uri: str, batch: int, ranks: int, workers: int, start: int, num_steps: int, buffer: int | None
) -> list[list[int]]:
    """The samples of each global batch, over all ranks."""
    steps: list[list[int]] = [[] for _ in range(num_steps)]
    for rank in range(ranks):
        loader = TrainLoader(
            uri,
            crop=(2, 3),
            augmentation=UNCHANGED,
            seed=0,
            global_batch_size=batch,
            rank=rank,
            world_size=ranks,
            start_step=start,
            num_workers=workers,
            stream_buffer=buffer,
        )
        batches = list(itertools.islice(loader, num_steps))
        assert len(batches) == num_steps
        for step, mine in zip(steps, batches, strict=True):
            numbers = numbers_in(mine)
            assert batch // ranks <= len(numbers) <= -(-batch // ranks)
            step += numbers
    return steps


def check_promise(
    num_samples: int,
    num_shards: int,
    batch: int,
    ranks: tuple[int, int],
    workers: int,
    change: float,
    buffer: int | None,
) -> None:
    """An epoch and a bit, with other ranks from some step in its middle on."""
    batch, num_shards = max(batch, *ranks), min(num_shards, num_samples)
    num_steps = -(-num_samples // batch) + 1
    before = round(change * num_steps)
    with tempfile.TemporaryDirectory() as folder, must_end_within(60):
        uri = write_set(Path(folder), num_samples, num_shards, seed=num_samples)
        steps = take(uri, batch, ranks[0], workers, 0, before, buffer) if before else []
        if before < num_steps:
            steps += take(uri, batch, ranks[1], workers, before, num_steps - before, buffer)
        stream = [number for step in steps for number in step]
        assert sorted(stream[:num_samples]) == list(range(num_samples))
        shards = ShardReader(uri).index("train").shard
        order = SampleStream(num_samples, 0, shards=shards, num_shard_streams=batch, buffer=buffer).draws(
            0, len(stream)
        )
        assert stream == [draw.sample for draw in order]
        if buffer is None:
            # Reads as training does, so once is enough.
            world = range(ranks[0])
            evals = [EvalLoader(uri, "train", rank=rank, world_size=ranks[0], num_workers=workers) for rank in world]
            keys = [sample.key for loader in evals for sample in loader]
            assert keys == [f"{number:06d}" for number in range(num_samples)]


@settings(max_examples=num_examples(4), deadline=None)
@given(
    num_samples=st.integers(1, 2000 if LONG_FORM else 400),
    num_shards=st.integers(1, 50),
    batch=st.integers(1, 256 if LONG_FORM else 64),
    ranks=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    change=st.floats(0, 1),
    buffer=st.sampled_from([None, 4, 32]),
)
@example(num_samples=2, num_shards=1, batch=16, ranks=(16, 3), change=0.5, buffer=4)
@example(num_samples=500, num_shards=50, batch=64, ranks=(7, 16), change=0.4, buffer=32)
def test_promise__holds_on_real_tars(
    num_samples: int, num_shards: int, batch: int, ranks: tuple[int, int], change: float, buffer: int | None
) -> None:
    check_promise(num_samples, num_shards, batch, ranks, 0, change, buffer)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("num_samples", "num_shards", "batch", "ranks", "workers", "buffer"),
    [
        (120, 7, 12, (2, 1), 1, None),
        (3, 2, 4, (4, 2), 2, None),
        (90, 1, 8, (2, 1), 4, 4),
        (5, 5, 3, (3, 1), 2, 8),
        (111, 20, 10, (1, 2), 3, 16),
    ],
)
def test_promise__holds_with_loader_processes(
    num_samples: int, num_shards: int, batch: int, ranks: tuple[int, int], workers: int, buffer: int | None
) -> None:
    check_promise(num_samples, num_shards, batch, ranks, workers, 0.5, buffer)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream__augments_as_random_access_does(shard_set: ShardSet, workers: int) -> None:
    plain = {
        (place // 11, key): (image, label)
        for place, (key, image, label) in enumerate(samples_of(train_batches(shard_set, 6)))
    }
    streamed = samples_of(train_batches(shard_set, 5, workers=workers, buffer=2))
    for place, (key, image, label) in enumerate(streamed):
        expected = plain[place // 11, key]
        assert torch.equal(image, expected[0])
        assert torch.equal(label, expected[1])


def samples_of(batches: list[Batch]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    return [row for batch in batches for row in zip(batch.keys, batch.images, batch.labels, strict=True)]


def test_repeat__rare_classes_come_more_often_and_look_different(shard_set: ShardSet) -> None:
    rows = pq.read_table(Path(shard_set.uri) / "index.parquet").to_pylist()[:11]
    present = np.array([row["class_pixels"] for row in rows]) > 0
    factors = np.where(present, np.maximum(1, np.sqrt(0.9 / present.mean(axis=0).clip(1e-9))), 1.0).max(axis=1)
    assert factors.max() > 1.2
    num_epochs = 8
    steps = round(num_epochs * factors.sum() / 4)
    drawn = samples_of(train_batches(shard_set, steps, threshold=0.9))
    times = Counter(key for key, _, _ in drawn)
    for row, factor in zip(rows, factors, strict=True):
        assert abs(times[row["key"]] - num_epochs * factor) < 2.5
    most = rows[int(np.argmax(factors))]["key"]
    views = [image for key, image, _ in drawn if key == most]
    assert all(not torch.equal(left, right) for left, right in itertools.combinations(views, 2))
    resumed = samples_of(train_batches(shard_set, 2, start=5, threshold=0.9))
    assert [key for key, _, _ in resumed] == [key for key, _, _ in drawn[20:28]]


def test_loader__refuses_another_shard_set_at_the_records_place(shard_set: ShardSet) -> None:
    other = shard_set.model_copy(update={"digest": "0" * 64})
    with pytest.raises(ShardSetError, match=r"holds another shard set now \(digest .*, expected 000000000000\)"):
        train_batches(other, 1)
