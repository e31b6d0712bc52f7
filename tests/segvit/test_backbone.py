from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from segvit.backbone import Backbone, create_vit, pad_to_multiple
from segvit.downsampling import check_downsampling, downsample_block, every_second


def test_features__equal_timm_without_the_final_norm() -> None:
    vit = create_vit("vit_tiny_patch16_224", (64, 96)).eval()
    reference: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 96)).eval()
    reference.load_state_dict(vit.state_dict())
    images = torch.randn(2, 3, 64, 96)
    features = Backbone(vit, (1, 3)).eval()(images)
    expected = reference.forward_intermediates(images, indices=[1, 3], intermediates_only=True, norm=False)
    for feature, map_ in zip(features, expected, strict=True):
        torch.testing.assert_close(feature.tokens, map_.flatten(2).transpose(1, 2))
        assert (feature.grid, feature.stride) == ((4, 6), 16)


def test_features__register_tokens_without_positions() -> None:
    vit = create_vit("vit_small_patch14_reg4_dinov2", (42, 56)).eval()
    reference: Any = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=(42, 56)).eval()
    for parameter in (vit.reg_token, vit.cls_token, vit.pos_embed):
        assert parameter is not None
        torch.nn.init.normal_(parameter)
    reference.load_state_dict(vit.state_dict())
    images = torch.randn(1, 3, 42, 56)
    [expected] = reference.forward_intermediates(images, indices=[1], intermediates_only=True)
    backbone = Backbone(vit, (1,)).eval()
    torch.testing.assert_close(backbone(images)[0].tokens, expected.flatten(2).transpose(1, 2))
    assert backbone.num_prefix_tokens == 5


def test_position_embedding__other_grid_is_resized_bicubically() -> None:
    backbone = Backbone(create_vit("vit_tiny_patch16_224", (64, 64)), (0,))
    assert backbone.vit.pos_embed is not None
    stored = torch.nn.init.normal_(backbone.vit.pos_embed)
    patches = stored[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # type: ignore[no-untyped-call]
    expected = F.interpolate(patches, size=(3, 5), mode="bicubic", align_corners=False)
    resized = backbone.position_embedding((3, 5))
    assert resized is not None
    torch.testing.assert_close(resized[:, 1:], expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(resized[:, :1], stored[:, :1])


def test_pad_to_multiple__zeros_right_and_bottom() -> None:
    images = torch.ones(1, 3, 5, 8)
    padded = pad_to_multiple(images, 4)
    assert padded.shape == (1, 3, 8, 8)
    torch.testing.assert_close(padded[:, :, :5], images)
    assert not padded[:, :, 5:].any()
    assert pad_to_multiple(padded, 4) is padded


@pytest.mark.parametrize(("grid", "kept"), [((2, 4), [0, 2]), ((3, 3), [0, 2, 6, 8]), ((1, 1), [0])])
def test_every_second__keeps_prefix_and_top_left_of_each_2x2(grid: tuple[int, int], kept: list[int]) -> None:
    num_patches = grid[0] * grid[1]
    tokens = torch.arange(-2, num_patches).view(1, -1, 1)  # two prefix tokens, -2 and -1
    assert every_second(tokens, grid, 2).flatten().tolist() == [-2, -1, *kept]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_downsample_block__equals_whole_block_at_the_kept_tokens(name: str, grid: tuple[int, int]) -> None:
    """Queries attend independently, so a kept token comes out as if all tokens had been queries."""
    vit: Any = timm.create_model(name, num_classes=0)
    block = vit.blocks[0].eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    width = block.norm1.weight.numel()
    tokens = torch.randn(2, 1 + grid[0] * grid[1], width)
    shrunk = downsample_block(block, tokens, grid, 1)
    torch.testing.assert_close(shrunk, every_second(block(tokens), grid, 1), rtol=1e-4, atol=1e-4)


def test_downsample_block__query_and_key_norms() -> None:
    block = Block(dim=24, num_heads=3, qkv_bias=False, qk_norm=True, scale_attn_norm=True).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(2, 12, 24)
    torch.testing.assert_close(downsample_block(block, tokens, (3, 4), 0), every_second(block(tokens), (3, 4), 0))


def test_check_downsampling__unknown_attention_is_refused() -> None:
    gated = Block(dim=24, num_heads=3)
    gated.attn.gate = torch.nn.Linear(24, 24)
    for block in (gated, torch.nn.Identity()):
        with pytest.raises(ValueError, match="query-based downsampling does not know"):
            check_downsampling(block)


def test_drop_path__mlp_branch_only_and_linear_over_all_blocks() -> None:
    backbone = Backbone(create_vit("vit_tiny_patch16_224", (64, 64)), (5,), drop_path_rate=0.22)
    blocks: list[Any] = list(backbone.vit.blocks)
    assert len(blocks) == 6
    assert [round(block.drop_path2.drop_prob, 6) for block in blocks] == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in blocks)
