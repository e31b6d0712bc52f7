"""Images that are there twice: found by the digests that the shard tasks send back, 8 bytes an image.

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
class Place:
    """Checked sample number `row` of a shard."""

    shard: str
    row: int


def find_duplicates(
    results: Sequence[ShardResult], read_digests: Callable[[str], Sequence[bytes]]
) -> dict[Place, Place]:
    """The place of every image to leave out, each with the place of its equal that stays.

    `results` come in the order of the data set. `read_digests` gives the whole sha256 of all checked images of a
    shard; it is called only for the few shards where the first 8 bytes meet.
    """
    # sorted() is stable: within both groups the data set's order stays.
    ranked = sorted(results, key=lambda result: result.split == "train")
    if not ranked:
        return {}
    starts = np.cumsum([0, *(len(result.image_digests) // DIGEST_BYTES for result in ranked)])
    heads = np.frombuffer(b"".join(result.image_digests for result in ranked), dtype="<u8")
    equals: defaultdict[bytes, list[Place]] = defaultdict(list)
    digests: dict[str, Sequence[bytes]] = {}
    for position in _repeated(heads).tolist():
        number = int(np.searchsorted(starts, position, side="right")) - 1
        place = Place(ranked[number].name, position - int(starts[number]))
        if place.shard not in digests:
            digests[place.shard] = read_digests(place.shard)
        equals[digests[place.shard][place.row]].append(place)
    return {place: places[0] for places in equals.values() for place in places[1:]}


def _repeated(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Positions of all values that are there more than once, rising."""
    ordered = np.sort(values)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not twice.size:
        return np.empty(0, dtype=np.int64)
    found = np.minimum(np.searchsorted(twice, values), twice.size - 1)
    return np.flatnonzero(twice[found] == values)
