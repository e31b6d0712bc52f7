from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from segvit.backbones.families import create_swin
from segvit.backbones.swin import HierarchicalBackbone
from segvit.config import ModelConfig
from segvit.model import build_backbone, build_model

NAME = "swin_tiny_patch4_window7_224"
SMALL: dict[str, int | float] = {"embed_dim": 16, "depth": 2, "num_heads": 1}


def make_backbone(
    image_size: tuple[int, int] = (64, 96), stages: tuple[int, ...] = (0, 1, 2, 3), **settings: Any
) -> HierarchicalBackbone:
    swin = create_swin(NAME, image_size, SMALL)
    for parameter in swin.parameters():
        nn.init.normal_(parameter, std=0.2)
    return HierarchicalBackbone(swin, stages, **settings).eval()


def config(**settings: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"backbone": NAME, "image_size": (64, 64), "backbone_options": SMALL}
    return ModelConfig(**defaults | settings)


@pytest.mark.parametrize("size", [(64, 96), (128, 64), (224, 224)])
@torch.no_grad()
def test_features__equal_timm(size: tuple[int, int]) -> None:
    """At timm's own size and at others; windows stay those of the configured size."""
    backbone = make_backbone()
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    twin: Any = timm.create_model(NAME, num_classes=0, img_size=(64, 96), strict_img_size=False, **sizes).eval()
    assert twin.load_state_dict(backbone.vit.state_dict(), strict=False).missing_keys == ["norm.weight", "norm.bias"]
    images = torch.randn(2, 3, *size)
    expected = twin.forward_intermediates(images, intermediates_only=True, norm=False)
    for feature, map_ in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(feature.tokens, map_.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
        assert feature.grid == tuple(map_.shape[2:])


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (1, 129), (250, 100)])
@torch.no_grad()
def test_features__grids_times_strides_are_the_padded_size(size: tuple[int, int]) -> None:
    backbone = make_backbone()
    images = torch.randn(1, 3, *size)
    padded = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    by_hand = torch.zeros(1, 3, *padded)
    by_hand[:, :, : size[0], : size[1]] = images
    features = backbone(images)
    for feature, same in zip(features, backbone(by_hand), strict=True):
        assert (feature.grid[0] * feature.stride, feature.grid[1] * feature.stride) == padded
        assert feature.patch_grid == (padded[0] // 4, padded[1] // 4)
        assert torch.equal(feature.tokens, same.tokens)
    assert [feature.stride for feature in features] == [4, 8, 16, 32]
    assert [feature.tokens.shape[2] for feature in features] == list(backbone.widths) == [16, 32, 64, 128]
    assert (backbone.num_heads, backbone.patch_size) == (8, 4)


@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (1,), (0, 2)])
def test_gradients__reach_every_parameter(stages: tuple[int, ...]) -> None:
    backbone = make_backbone(stages=stages)
    features = backbone(torch.randn(1, 3, 90, 70))
    torch.autograd.backward([feature.tokens.square().sum() for feature in features])
    assert [key for key, one in backbone.named_parameters() if one.grad is None or not one.grad.any()] == []
    assert len(backbone.vit.layers) == max(stages) + 1
    assert backbone.num_heads == 2 ** max(stages)


def test_freeze_blocks__freezes_the_embedding_and_the_first_stages() -> None:
    backbone = make_backbone(drop_path_rate=0.5).train()
    backbone.freeze_blocks(2)
    backbone.train()
    frozen = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
    expected = ("vit.patch_embed.", "vit.layers.0.", "vit.layers.1.")
    assert frozen == {key for key in dict(backbone.named_parameters()) if key.startswith(expected)}
    assert [stage.training for stage in backbone.vit.layers] == [False, False, True, True]
    features = backbone(torch.randn(1, 3, 64, 64))
    assert [feature.tokens.requires_grad for feature in features] == [False, False, True, True]
    features[3].tokens.sum().backward()
    assert {key for key, parameter in backbone.named_parameters() if parameter.grad is None} == frozen
    backbone.freeze_blocks(0)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(ValueError, match=f"cannot freeze 5 stages of {NAME}; use 0 to 4"):
        backbone.freeze_blocks(5)


def test_drop_path__mlp_branch_only_and_linear_over_all_blocks() -> None:
    backbone = make_backbone(drop_path_rate=0.14)
    blocks = [block for stage in backbone.vit.layers for block in stage.blocks]
    rates = [getattr(block.drop_path2, "drop_prob", None) for block in blocks]
    assert rates == pytest.approx([0.02 * index for index in range(8)])
    assert all(isinstance(block.drop_path1, nn.Identity) for block in blocks)


@torch.no_grad()
def test_precision__float64_stays() -> None:
    backbone = make_backbone()
    images = torch.randn(1, 3, 70, 70)
    single = backbone(images)[3].tokens
    double = backbone.double()(images.double())[3].tokens
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, single.double(), rtol=1e-3, atol=1e-3)


def test_build_backbone__cascade_reads_all_stages_and_the_others_the_last() -> None:
    assert build_backbone(config()).out_layers == (0, 1, 2, 3)
    assert build_backbone(config(structure="single")).out_layers == (3,)
    assert build_backbone(config(out_layers=(1, 3))).out_layers == (1, 3)


def test_build_model__cascade_predicts_on_the_finest_grid() -> None:
    model = build_model(config(decoder_layers=1, decoder_heads=4), 3)
    output = model(torch.randn(1, 3, 64, 90))
    assert output.mask_logits.shape == (1, 3, 16, 24)
    assert output.padded_size == (64, 96)
    assert [one.mask_logits.shape[2:] for one in output.auxiliary] == [(16, 24)] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (64, 100)}, f"image_size 100 is not a multiple of {NAME}'s last stride 32; use 96 or 128"),
        ({"structure": "shrunk"}, "structure 'shrunk' downsamples inside a plain ViT, and swin_tiny"),
        ({"structure": "naive_qd"}, "is hierarchical; use cascade, single or linear"),
        ({"class_token": False}, f"class_token False has no meaning for {NAME}"),
        ({"out_layers": (2, 4)}, r"out_layers \(2, 4\) do not fit .*; its stages are 0 to 3"),
    ],
)
def test_build_backbone__what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(config(**settings))


def test_create_swin__a_plain_vit_is_refused() -> None:
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 is not hierarchical; choose one such as swin_tiny"):
        create_swin("vit_tiny_patch16_224", (64, 64))
