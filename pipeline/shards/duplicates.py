"""Duplicate images: found by the digests that the shard tasks send back, 8 bytes an image.

One of the two is left out, and always the same one, whatever order the tasks ended in: an image of an evaluation
split stays rather than one of train, for what is trained on must not be scored on; then the earlier one stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.shard_task import DIGEST_BYTES, ShardResult


@dataclass(frozen=True, slots=True)
class Position:
    """Checked sample number `row` of a shard."""

    shard: str
    row: int


def find_duplicates(
    results: Sequence[ShardResult], read_digests: Callable[[str], Sequence[bytes]]
) -> dict[Position, Position]:
    """The position of every image to leave out, each with that of its equal that stays.

    `results` come in the order of the data set. `read_digests` gives the whole sha256 of all checked images of a
    shard; it is called only for the few shards where the first 8 bytes meet.
    """
    # sorted() is stable: within both groups the data set's order stays.
    ranked = sorted(results, key=lambda result: result.split == "train")
    if not ranked:
        return {}
    starts = np.cumsum([0, *(len(result.image_digests) // DIGEST_BYTES for result in ranked)])
    heads = np.frombuffer(b"".join(result.image_digests for result in ranked), dtype="<u8")
    equals: defaultdict[bytes, list[Position]] = defaultdict(list)
    digests: dict[str, Sequence[bytes]] = {}
    for image in repeated(heads).tolist():
        number = int(np.searchsorted(starts, image, side="right")) - 1
        position = Position(ranked[number].name, image - int(starts[number]))
        if position.shard not in digests:
            digests[position.shard] = read_digests(position.shard)
        equals[digests[position.shard][position.row]].append(position)
    return {position: positions[0] for positions in equals.values() for position in positions[1:]}


def repeated(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Indices of all values that are there more than once, rising."""
    unique, counts = np.unique(values, return_counts=True)
    return np.flatnonzero(np.isin(values, unique[counts > 1]))
