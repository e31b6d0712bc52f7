"""Multiply-adds and parameters of a configuration, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from segvit.config import ModelConfig
from segvit.inference import semantic_scores
from segvit.model import assemble, build_model

LAYER_NORM_COST = 5  # per element
BILINEAR_COST = 4  # per output element


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one image costs.

    One multiply-add counts as one. Matrix products, convolutions and attention count, LayerNorm as 5 per
    element and bilinear resizing as 4 per output element; other element-wise work is not.
    """

    gflops: float
    """10^9 multiply-adds from the image to its full-resolution class scores."""
    parameters: int
    parts: dict[str, float]
    """`gflops` by part: ``backbone``, ``decoder``, ``scores``."""


def model_cost(config: ModelConfig, num_classes: int, size: tuple[int, int]) -> ModelCost:
    """Cost of one image of (height, width) pixels in evaluation mode; takes no weights and seconds at most.

    Raises:
        ValueError: The configuration does not fit the backbone.
    """
    with torch.device("meta"), torch.no_grad():
        model = build_model(config, num_classes).eval().requires_grad_(False)
        images = torch.empty(1, 3, *size)
        features, backbone = count(model.backbone, images)
        decoded, decoder = count(model.decoder, features)
        _, scores = count(semantic_scores, assemble(decoded, size), size)
    parts = {"backbone": backbone, "decoder": decoder, "scores": scores}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCost(sum(parts.values()), parameters, parts)


def count(run: Callable[..., Any], *inputs: Any) -> tuple[Any, float]:
    """The result of a call, and its 10^9 multiply-adds."""
    # The counter takes two operations for a multiply-add, so costs per element are given doubled.
    formulas = {
        torch.ops.aten.native_layer_norm: per_output_element(2 * LAYER_NORM_COST),
        torch.ops.aten.upsample_bilinear2d: per_output_element(2 * BILINEAR_COST),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        result = run(*inputs)
    return result, counter.get_total_flops() / 2 / 1e9


def per_output_element(cost: int) -> Callable[..., int]:
    """A counting formula: `cost` times the elements of the (first) output."""

    def formula(*_: Any, out_shape: Any, **__: Any) -> int:
        shape = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
        return cost * prod(shape)

    return formula
