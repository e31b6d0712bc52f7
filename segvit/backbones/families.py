"""timm's backbones that SegViT builds on: plain ViTs of three classes, and Swin."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models import is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

NO_OPTIONS: Mapping[str, int | float] = MappingProxyType({})
FAMILY_PATTERNS = ["vit_*", "deit3_*", "beit*", "eva*", "flexivit_*", "swin_*"]
SWIN_STAGES = 4

PlainViT = VisionTransformer | Eva | Beit
"""augreg, DeiT III, DINOv2, SigLIP, CLIP; rotary EVA-02 and DINOv3; BEiT with its relative position bias."""


def outline_backbone(
    name: str, options: Mapping[str, int | float] = NO_OPTIONS, image_size: tuple[int, int] | None = None
) -> PlainViT | SwinTransformer:
    """timm's model of that name on the meta device: names and shapes without weights.

    Args:
        name: timm model name.
        options: See `ModelConfig.backbone_options`.
        image_size: (height, width) in pixels that its grid or windows are for, valid by `image_size_problems`;
            None: the name's own.

    Returns:
        A network to be read only: who asks again gets the same one.

    Raises:
        ValueError: Unknown name, or neither a plain ViT with square patches nor a Swin.
    """
    return _outline(name, tuple(sorted(options.items())), image_size)


@lru_cache(maxsize=16)
def _outline(
    name: str, given: tuple[tuple[str, int | float], ...], image_size: tuple[int, int] | None
) -> PlainViT | SwinTransformer:
    options = dict(given)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(FAMILY_PATTERNS), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models('vit_*')"
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    arguments = timm_options(options, is_hierarchical(name))
    if image_size is not None:
        arguments["img_size"] = image_size
    try:
        with torch.device("meta"):
            network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"backbone_options {dict(options)} do not fit {name}: {error}") from None
    except RuntimeError as error:  # an unknown tag of pretrained weights
        architecture = name.partition(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or architecture
        raise ValueError(f"unknown backbone {name!r}: {error}; choose from {tags}") from None
    # Exact types: a subclass may change what the features are made of.
    if type(network) not in (VisionTransformer, Eva, Beit, SwinTransformer):
        raise ValueError(
            f"backbone {name} is a {type(network).__name__}, not a plain VisionTransformer, Eva or Beit, "
            "nor a Swin; choose a name such as vit_base_patch16_384 or vit_small_patch14_dinov2"
        )
    assert isinstance(network, PlainViT | SwinTransformer)
    embedding = network.patch_embed
    if type(embedding) is not PatchEmbed:
        raise ValueError(
            f"backbone {name} embeds patches by a {type(embedding).__name__}, not by one linear map; "
            "choose a name without a convolutional stem such as vit_base_patch16_384"
        )
    rows, columns = embedding.patch_size
    if rows != columns:
        raise ValueError(f"backbone {name} has {rows} x {columns} patches; choose one with square patches")
    return network


def is_hierarchical(name: str) -> bool:
    """Whether the name is that of a backbone with stages of several strides."""
    return is_model_in_modules(name, ["swin_transformer"])


def create_vit(name: str, image_size: tuple[int, int], options: Mapping[str, int | float] = NO_OPTIONS) -> PlainViT:
    """timm's plain ViT of that name with random weights, sized for (height, width) pixels.

    Raises:
        ValueError: Unknown or unsupported model, or a size that is no multiple of the patch size.
    """
    outline = outline_backbone(name, options)
    if isinstance(outline, SwinTransformer):
        raise ValueError(f"backbone {name} is hierarchical, not a plain ViT; choose one such as vit_base_patch16_384")
    if problems := image_size_problems(outline, image_size):
        raise ValueError("; ".join(problems))
    # Beit takes no such setting: its features are computed for any grid here, see `positions`.
    arguments = timm_options(options, hierarchical=False)
    if not isinstance(outline, Beit):
        arguments["dynamic_img_size"] = True
    vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, **arguments)
    assert isinstance(vit, PlainViT)
    for module in vit.modules():
        # L x L integers a block, which take more memory than the weights on large grids and are not read here.
        if getattr(module, "relative_position_index", None) is not None:
            module.relative_position_index = None  # type: ignore[assignment]
    return vit


def create_swin(
    name: str, image_size: tuple[int, int], options: Mapping[str, int | float] = NO_OPTIONS
) -> SwinTransformer:
    """timm's Swin of that name with random weights, its windows those of (height, width) pixels.

    Raises:
        ValueError: Unknown or unsupported model, or a size that is no multiple of the last stage's stride.
    """
    outline = outline_backbone(name, options)
    if not isinstance(outline, SwinTransformer):
        raise ValueError(f"backbone {name} is not hierarchical; choose one such as swin_tiny_patch4_window7_224")
    if problems := image_size_problems(outline, image_size):
        raise ValueError("; ".join(problems))
    swin = timm.create_model(
        name,
        pretrained=False,
        num_classes=0,
        img_size=image_size,
        dynamic_img_size=True,
        drop_path_rate=0.0,
        **timm_options(options, hierarchical=True),
    )
    assert isinstance(swin, SwinTransformer)
    return swin


def timm_options(options: Mapping[str, int | float], hierarchical: bool) -> dict[str, Any]:
    """timm's arguments for the options: a Swin has `depth` blocks in each stage, heads that double with the width."""
    if not hierarchical:
        return dict(options)
    arguments: dict[str, Any] = {name: value for name, value in options.items() if name not in ("depth", "num_heads")}
    if "depth" in options:
        arguments["depths"] = (options["depth"],) * SWIN_STAGES
    if "num_heads" in options:
        arguments["num_heads"] = tuple(options["num_heads"] * 2**stage for stage in range(SWIN_STAGES))
    return arguments


def image_size_problems(network: PlainViT | SwinTransformer, image_size: tuple[int, int]) -> list[str]:
    """Why a training crop of (height, width) pixels does not lie on the network's patch grid; empty where it does."""
    embedding: Any = network.patch_embed
    multiple, rule = embedding.patch_size[0], "patch size"
    if isinstance(network, SwinTransformer):
        multiple, rule = multiple * 2 ** (SWIN_STAGES - 1), "last stride"
    name, problems = network.pretrained_cfg["architecture"], []  # type: ignore[index]
    for size in dict.fromkeys(image_size):
        if size % multiple:
            lower, upper = size // multiple * multiple, (size // multiple + 1) * multiple
            remedy = f"{lower} or {upper}" if lower else f"{upper}"
            problems.append(f"image_size {size} is not a multiple of {name}'s {rule} {multiple}; use {remedy}")
    return problems


def num_heads_of(block: nn.Module) -> int:
    """Attention heads of a timm block of any kind."""
    heads: int = next(module.num_heads for module in block.modules() if hasattr(module, "num_heads"))  # type: ignore[assignment]
    return heads
