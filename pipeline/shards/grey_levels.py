"""The grey range of a data set: one for all its images of more than 8 bits a channel, stated or measured over train."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.shards.shard_task import DIGEST_BYTES, ShardResult
from segvit.grey_range import GreyRange, join_ranges


def common_range(
    dataset: str, config: DataConfig, results: Collection[ShardResult], report: Callable[[str], None]
) -> GreyRange | None:
    """The range that scales all deep images of the shards; None where there are none.

    It is `data.grey_range`, or else the smallest that holds the range of every deep image of train, see
    `segvit.grey_range.measure_range`. `report` gets a line that says so. Raises UserError where train shows none.
    """
    num_deep = sum(result.num_deep for result in results)
    if not num_deep:
        if config.grey_range is not None:
            report(f"prepare {dataset}: no image has more than 8 bits a channel; data.grey_range changes nothing")
        return None
    num_images = sum(len(result.image_digests) // DIGEST_BYTES for result in results)
    train = [result.measured for result in results if result.split == "train"]
    grey_range = config.grey_range or functools.reduce(join_ranges, train, None)
    if grey_range is None or grey_range[0] == grey_range[1]:
        why = "none of train has" if grey_range is None else f"those of train hold one value, {grey_range[0]:g}"
        raise UserError(
            f"{dataset}: {num_deep} images have more than 8 bits a channel, and {why}, so nothing says which of their "
            "values are black and white; set data.grey_range: [low, high]"
        )
    low, high = grey_range
    source = "as data.grey_range says" if config.grey_range else "measured over train; data.grey_range sets another"
    others = "" if num_deep == num_images else f"; the other {num_images - num_deep} of 8 bits stay as they are"
    report(
        f"prepare {dataset}: {num_deep} images of more than 8 bits a channel: {low:g} to {high:g} become 0 to 255 "
        f"({source}){others}"
    )
    return grey_range
