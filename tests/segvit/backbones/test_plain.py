from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit import attention
from segvit.backbones import timm_blocks
from segvit.backbones.downsampling import Downsampling, PatchChoice
from segvit.backbones.families import create_vit
from segvit.backbones.feature_map import FeatureMap
from segvit.backbones.plain import PlainBackbone, convolve_patches, pad_to_multiple, project_patches
from segvit.backbones.positions import bias_table, geometric_distances, token_positions
from segvit.backbones.timm_blocks import block_problem, runs_in_steps
from segvit.config import ModelConfig
from segvit.model import build_backbone, build_model

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3}
FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva02_enormous_patch14_clip_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_pe_spatial_tiny_patch16_512",
]
KINDS = ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"]


def patch_size(name: str) -> int:
    return int(re.findall(r"patch(\d+)", name)[0])


def small_vit(name: str, grid: tuple[int, int] = (4, 6)) -> Any:
    """A network of three narrow blocks in which every parameter matters."""
    side = patch_size(name)
    vit = create_vit(name, (grid[0] * side, grid[1] * side), SMALL).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def timm_twin(name: str, vit: Any, **settings: Any) -> Any:
    """timm's own network with the same weights."""
    if "beit" not in name:
        settings["dynamic_img_size"] = True
    twin = timm.create_model(name, num_classes=0, img_size=vit.patch_embed.img_size, **SMALL, **settings)
    twin.load_state_dict(vit.state_dict())
    return twin.eval()


def intermediate_tokens(twin: Any, images: Tensor, indices: list[int]) -> list[Tensor]:
    maps = twin.forward_intermediates(images, indices=indices, intermediates_only=True, norm=False)
    return [one.flatten(2).transpose(1, 2) for one in maps]


@pytest.mark.parametrize("bias", [True, False])
def test_project_patches__equals_the_convolution(bias: bool) -> None:
    convolution, images = nn.Conv2d(3, 12, kernel_size=5, stride=5, bias=bias), torch.rand(2, 3, 15, 20)
    torch.testing.assert_close(project_patches(convolution, images), convolve_patches(convolution, images))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features__equal_timm_without_the_final_norm(name: str) -> None:
    vit, side = small_vit(name), patch_size(name)
    twin = timm_twin(name, vit)
    images = torch.randn(2, 3, 4 * side, 6 * side)
    features = PlainBackbone(vit, (0, 2)).eval()(images)
    for feature, expected in zip(features, intermediate_tokens(twin, images, [0, 2]), strict=True):
        torch.testing.assert_close(feature.tokens, expected, rtol=1e-5, atol=1e-5)
        assert (feature.grid, feature.stride, feature.patch_grid) == ((4, 6), side, (4, 6))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features__are_the_same_where_attention_is_faster_in_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, side = PlainBackbone(small_vit(name), (0, 2)).eval(), patch_size(name)
    images = torch.randn(2, 3, 5 * side, 3 * side)
    expected = backbone(images)
    taken: list[Tensor] = []

    def in_steps(q: Tensor, _num_keys: int) -> bool:
        taken.append(q)
        return True

    monkeypatch.setattr(timm_blocks, "runs_in_steps", lambda block, _tokens: block_problem(block) is None)
    monkeypatch.setattr(attention, "faster_in_steps", in_steps)
    for feature, other in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(feature.tokens, other.tokens, rtol=1e-5, atol=1e-5)
    # Blocks that are not known stay on the fused kernel.
    assert len(taken) == sum(block_problem(block) is None for block in backbone.blocks)


@torch.no_grad()
def test_features__of_one_block_take_steps_in_bf16_alone() -> None:
    backbone = PlainBackbone(small_vit("vit_tiny_patch16_224"), (2,)).eval()
    [block] = backbone.blocks[:1]
    tokens = torch.randn(1, 4, 48)
    assert not runs_in_steps(block, tokens)
    assert runs_in_steps(block, tokens.bfloat16())
    assert not runs_in_steps(block, tokens.to("meta", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_in_steps(block, tokens)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grid", [(5, 7), (3, 9)])
@torch.no_grad()
def test_features__equal_timm_set_to_another_grid(name: str, grid: tuple[int, int]) -> None:
    """Rotary tables and bias tables follow timm's rule, learned positions the published bicubic one."""
    vit, side = small_vit(name), patch_size(name)
    twin = timm_twin(name, vit)
    backbone = PlainBackbone(vit, (2,)).eval()
    twin.set_input_size(img_size=(grid[0] * side, grid[1] * side))
    positions = backbone.position_embedding(grid)
    if positions is not None:
        twin.pos_embed = nn.Parameter(positions)
    images = torch.randn(1, 3, grid[0] * side, grid[1] * side)
    [expected] = intermediate_tokens(twin, images, [2])
    torch.testing.assert_close(backbone(images)[0].tokens, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features__shared_relative_bias_of_beit() -> None:
    options: dict[str, Any] = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}
    twin: Any = timm.create_model("beit_base_patch16_224", num_classes=0, img_size=(64, 96), **SMALL, **options).eval()
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(1, 3, 64, 96)
    [expected] = intermediate_tokens(twin, images, [1])
    torch.testing.assert_close(PlainBackbone(twin, (1,)).eval()(images)[0].tokens, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_224"])
@torch.no_grad()
def test_class_token__without_it_equals_timm_built_without(name: str) -> None:
    vit, side = small_vit(name), patch_size(name)
    settings: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
    twin: Any = timm.create_model(name, num_classes=0, img_size=vit.patch_embed.img_size, **SMALL, **settings).eval()
    state = {key: value for key, value in vit.state_dict().items() if key in twin.state_dict()}
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][:, 1:]
    twin.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 4 * side, 6 * side)
    backbone = PlainBackbone(vit, (2,), class_token=False).eval()
    [expected] = intermediate_tokens(twin, images, [2])
    torch.testing.assert_close(backbone(images)[0].tokens, expected, rtol=1e-5, atol=1e-5)
    assert not backbone.vit.cls_token.requires_grad


@torch.no_grad()
def test_class_token__without_it_beit_equals_one_that_nobody_looks_at() -> None:
    vit = small_vit("beit_base_patch16_224")
    for block in vit.blocks:
        block.attn.relative_position_bias_table[-2] = -1e4  # patch to class token
    images = torch.randn(1, 3, 64, 96)
    expected = PlainBackbone(vit, (2,)).eval()(images)[0].tokens
    backbone = PlainBackbone(vit, (2,), class_token=False).eval()
    torch.testing.assert_close(backbone(images)[0].tokens, expected)


def test_class_token__a_model_that_has_none_is_left_as_it_is() -> None:
    vit = small_vit("vit_base_patch16_siglip_224")
    backbone = PlainBackbone(vit, (0,), class_token=False)
    assert backbone.num_prefix_tokens == 0
    assert backbone(torch.randn(1, 3, 64, 96))[0].tokens.shape == (1, 24, 48)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("class_token", [True, False])
def test_gradients__reach_every_parameter_at_another_grid(name: str, class_token: bool) -> None:
    backbone = PlainBackbone(small_vit(name), (1,), class_token=class_token)
    side = backbone.patch_size
    backbone(torch.randn(1, 3, 3 * side, 5 * side))[0].tokens.square().sum().backward()
    trained = {key: parameter for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert [key for key, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()] == []
    assert len(backbone.vit.blocks) == 2
    assert set(dict(backbone.named_parameters())) - set(trained) <= {"vit.cls_token"}
    assert not [key for key in trained if key.startswith(("vit.norm.", "vit.fc_norm", "vit.head", "vit.attn_pool"))]


def test_gradients__of_a_resized_bias_table_are_those_of_its_definition() -> None:
    vit = small_vit("beit_base_patch16_224", (2, 3)).double()
    table = vit.blocks[0].attn.relative_position_bias_table

    def resized(values: Tensor) -> Tensor:
        vit.blocks[0].attn.relative_position_bias_table = values
        return bias_table(token_positions(vit, (3, 2), 1), 0)

    del vit.blocks[0].attn.relative_position_bias_table
    assert torch.autograd.gradcheck(resized, table.detach().requires_grad_())


def test_geometric_distances__end_at_the_new_extent_and_start_with_one() -> None:
    places = geometric_distances(14, 32)
    assert len(places) == 27
    assert places[13:15] == [0.0, 1.0]
    assert places[-1] == pytest.approx(31, abs=1e-3)
    ratios = [(places[i + 1] - places[i]) / (places[i] - places[i - 1]) for i in range(15, 26)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
    assert places == [-place for place in reversed(places)]


def test_position_embedding__other_grid_is_resized_bicubically() -> None:
    backbone = PlainBackbone(create_vit("vit_tiny_patch16_224", (64, 64)), (0,))
    stored = nn.init.normal_(backbone.vit.pos_embed)
    patches = torch.unflatten(stored[:, 1:].transpose(1, 2), 2, (4, 4))
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


@pytest.mark.parametrize("name", KINDS)
def test_drop_path__mlp_branch_only_and_linear_over_all_blocks(name: str) -> None:
    backbone = PlainBackbone(small_vit(name), (1,), drop_path_rate=0.22)
    blocks: list[Any] = list(backbone.vit.blocks)
    assert [getattr(block.drop_path2, "drop_prob", None) for block in blocks] == pytest.approx([0, 0.11])
    assert all(isinstance(block.drop_path1, nn.Identity) for block in blocks)


@pytest.mark.parametrize("name", KINDS)
def test_freeze_blocks__positions_of_all_blocks_are_frozen(name: str) -> None:
    backbone = PlainBackbone(small_vit(name), (2,)).train()
    backbone.freeze_blocks(1)
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in dict(backbone.named_parameters()) if re.match(r"vit\.blocks\.[12]\.", key)}
    assert not backbone.vit.blocks[0].training
    assert backbone.vit.blocks[1].training
    side = backbone.patch_size
    backbone(torch.randn(1, 3, 4 * side, 6 * side))[0].tokens.sum().backward()
    assert {key for key, parameter in backbone.named_parameters() if parameter.grad is not None} == trained


def test_frequencies__of_cut_blocks_are_cut() -> None:
    vit = small_vit("vit_small_patch16_rope_mixed_224")
    last = vit.rope.freqs[:, 1].clone()
    backbone = PlainBackbone(vit, (1,))
    assert backbone.vit.rope.freqs.shape[1] == 2
    assert torch.equal(backbone.vit.rope.freqs[:, 1], last)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("downsampling", [None, Downsampling(1), Downsampling(1, patches=PatchChoice(3, 0.1, 0.2))])
@torch.no_grad()
def test_precision__float64_stays_and_bfloat16_runs(name: str, downsampling: Downsampling | None) -> None:
    backbone = PlainBackbone(small_vit(name), (2,), downsampling).eval()
    images = torch.randn(1, 3, 3 * backbone.patch_size, 5 * backbone.patch_size)
    single = backbone(images)[0].tokens
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(images)[0].tokens
    assert F.cosine_similarity(half.flatten(), single.flatten(), dim=0) > 0.99
    double = backbone.double()(images.double())[0].tokens
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, single.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "downsampling", [Downsampling(1, "average"), Downsampling(1, patches=PatchChoice(3, 0.1, 0.2))]
)
def test_compile__one_graph_at_another_grid(name: str, downsampling: Downsampling) -> None:
    backbone = PlainBackbone(small_vit(name), (0, 2), downsampling).eval()
    images = torch.randn(1, 3, 3 * backbone.patch_size, 5 * backbone.patch_size)
    torch._dynamo.reset()
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close([one.tokens for one in compiled], [one.tokens for one in backbone(images)])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_base_r50_s16_224", {}, "embeds patches by a HybridEmbed"),
        ("deit_tiny_distilled_patch16_224", {}, "is a VisionTransformerDistilled, not a plain VisionTransformer"),
        ("swinv2_tiny_window8_256", {}, "is a SwinTransformerV2, not a plain VisionTransformer"),
        ("swin_tiny_patch4_window7_224", {}, "is hierarchical, not a plain ViT"),
        (
            "vit_base_patch16_sapiens2",
            {"depth": 2},
            "backbone_options {'depth': 2} do not fit vit_base_patch16_sapiens2",
        ),
    ],
)
def test_create_vit__what_is_no_plain_vit_is_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_vit(name, (64, 64), options)


def table_rows() -> list[list[str]]:
    text = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    assert len(rows) >= 14
    return rows


@pytest.mark.parametrize("row", table_rows(), ids=lambda row: row[0])
@torch.no_grad()
def test_table__every_name_builds_and_runs_at_another_size(row: list[str]) -> None:
    name, patch, positions, prefix, downsampling = row[0].strip("`"), int(row[2]), row[3], int(row[4]), row[5]
    hierarchical = name.startswith("swin")
    options: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2} if hierarchical else dict(SMALL)
    settings: dict[str, Any] = {"backbone": name, "image_size": (224, 224), "backbone_options": options}
    backbone = build_backbone(ModelConfig(**settings, structure="single")).eval()
    features: list[FeatureMap] = backbone(torch.randn(1, 3, 100, 130))
    stride = patch * 8 if hierarchical else patch
    grid = (-(-100 // stride), -(-130 // stride))
    [feature] = features
    assert (feature.grid, feature.stride) == (grid, stride)
    assert feature.tokens.shape == (1, grid[0] * grid[1], backbone.widths[0])
    assert feature.tokens.isfinite().all()
    assert feature.tokens.std() > 0
    assert (backbone.patch_size, getattr(backbone, "num_prefix_tokens", 0)) == (patch, prefix)
    tables = [key for key in backbone.state_dict() if "relative_position_bias_table" in key]
    has = {
        "learned": getattr(backbone.vit, "pos_embed", None) is not None,
        "rotary": getattr(backbone.vit, "rope", None) is not None,
        "relative bias": bool(tables),
    }
    assert positions == ", ".join(kind for kind, present in has.items() if present)

    shrunk = ModelConfig(**settings, structure="naive_qd", shrink_at=1)
    if downsampling == "yes":
        half = build_backbone(shrunk).eval()(torch.randn(1, 3, 100, 130))[0]
        assert half.grid == (-(-grid[0] // 2), -(-grid[1] // 2))
        assert half.tokens.isfinite().all()
    else:
        with pytest.raises(ValueError, match="downsampl"):
            build_model(shrunk, 3)
