"""Equal images: which one stays never depends on the order in which tasks end, and never lets val into train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shards.duplicates import Position, find_duplicates
from pipeline.shards.shard_task import DIGEST_BYTES, ShardResult


def result(name: str, digests: Sequence[bytes]) -> ShardResult:
    heads = b"".join(digest[:DIGEST_BYTES] for digest in digests)
    return ShardResult("", name, name.split("-", maxsplit=1)[0], "", 0, len(digests), 0, None, (), heads)


def sha(value: int) -> bytes:
    return hashlib.sha256(bytes([value])).digest()


@given(st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), st.lists(st.integers(0, 9), max_size=6))))
def test_find_duplicates__one_of_each_image_stays(layout: list[tuple[str, list[int]]]) -> None:
    order = [entry for split in ("train", "val", "test") for entry in layout if entry[0] == split]
    shards = {f"{split}-{number}": [sha(value) for value in values] for number, (split, values) in enumerate(order)}
    read: list[str] = []

    def read_digests(shard: str) -> Sequence[bytes]:
        read.append(shard)
        return shards[shard]

    found = find_duplicates([result(name, digests) for name, digests in shards.items()], read_digests)
    expected: dict[bytes, Position] = {}
    for split in ("val", "test", "train"):
        for name, digests in shards.items():
            if name.startswith(split):
                for row, digest in enumerate(digests):
                    expected.setdefault(digest, Position(name, row))
    every = {Position(name, row): digest for name, digests in shards.items() for row, digest in enumerate(digests)}
    assert found == {place: expected[digest] for place, digest in every.items() if expected[digest] != place}
    assert set(read) == {place.shard for place in [*found, *found.values()]}
    assert len(read) == len(set(read))


def test_find_duplicates__equal_heads_alone_are_no_duplicates() -> None:
    one, other = sha(1), sha(1)[:DIGEST_BYTES] + bytes(24)
    results = [result("train-0", [one, other]), result("val-0", [other])]
    digests = {"train-0": [one, other], "val-0": [other]}
    assert find_duplicates(results, digests.__getitem__) == {Position("train-0", 1): Position("val-0", 0)}


def test_find_duplicates__a_million_images_take_seconds() -> None:
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 1 << 63, 1_000_000, dtype=np.uint64)
    heads[900_000] = heads[100]
    parts = np.array_split(heads, 8000)
    results = [
        ShardResult("", f"train-{number:05d}", "train", "", 0, len(part), 0, None, (), part.astype("<u8").tobytes())
        for number, part in enumerate(parts)
    ]
    digests = {"train-00000": parts[0], "train-07200": parts[7200]}
    found = find_duplicates(results, lambda name: [value.tobytes() for value in digests[name]])
    assert found == {Position("train-07200", 0): Position("train-00000", 100)}
