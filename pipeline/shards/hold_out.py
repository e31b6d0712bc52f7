"""A part of the training split held apart, for choices that must not be made on the split that is reported."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.shards.shards import evenly_spaced

# Neighbours by key, such as the frames of a video, are mostly on the same side: so many runs of them are dealt out.
RUNS = 20


def hold_out(keys: pa.Array, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which samples of a split (n,) remain, and which are held apart, both ascending.

    The samples in the order of their keys are cut into runs of neighbours; evenly spaced ones of these are held
    apart, at least one and never all.

    Raises:
        UserError: Fewer than two samples.
    """
    runs = min(RUNS, len(keys))
    if runs < 2:
        raise UserError(f"a split of {len(keys)} sample has no part to hold apart; leave tune.hold_out out")
    held_runs = evenly_spaced(runs, min(max(round(share * runs), 1), runs - 1))
    run = np.arange(len(keys)) * runs // len(keys)
    held = np.empty(len(keys), dtype=bool)
    held[pc.sort_indices(keys).to_numpy()] = np.isin(run, held_runs)
    return np.flatnonzero(~held), np.flatnonzero(held)
