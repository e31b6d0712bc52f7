"""Models that lie somewhere as files: a checkpoint folder, or a file of the published format."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage.names import CHECKPOINT_FILES, CONFIG_FILE, PUBLISHED_SUFFIXES, WEIGHTS_FILE

if TYPE_CHECKING:
    from segvit.config import ModelConfig


class SourceDigests(NamedTuple):
    """sha256 sums of a model's files."""

    weights: str
    config: str
    """Of a folder's config.json, "" of a file of the published format."""


def is_published_file(model: str) -> bool:
    """Whether that names a file of the published format."""
    return Path(model).suffix in PUBLISHED_SUFFIXES


def absolute(uri: str) -> str:
    """The URI, or a local path in full: steps run in folders of their own."""
    return str(storage.local_path(uri).absolute()) if storage.is_local(uri) else uri


def source_digests(model: str) -> SourceDigests:
    """The sums of a folder's or file's content; raises UserError for what is no model."""
    require_files(model)
    if is_published_file(model):
        return SourceDigests(storage.file_digest(model), "")
    weights, config = (storage.file_digest(storage.join(model, file)) for file in CHECKPOINT_FILES)
    return SourceDigests(weights, config)


def require_files(model: str) -> None:
    """Raise UserError unless there is a checkpoint folder, or a file that may be of the published format."""
    if is_published_file(model):
        if not storage.exists(model):
            raise UserError(f"no file at {model}; a model is models:/NAME@ALIAS, a checkpoint folder or a .pth file")
        folder = model.rpartition("/")[0]
        if model.endswith(f"/{WEIGHTS_FILE}") and storage.exists(storage.join(folder, CONFIG_FILE)):
            raise UserError(f"{model} is one of the files of a checkpoint; name its folder, {folder}")
        return
    for file in CHECKPOINT_FILES:
        if not storage.exists(storage.join(model, file)):
            raise UserError(
                f"{model} is no checkpoint folder, it has no {file}; a model is models:/NAME@ALIAS, a checkpoint "
                f"folder or a file of the published format ({', '.join(PUBLISHED_SUFFIXES)})"
            )


def start_config(model: str, config: ModelConfig) -> ModelConfig | None:
    """The configuration of the model at a folder or file, for one of `config` that is to start from it.

    None where it cannot be told without fetching a large file. Raises UserError for what is no model, and for a file
    of the published format that does not fit.
    """
    from segvit.checkpoint import read_config
    from segvit.config import ModelConfig
    from segvit.weights.published_start import read_published_start

    require_files(model)
    try:
        if is_published_file(model):
            local = storage.is_local(model)
            return read_published_start(storage.local_path(model), config).config if local else None
        with tempfile.TemporaryDirectory(prefix="segvit-config-") as scratch:
            file = storage.fetch_file(storage.join(model, CONFIG_FILE), scratch)
            return ModelConfig.from_dict(read_config(file)["model"])
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
