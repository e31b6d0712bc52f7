"""A model on disk: ``model.safetensors`` and ``config.json`` in one folder, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segvit.config import MAX_CLASSES, ModelConfig
from segvit.flops import outline_model
from segvit.model import SegViT, build_model

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT_VERSION = 2
MAX_CONFIG_BYTES = 1 << 24
MAX_SHOWN = 400  # characters of an error of the files' reader


def save_checkpoint(folder: str | Path, model: SegViT, metadata: Mapping[str, Any]) -> None:
    """Write a model's weights, its configuration and what its classes mean.

    Each file is published by rename, the configuration last.

    Args:
        folder: Made if missing; files of an earlier checkpoint in it are replaced.
        model: The bare model, not a compiled or distributed wrapper.
        metadata: JSON-able; by convention with ``class_names`` and ``palette`` (RGB), one entry a class, and with
            ``grey_range``, the two values that were 0 and 255 to the model, where it knows images of more than 8 bits
            a channel.

    Raises:
        TypeError: A wrapper around the model, or metadata that JSON cannot hold.
        ValueError: As many class names or colours as there are no classes, or a grey range that does not rise.
    """
    if not isinstance(model, SegViT):
        raise TypeError(f"save_checkpoint takes the SegViT itself, got {type(model).__name__}; pass the wrapped module")
    check_metadata(metadata, model.num_classes)
    config = {
        "format_version": FORMAT_VERSION,
        "model": model.config.to_dict(),
        "num_classes": model.num_classes,
        "metadata": dict(metadata),
    }
    text = json.dumps(config, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A new weights file beside an old configuration would be a checkpoint of neither model.
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    publish(folder / WEIGHTS_FILE, lambda path: save_file(state, path, metadata={"format": "pt"}))
    publish(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> tuple[SegViT, dict[str, Any]]:
    """The model of a folder, in evaluation mode on the device, and its metadata.

    Raises:
        FileNotFoundError: No complete checkpoint in the folder.
        ValueError: A file that is damaged, of another format version, or that does not match the other.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no checkpoint in {folder}: {name} is missing")
    config = read_config(folder / CONFIG_FILE)
    try:
        model_config = ModelConfig.from_dict(config["model"])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is of no model: {str(error)[:MAX_SHOWN]}") from error
    try:
        _refuse_other_shapes(folder / WEIGHTS_FILE, outline_model(model_config, config["num_classes"]))
        model = build_model(model_config, config["num_classes"])
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    # Damaged files raise nearly anything from inside the reader and timm; each means the same to the user.
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:MAX_SHOWN]
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {reason}") from error
    return model.to(device).eval(), config["metadata"]


def _refuse_other_shapes(path: Path, outline: SegViT) -> None:
    """Raise ValueError unless the file holds the tensors of `outline`, before memory is taken for any of them."""
    needed = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    with safe_open(path, "pt") as file:
        given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if given != needed:
        names = sorted(name for name in needed.keys() | given.keys() if needed.get(name) != given.get(name))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"tensor {names[0]} has shape {given.get(names[0])}, the configuration needs {needed.get(names[0])}{more}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The checked contents of a checkpoint's configuration file; raises ValueError."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is longer than the {MAX_CONFIG_BYTES} bytes that a configuration may have")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    keys = {"format_version", "model", "num_classes", "metadata"}
    if not isinstance(config, dict) or set(config) != keys:
        raise ValueError(f"{path} is not a checkpoint's configuration; it must hold {', '.join(sorted(keys))}")
    if config["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {config['format_version']}, this release reads {FORMAT_VERSION}; "
            "load it with the release that wrote it"
        )
    model, num_classes, metadata = config["model"], config["num_classes"], config["metadata"]
    if not isinstance(model, dict) or not isinstance(metadata, dict):
        raise ValueError(f"{path} is damaged: model and metadata are mappings by name")
    if not isinstance(num_classes, int) or not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"{path} is damaged: num_classes {num_classes!r:.40} is no number from 1 to {MAX_CLASSES}")
    try:
        check_metadata(metadata, num_classes)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: its metadata are of another form ({error})") from None
    return config


def check_metadata(metadata: Mapping[str, Any], num_classes: int) -> None:
    """Raise ValueError unless class names, palette and grey range, where given, are what `save_checkpoint` says."""
    for name in ("class_names", "palette"):
        if name in metadata and len(metadata[name]) != num_classes:
            raise ValueError(f"{name} has {len(metadata[name])} entries for {num_classes} classes; give one a class")
    grey_range = metadata.get("grey_range")
    if grey_range is not None and not (len(grey_range) == 2 and grey_range[0] < grey_range[1]):
        raise ValueError(f"grey_range {grey_range} must be two values, the lower one first")


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, then rename, so that no reader sees half a file."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    os.replace(partial, path)
