"""Raw data sets by name: each file reads one layout as its publisher ships it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets.ade20k import ADE20K
from pipeline.datasets.camvid import CamVid
from pipeline.datasets.cityscapes import Cityscapes
from pipeline.datasets.coco import Coco
from pipeline.datasets.coco_stuff import CocoStuff10K
from pipeline.datasets.digits import Digits
from pipeline.datasets.folder import Folder
from pipeline.datasets.label_studio import LabelStudio
from pipeline.datasets.labelme import Labelme
from pipeline.datasets.parquet import Parquet
from pipeline.datasets.pascal_context import PascalContext
from pipeline.datasets.raw import RawDataset, RawPair, RawSample, RejectedSampleError
from pipeline.errors import UserError

__all__ = [
    "RawDataset",
    "RawPair",
    "RawSample",
    "RejectedSampleError",
    "dataset_names",
    "list_splits",
    "open_dataset",
]


def _open_digits(config: DataConfig) -> RawDataset:
    if config.root is not None:
        raise UserError(f"data.root {config.root!r}: dataset digits is embedded and reads no root; remove it")
    return Digits(config.digits, seed=config.seed)


_DATASETS: dict[str, Callable[[DataConfig], RawDataset]] = {
    "ade20k": lambda config: ADE20K(_root(config), config.linked_folders),
    "camvid": lambda config: CamVid(_root(config), config.linked_folders),
    "cityscapes": lambda config: Cityscapes(_root(config), config.linked_folders),
    "coco": lambda config: Coco(_root(config), config.coco, config.seed, config.linked_folders),
    "coco_stuff10k": lambda config: CocoStuff10K(_root(config), config.linked_folders),
    "digits": _open_digits,
    "folder": lambda config: Folder(_root(config), config.folder, config.seed, config.linked_folders),
    "label_studio": lambda config: LabelStudio(_root(config), config.label_studio, config.seed, config.linked_folders),
    "labelme": lambda config: Labelme(_root(config), config.labelme, config.seed, config.linked_folders),
    "parquet": lambda config: Parquet(_root(config), config.parquet, config.seed, config.linked_folders),
    "pascal_context_59": lambda config: PascalContext(_root(config), False, config.linked_folders),
    "pascal_context_60": lambda config: PascalContext(_root(config), True, config.linked_folders),
}


def dataset_names() -> tuple[str, ...]:
    """The names that `data.dataset` may have."""
    return tuple(sorted(_DATASETS))


def open_dataset(config: DataConfig) -> RawDataset:
    """The raw data set that `config` names; raises UserError where there is none."""
    if config.dataset not in _DATASETS:
        raise UserError(f"unknown dataset {config.dataset!r}; choose from {', '.join(dataset_names())}")
    return _DATASETS[config.dataset](config)


def list_splits(dataset: RawDataset, config: DataConfig) -> Iterator[tuple[str, Sequence[RawSample]]]:
    """Each split, train first, with its samples; raises UserError for one without, and for files not to be listed."""
    try:
        for split in dataset.splits():
            samples = dataset.samples(split)
            if not samples:
                where = f" below {config.root}" if config.root else ""
                raise UserError(f"dataset {dataset.name} has no images in split {split!r}{where}; check data.root")
            yield split, samples
    except OSError as error:
        raise UserError(
            f"data root {config.root} cannot be listed ({error}); mend or remove what is named, or its permissions"
        ) from error


def _root(config: DataConfig) -> str:
    if config.root is None:
        raise UserError(f"dataset {config.dataset} needs data.root, the folder or archive that holds it; set it")
    # Absolute, because tasks on other processes resolve relative paths against folders of their own.
    return str(storage.local_path(config.root)) if storage.is_local(config.root) else config.root
