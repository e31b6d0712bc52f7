"""A listing of any length takes little memory once it is parked, and loses nothing."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import pytest

from pipeline.config import DataConfig
from pipeline.datasets import RawPair, RawSample
from pipeline.errors import UserError
from pipeline.shards.listing import Listing
from pipeline.shards.prepare import prepare_shards

CONFIG = DataConfig(dataset="long", samples_per_shard=128)


class Samples(Sequence[RawSample]):
    """`count` samples that are made when asked for; number `twice` has the key of number 0."""

    def __init__(self, split: str, count: int, twice: int | None) -> None:
        self.split, self.length, self.twice = split, count, twice

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, place: int) -> RawSample: ...
    @overload
    def __getitem__(self, place: slice) -> list[RawSample]: ...
    def __getitem__(self, place: int | slice) -> RawSample | list[RawSample]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(self.length))]
        name = f"{0 if place == self.twice else place:09d}"
        folder = f"/mnt/data/some_dataset/{self.split}"
        return RawSample(name, f"{folder}/{place:09d}.jpg", f"{folder}annot/{place:09d}.png", f"{place}:1763000000.25")

    def __iter__(self) -> Iterator[RawSample]:
        return (self[place] for place in range(self.length))


class Long:
    """A data set of names alone."""

    name = "long"
    class_names = ("x",)
    palette = ((0, 0, 0),)

    def __init__(self, num_train: int, twice: int | None = None) -> None:
        self.num_train, self.twice = num_train, twice

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def samples(self, split: str) -> Sequence[RawSample]:
        return Samples(split, self.num_train if split == "train" else 5, self.twice if split == "train" else None)

    def read(self, sample: RawSample) -> RawPair:
        raise NotImplementedError

    def source_digest(self) -> str:
        return ""


def test_listing__every_sample_once_in_order() -> None:
    with Listing(Long(300), CONFIG) as listing:
        assert [(shard.name, shard.num_samples) for shard in listing.shards] == [
            ("train-00000.tar", 128),
            ("train-00001.tar", 128),
            ("train-00002.tar", 44),
            ("val-00000.tar", 5),
        ]
        assert listing.num_samples == 305
        # Read in any order.
        plans = {shard.name: listing.load(shard) for shard in reversed(listing.shards)}
        train = [sample for shard in listing.shards[:3] for sample in plans[shard.name].samples]
        assert train == list(Long(300).samples("train"))
        assert [plans[shard.name].digest for shard in listing.shards] == [shard.digest for shard in listing.shards]
        with Listing(Long(300), CONFIG) as again:
            assert again.digest == listing.digest
        with Listing(Long(300), CONFIG.model_copy(update={"max_long_side": 9})) as other:
            assert not {shard.digest for shard in other.shards} & {shard.digest for shard in listing.shards}
    with Listing(Long(300), CONFIG.model_copy(update={"max_samples_per_split": 3})) as few:
        assert [sample.key for sample in few.load(few.shards[0]).samples] == ["000000000", "000000100", "000000200"]


def test_listing__equal_names_far_apart_are_found() -> None:
    with pytest.raises(UserError, match=r"000000299\.jpg: another image in split 'train' has this name; rename one"):
        Listing(Long(300, twice=299), CONFIG)


def listing_bytes(count: int) -> tuple[int, int]:
    """Bytes that the listing of so many samples holds, and the most it took meanwhile."""
    tracemalloc.start()
    try:
        with Listing(Long(count), CONFIG) as listing:
            assert listing.num_samples == count + 5
            return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_listing__memory_is_a_few_bytes_a_sample() -> None:
    # What one shard's samples take, and what is imported on first use, does not grow with their number.
    listing_bytes(8)
    (held, peak), (held_twice, peak_twice) = listing_bytes(8_000), listing_bytes(16_000)
    # As objects the samples would take about 500 bytes each.
    assert held_twice - held < 8 * 8_000
    assert peak_twice - peak < 60 * 8_000


def test_prepare__listing_that_fails_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise PermissionError(13, "Permission denied", "/data/train")

    monkeypatch.setattr("pipeline.datasets.digits.Digits.samples", fail)
    with pytest.raises(UserError, match=r"^data root .* cannot be listed \(.*Permission denied: '/data/train'\); mend"):
        prepare_shards(DataConfig(dataset="digits"), str(tmp_path / "out"), progress=lambda line: None)
