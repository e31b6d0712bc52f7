"""What a raw data set holds, from its listing alone: no image is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets import list_splits, open_dataset
from pipeline.datasets.archive import is_archive


class SourceSummary(NamedTuple):
    """A raw data set before it is prepared.

    Attributes:
        num_colours: of the palette.
        num_samples: by split, before `max_samples_per_split`; empty for folders of remote storage, whose listing
            would take a request a thousand files.
        num_bytes: about those of the images that shards will hold; None where only reading images would tell.
    """

    name: str
    class_names: tuple[str, ...]
    num_colours: int
    splits: tuple[str, ...]
    num_samples: Mapping[str, int]
    num_bytes: int | None


def describe_source(config: DataConfig) -> SourceSummary:
    """Classes, splits and size of a raw data set; raises UserError where there is none of its layout."""
    dataset = open_dataset(config)
    num_samples: dict[str, int] = {}
    num_bytes = 0.0
    if config.root is None or storage.is_local(config.root) or is_archive(config.root):
        for split, samples in list_splits(dataset, config):
            num_samples[split] = len(samples)
            used = min(1.0, (config.max_samples_per_split or len(samples)) / len(samples))
            num_bytes += used * sum(sample.image_bytes for sample in samples)
    return SourceSummary(
        name=dataset.name,
        class_names=dataset.class_names,
        num_colours=len(dataset.palette),
        splits=tuple(num_samples) or dataset.splits(),
        num_samples=num_samples,
        num_bytes=round(num_bytes) if num_bytes and config.max_long_side is None else None,
    )
