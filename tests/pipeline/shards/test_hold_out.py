from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import UserError
from pipeline.shards.hold_out import RUNS, hold_out


@pytest.mark.parametrize(("count", "share"), [(2, 0.9), (3, 0.01), (19, 0.2), (40, 0.2), (467, 0.2), (1000, 0.99)])
def test_hold_out__two_parts_of_the_samples_near_the_share(count: int, share: float) -> None:
    keys = pa.array([f"{number:04d}" for number in np.random.default_rng(0).permutation(count)])
    rest, held = hold_out(keys, share)
    assert sorted([*rest, *held]) == list(range(count))
    assert len(rest) > 0
    assert len(held) > 0
    assert list(held) == sorted(held)
    assert abs(len(held) - share * count) <= max(1, count / min(RUNS, count))


def test_hold_out__runs_of_neighbours_by_key_in_whatever_order_they_lie() -> None:
    order = np.random.default_rng(1).permutation(100)
    keys = pa.array([f"frame-{number:03d}" for number in order])
    _, held = hold_out(keys, 0.2)
    assert sorted(order[held]) == [*range(5), *range(25, 30), *range(50, 55), *range(75, 80)]


def test_hold_out__one_sample_cannot_be_parted() -> None:
    with pytest.raises(UserError, match=r"a split of 1 sample has no part to hold apart; leave tune\.hold_out out"):
        hold_out(pa.array(["only"]), 0.2)
