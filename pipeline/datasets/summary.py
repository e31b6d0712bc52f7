"""What a raw data set holds, from its listing alone: no image is read."""

from __future__ import annotations

from typing import NamedTuple

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets import open_dataset


class SourceSummary(NamedTuple):
    """A raw data set before it is prepared; `num_bytes`: of its files where they lie in a local folder, else None."""

    name: str
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    num_bytes: int | None


def describe_source(config: DataConfig) -> SourceSummary:
    """Class names, splits and size of a raw data set; raises UserError where there is none of its layout."""
    dataset = open_dataset(config)
    return SourceSummary(dataset.name, dataset.class_names, dataset.splits(), _num_bytes(config.root))


def _num_bytes(root: str | None) -> int | None:
    if root is None or not storage.is_local(root):
        return None
    path = storage.local_path(root)
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
