"""A start for query-based upsampling: every grid query first looks at its own place.

The paper's grid queries and their attention start at random and must first learn where they are, which takes
tens of thousands of steps. Here queries start as sine-cosine position codes, and the projections of the
cross-attention as least-squares maps to those codes from what a pretrained ViT's tokens reveal of their place.
Nothing but initial values changes: structure, parameters and checkpoints are the paper's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segvit.attention import DecoderLayer
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.shrunk import QueryUpsampling, ShrunkDecoder
from segvit.inference.predict import evaluating
from segvit.model import SegViT

# B batch, L tokens on an (h, w) grid, C decoder channels

SHARPNESS = 40.0  # logit by which a query's own place would exceed the average, were it known exactly
RIDGE = 1e-3  # of the mean squared token


@torch.no_grad()
def localize_upsampling(model: SegViT, images: Tensor) -> float:
    """Initialise the upsampling layers of a Shrunk model so that each query attends to its own place.

    Args:
        model: A model of structure ``shrunk`` with pretrained backbone weights.
        images: Normalised training images (B, 3, H, W) of the model's `image_size`; a few dozen.

    Returns:
        The share of the position codes' variance that the first layer's tokens explain, at most 1.

    Raises:
        ValueError: The model is not ``shrunk``, or the images have another size.
    """
    decoder = model.decoder
    if not isinstance(decoder, ShrunkDecoder):
        raise ValueError(f"structure {model.config.structure!r} has no upsampling layers; use 'shrunk'")
    if tuple(images.shape[-2:]) != tuple(model.config.image_size):
        raise ValueError(f"images of {tuple(images.shape[-2:])} do not fit image_size {model.config.image_size}")
    with evaluating(model):
        features = model.backbone(images)
        width = decoder.grid_queries.weight.shape[1]
        place = position_codes(decoder.grid, decoder.grid, width).to(images)
        decoder.grid_queries.weight.copy_(place * math.sqrt(2))
        queries = decoder.grid_queries.weight.expand(len(images), -1, -1)
        explained = []
        for upsampling, feature in zip(decoder.upsampling, features, strict=True):
            assert isinstance(upsampling, QueryUpsampling)
            explained.append(localize_layers(upsampling, queries, feature, decoder.grid))
            queries = upsampling(queries, feature)
    return explained[0]


def localize_layers(upsampling: QueryUpsampling, queries: Tensor, features: FeatureMap, grid: tuple[int, int]) -> float:
    """Initialise the cross-attentions of one upsampling layer; returns the explained share of the codes."""
    tokens = upsampling.input(features.tokens)
    width = tokens.shape[-1]
    place, codes = (
        position_codes(cells, grid, width).to(tokens).expand(len(tokens), -1, -1) for cells in (grid, features.grid)
    )
    # The keys' intercept adds the same to all logits of a query, so it is left out.
    keys, _, explained = least_squares(tokens, codes)
    for layer in upsampling.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.cross_attention
        asking = layer.norm1(queries + layer.self_attention(queries, queries))
        wanted, intercept, _ = least_squares(asking, place)
        # A head sees every num_heads-th channel, so that each gets all wavelengths of both axes.
        channels = torch.arange(width, device=tokens.device).view(-1, attention.num_heads).T.reshape(-1)
        head_width = width // attention.num_heads
        # Codes have a squared length of width / 2, shared by the heads.
        gain = math.sqrt(SHARPNESS * math.sqrt(head_width) * attention.num_heads / (width / 2))
        attention.in_proj[:width] = wanted.T[channels] * gain
        attention.in_proj[width : 2 * width] = keys.T[channels] * gain
        attention.in_proj_bias[:width] = intercept[channels] * gain
        attention.in_proj_bias[width : 2 * width] = 0
        queries = layer(queries, tokens)
    return explained


def position_codes(grid: tuple[int, int], fine_grid: tuple[int, int], width: int) -> Tensor:
    """Sine-cosine codes (h*w, C) of the cell centres of `grid`, measured in cells of `fine_grid`.

    Half of the channels tell the row, half the column; wavelengths run from 3 to 40 cells. Squared length C / 2.
    """
    frequencies = torch.logspace(math.log10(2 * math.pi / 3), math.log10(2 * math.pi / 40), width // 4)

    def axis_codes(cells: int, extent: int) -> Tensor:
        centres = (torch.arange(cells) + 0.5) / cells * extent
        angles = centres[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    rows, columns = (axis_codes(cells, extent) for cells, extent in zip(grid, fine_grid, strict=True))
    spread = (*grid, -1)
    codes = torch.cat((rows[:, None].expand(spread), columns[None].expand(spread)), dim=-1).flatten(0, 1)
    return torch.nn.functional.pad(codes, (0, width - codes.shape[1]))


def least_squares(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression from inputs (B, L, C_in) to targets (B, L, C_out).

    Returns:
        The map (C_in, C_out), the intercept (C_out), and the explained share of the targets' variance.
    """
    flat_inputs, flat_targets = inputs.flatten(0, 1).double(), targets.flatten(0, 1).double()
    input_mean, target_mean = flat_inputs.mean(0), flat_targets.mean(0)
    flat_inputs, flat_targets = flat_inputs - input_mean, flat_targets - target_mean
    gram = flat_inputs.T @ flat_inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, flat_inputs.T @ flat_targets)
    residual = (flat_inputs @ solution - flat_targets).square().mean()
    explained = 1.0 - float(residual / flat_targets.square().mean())
    return solution.to(inputs), (target_mean - input_mean @ solution).to(inputs), explained
