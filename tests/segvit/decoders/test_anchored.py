"""Anchored upsampling: where it starts, what it reads, and the cascade over it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segvit
from segvit.backbones.downsampling import ShrinkQueries, halved_grid
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.anchored import (
    LEAST_WEIGHT,
    AnchoredUpsampling,
    bilinear_weights,
    cells_of,
    neighbours_of,
    patches_of,
)
from segvit.decoders.atm import DecoderSizes

SIZES = DecoderSizes(num_classes=3, width=8, num_heads=2, num_layers=1, dropout=0.0)
FINE = (5, 8)
COARSE = halved_grid(FINE)


def features(seed: int = 0) -> tuple[FeatureMap, FeatureMap]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, COARSE[0] * COARSE[1], 16, generator=generator)
    low = torch.randn(2, FINE[0] * FINE[1], 12, generator=generator)
    return FeatureMap(coarse, COARSE, 32, FINE), FeatureMap(low, FINE, 16, FINE)


def as_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.unflatten(tokens.transpose(1, 2), 2, grid)


def tiny(**options: object) -> segvit.ModelConfig:
    return segvit.ModelConfig(
        backbone="vit_tiny_patch16_224",
        image_size=(80, 128),
        structure="anchored",
        decoder_layers=1,
        backbone_options={"depth": 4},
        **{"out_layers": (0, 1, 3), "shrink_at": 1, "dropout": 0.0, "drop_path_rate": 0.0, **options},
    )


def test_anchored_upsampling__pooled_tokens_start_as_bilinear_interpolation() -> None:
    coarse, low = features()
    upsampled = AnchoredUpsampling(12, 16, SIZES, "average")(coarse, low)
    expected = F.interpolate(as_image(coarse.tokens, COARSE), scale_factor=2, mode="bilinear", align_corners=False)
    difference = as_image(upsampled.tokens, FINE) - expected[:, :, : FINE[0], : FINE[1]]
    # Five of the nine weights are LEAST_WEIGHT instead of nothing.
    assert difference.abs().max() <= 5 * LEAST_WEIGHT * 2 * coarse.tokens.abs().max()
    assert (upsampled.grid, upsampled.stride, upsampled.patch_grid) == (FINE, 16, FINE)


def test_anchored_upsampling__sampled_tokens_start_at_their_own_patch() -> None:
    coarse, low = features()
    upsampled = as_image(AnchoredUpsampling(12, 16, SIZES, "nearest")(coarse, low).tokens, FINE)
    image = as_image(coarse.tokens, COARSE)
    limit = 8 * LEAST_WEIGHT * 2 * coarse.tokens.abs().max()
    assert (upsampled[:, :, ::2, ::2] - image).abs().max() <= limit
    between = (image[:, :, :, :-1] + image[:, :, :, 1:]) / 2
    assert (upsampled[:, :, ::2, 1:-1:2] - between).abs().max() <= limit


@pytest.mark.parametrize("sampling", ["nearest", "average", "convolution"])
def test_bilinear_weights__of_every_patch_sum_to_one(sampling: ShrinkQueries) -> None:
    assert torch.equal(bilinear_weights(sampling).sum(1), torch.ones(4))


def test_anchored_upsampling__a_patch_reads_its_surroundings_and_its_own_detail_alone() -> None:
    torch.manual_seed(0)
    upsampling = AnchoredUpsampling(12, 16, SIZES, "nearest")
    for branch in (upsampling.q, upsampling.detail):
        torch.nn.init.normal_(branch.weight)
    coarse, low = features()
    coarse = coarse._replace(tokens=coarse.tokens.requires_grad_())
    low = low._replace(tokens=low.tokens.requires_grad_())
    row, column = 2, 5
    upsampling(coarse, low).tokens[0, row * FINE[1] + column].sum().backward()
    assert coarse.tokens.grad is not None
    assert low.tokens.grad is not None
    read = torch.unflatten(coarse.tokens.grad[0].abs().sum(1), 0, COARSE) > 0
    expected = torch.zeros(COARSE, dtype=torch.bool)
    expected[max(row // 2 - 1, 0) : row // 2 + 2, column // 2 - 1 : column // 2 + 2] = True
    assert torch.equal(read, expected)
    assert (low.tokens.grad[0].abs().sum(1) > 0).nonzero().flatten().tolist() == [row * FINE[1] + column]
    assert not coarse.tokens.grad[1].any()


@pytest.mark.parametrize("grid", [(4, 6), (5, 8), (3, 7), (1, 2)])
def test_cells_of__patches_come_back_to_their_places(grid: tuple[int, int]) -> None:
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    cells = cells_of(tokens, grid)
    assert cells.shape == (2, halved_grid(grid)[0] * halved_grid(grid)[1], 4, 3)
    assert torch.equal(patches_of(cells, halved_grid(grid), grid), tokens)


def test_neighbours_of__row_by_row_with_the_border_repeated() -> None:
    tokens = torch.arange(6.0).reshape(1, 6, 1)  # 0 1 2 / 3 4 5
    neighbours = neighbours_of(tokens, (2, 3))[0, :, :, 0].tolist()
    assert neighbours[1] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert neighbours[3] == [0, 0, 1, 3, 3, 4, 3, 3, 4]


@pytest.mark.parametrize("size", [(80, 128), (72, 100)])
def test_anchored__every_parameter_learns_at_the_full_grid(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = segvit.build_model(tiny(class_token=False), num_classes=3)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    # Keys and norms wait for the branches that start at zero: they learn from the second step on.
    for _ in range(2):
        optimizer.zero_grad()
        output = model(torch.randn(2, 3, *size))
        predictions = (output, *output.auxiliary)
        sum((one.mask_logits.square().mean() + one.class_logits.square().mean()) for one in predictions).backward()
        optimizer.step()
    assert output.mask_logits.shape[-2:] == (5, -(-size[1] // 16))
    assert len(output.auxiliary) == 1
    assert [name for name, value in model.named_parameters() if value.grad is not None and not value.grad.any()] == []


def test_anchored__default_layers_and_their_rule() -> None:
    config = tiny(out_layers=None, shrink_at=None)
    assert config.decoder.default_out_layers(12, hierarchical=False) == (3, 5, 7, 11)
    for layers in ((1, 2, 3), (3,), (0,)):
        with pytest.raises(ValueError, match=r"do not fit shrink_at 1; name one block before it, read for detail"):
            segvit.build_model(tiny(out_layers=layers), num_classes=3)
        assert any("do not fit shrink_at 1" in problem for problem in segvit.model_problems(tiny(out_layers=layers), 3))


def test_anchored__heads_must_split_the_features() -> None:
    with pytest.raises(ValueError, match=r"^the features' width 192 is not a multiple of decoder_heads 5; change it$"):
        segvit.build_model(tiny(decoder_width=20, decoder_heads=5), num_classes=3)


def test_anchored__costs_about_half_of_the_full_model() -> None:
    full = segvit.ModelConfig(
        backbone="vit_small_patch14_dinov2", image_size=(504, 672), decoder_width=384, decoder_layers=1
    )
    anchored = full.replace(structure="anchored")
    costs = [segvit.model_cost(config, 11, (504, 672)).gflops for config in (full, anchored)]
    assert costs[1] / costs[0] == pytest.approx(0.51, abs=0.01)
