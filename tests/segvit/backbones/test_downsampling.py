from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segvit.backbones.downsampling import (
    DISTANCE,
    LIKENESS,
    SHRINK_QUERIES,
    Downsampling,
    GridDownsampling,
    PatchChoice,
    ShrinkQueries,
    edge_strength,
    halve_mean,
    halve_nearest,
    highest,
    rows_at,
    sampled_patches,
    stand_in_counts,
    with_prefix,
)
from segvit.backbones.families import create_vit
from segvit.backbones.plain import PlainBackbone
from segvit.backbones.positions import TokenPositions, downsampled_positions, token_positions
from segvit.backbones.timm_blocks import AttentionPositions, block_problem, query_block, run_block

FAMILIES = [
    ("vit_tiny_patch16_224", 1),
    ("vit_small_patch14_dinov2", 1),
    ("beit_base_patch16_224", 1),
    ("eva02_tiny_patch14_224", 1),
    ("eva02_base_patch16_clip_224", 1),
    ("vit_small_patch16_dinov3", 5),
    ("vit_small_patch16_rope_mixed_224", 1),
]
NOWHERE = AttentionPositions(None, None, None)


def random_vit(name: str, grid: tuple[int, int], depth: int = 2) -> Any:
    side = 14 if "patch14" in name else 16
    options = {"embed_dim": 48, "depth": depth, "num_heads": 3}
    vit = create_vit(name, (grid[0] * side, grid[1] * side), options).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


@pytest.mark.parametrize(("grid", "kept"), [((2, 4), [0, 2]), ((3, 3), [0, 2, 6, 8]), ((1, 1), [0])])
def test_halve_nearest__keeps_prefix_and_top_left_of_each_2x2(grid: tuple[int, int], kept: list[int]) -> None:
    tokens = torch.arange(-2, grid[0] * grid[1]).view(1, -1, 1)  # two prefix tokens, -2 and -1
    assert halve_nearest(tokens, grid, 2).flatten().tolist() == [-2, -1, *kept]


def test_halve_mean__a_lone_row_or_column_stands_for_itself() -> None:
    tokens = torch.tensor([9.0, 0, 1, 2, 3, 4, 5, 6, 7, 8]).view(1, 10, 1)  # a prefix token and 3 x 3 patches
    assert halve_mean(tokens, (3, 3), 1).flatten().tolist() == [9, 2, 3.5, 6.5, 8]


@pytest.mark.parametrize("grid", [(2, 4), (3, 5)])
def test_convolution__starts_as_the_mean_and_learns(grid: tuple[int, int]) -> None:
    tokens = torch.randn(2, 3 + grid[0] * grid[1], 6)
    mean, learned = GridDownsampling("average", 6), GridDownsampling("convolution", 6)
    torch.testing.assert_close(learned(tokens, grid, 3), mean(tokens, grid, 3))
    learned(tokens, grid, 3)[:, 3:].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned.parameters())
    assert list(mean.parameters()) == []


@pytest.mark.parametrize(("name", "prefix"), FAMILIES)
@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
@torch.no_grad()
def test_nearest__equals_the_whole_block_at_the_kept_tokens(name: str, prefix: int, grid: tuple[int, int]) -> None:
    """Queries attend independently, so a kept token comes out as if all tokens had been queries."""
    vit = random_vit(name, grid)
    backbone = PlainBackbone(vit, (1,), Downsampling(1)).eval()
    positions = token_positions(vit, grid, prefix)
    tokens = torch.randn(2, prefix + grid[0] * grid[1], 48)
    whole = run_block(vit.blocks[1], tokens, positions.of_block(1), prefix)
    shrunk, _ = backbone.downsample(tokens, positions, grid)
    torch.testing.assert_close(shrunk, halve_nearest(whole, grid, prefix), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "prefix"), FAMILIES)
@pytest.mark.parametrize("keys", [False, True])
@torch.no_grad()
def test_downsampling__keys_of_all_tokens_or_of_those_that_stay(name: str, prefix: int, keys: bool) -> None:
    grid = (3, 4)
    vit = random_vit(name, grid)
    backbone = PlainBackbone(vit, (1,), Downsampling(1, keys=keys)).eval()
    positions = token_positions(vit, grid, prefix)
    tokens = torch.randn(2, prefix + 12, 48)
    shrunk, _ = backbone.downsample(tokens, positions, grid)
    if keys:
        there = positions.halved(grid).of_block(1)
        alone = run_block(vit.blocks[1], halve_nearest(tokens, grid, prefix), there, prefix)
        assert torch.equal(shrunk, alone)
    tokens[:, prefix + 1] += 1.0  # of the second column, which is left out
    assert torch.equal(backbone.downsample(tokens, positions, grid)[0], shrunk) == keys


@pytest.mark.parametrize(("name", "prefix"), FAMILIES)
@torch.no_grad()
def test_patch_choice__patches_come_out_as_of_the_whole_block_and_stay_where_they_are(name: str, prefix: int) -> None:
    """In every family: the block that leaves patches out, and one after it whose attention sees those that stay."""
    grid = (4, 5)
    vit = random_vit(name, grid)
    choice = PatchChoice(2, edges=0.1, unlike=0.1)
    backbone = PlainBackbone(vit, (1,), Downsampling(1, patches=choice)).eval()
    positions = token_positions(vit, grid, prefix)
    tokens = torch.randn(2, prefix + 20, 48)
    places = choice.keep(tokens[:, prefix:], grid).places
    assert places[0].tolist() != places[1].tolist()
    left, left_positions = backbone.leave_out(tokens, positions, places)
    whole = run_block(vit.blocks[1], tokens, positions.of_block(1), prefix)
    kept = with_prefix(places, prefix)
    torch.testing.assert_close(left, rows_at(whole, kept), rtol=1e-4, atol=1e-4)
    # The next block, written out image by image.
    result = run_block(vit.blocks[1], rows_at(tokens, kept), left_positions.of_block(1), prefix)
    here = positions.of_block(1)
    for image in range(2):
        rotary = None if here.key_rotary is None else here.key_rotary[..., places[image], :]
        bias = None if here.bias is None else here.bias[:, kept[image]][:, :, kept[image]]
        one = tokens[image : image + 1, kept[image]]
        expected = query_block(vit.blocks[1], one, one, AttentionPositions(rotary, rotary, bias), prefix)
        torch.testing.assert_close(result[image : image + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "prefix"), FAMILIES)
@torch.no_grad()
def test_log_counts__a_token_that_stands_for_several_is_read_as_so_many(name: str, prefix: int) -> None:
    """In every family: as if its key and value were there several times."""
    grid = (2, 3)
    vit = random_vit(name, grid)
    positions = token_positions(vit, grid, prefix)
    tokens = torch.randn(1, prefix + 6, 48)
    counts = torch.tensor([1] * prefix + [3, 1, 2, 1, 1, 4])
    result = run_block(vit.blocks[1], tokens, positions._replace(log_counts=counts[None].log()).of_block(1), prefix)
    several = torch.arange(prefix + 6).repeat_interleave(counts)
    here = positions.of_block(1)
    rotary = None if here.key_rotary is None else here.key_rotary[..., several[prefix:] - prefix, :]
    bias = None if here.bias is None else here.bias[..., several]
    repeated = AttentionPositions(here.query_rotary, rotary, bias)
    expected = query_block(vit.blocks[1], tokens, tokens[:, several], repeated, prefix)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, run_block(vit.blocks[1], tokens, here, prefix), rtol=1e-2, atol=1e-2)


def test_patch_choice__tokens_stand_for_what_was_left_out_by_likeness_and_distance() -> None:
    # One row of five patches; the second and the fifth stay. The first looks like the second, the others like the last.
    one, other = torch.randn(2, 8)
    patches = torch.stack((one, one, other, other, other))[None].requires_grad_()
    kept = PatchChoice(3).keep(patches, (1, 5))
    assert kept.places.tolist() == [[1, 4]]
    order = kept.left_out[0].argsort()
    assert kept.left_out[0, order].tolist() == [0, 2, 3]
    assert kept.before is patches
    normed = F.layer_norm(torch.stack((one, other)), (8,))
    unlike = LIKENESS / 8 * float(normed[0] @ normed[1])
    expected = torch.stack(
        [
            torch.tensor([of_second - DISTANCE * left**2, of_last - DISTANCE * right**2]).softmax(0)
            for of_second, of_last, left, right in (
                (LIKENESS, unlike, 1, 4),
                (unlike, LIKENESS, 1, 2),
                (unlike, LIKENESS, 2, 1),
            )
        ]
    )
    torch.testing.assert_close(kept.stand_ins[0, order], expected)
    assert not kept.stand_ins.requires_grad
    torch.testing.assert_close(stand_in_counts(kept)[0], 1 + expected.sum(0))
    all_stay = PatchChoice(3, edges=0.99).keep(patches, (1, 5))
    assert all_stay.stand_ins.shape == (1, 0, 5)
    assert stand_in_counts(all_stay).tolist() == [[1.0] * 5]


@torch.no_grad()
def test_patch_choice__later_blocks_weigh_tokens_by_what_they_stand_for() -> None:
    """Where all patches are the same, those that stay and their counts are as good as all."""
    vit = random_vit("vit_tiny_patch16_224", (4, 6), depth=4)
    assert vit.pos_embed is not None
    vit.pos_embed.zero_()
    backbone = PlainBackbone(vit, (3,)).eval()
    image = torch.full((1, 3, 64, 96), 0.7)
    [whole] = backbone(image)
    backbone.shrink_at = 1
    results = {}
    for proportional in (False, True):
        backbone.patch_choice = PatchChoice(2, unlike=0.1, proportional=proportional)
        [results[proportional]] = backbone(image)
    assert results[True].kept is not None
    expected = rows_at(whole.tokens, results[True].kept.places)
    torch.testing.assert_close(results[True].tokens, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(results[False].tokens, expected, rtol=0.05, atol=0.05)


def test_plain_backbone__a_later_block_of_another_kind_is_refused() -> None:
    class OwnBlock(Block):
        pass

    vit = random_vit("vit_tiny_patch16_224", (4, 6), depth=4)
    vit.blocks[2] = OwnBlock(48, 3)
    with pytest.raises(
        ValueError, match=r"^query-based downsampling does not know OwnBlock with Attention; use a plain"
    ):
        PlainBackbone(vit, (3,), Downsampling(1, patches=PatchChoice(2, unlike=0.1)))
    assert PlainBackbone(vit, (3,), Downsampling(3, patches=PatchChoice(2, unlike=0.1))).shrink_at == 3


@pytest.mark.parametrize(("edges", "unlike", "kept"), [(0.0, 0.0, 4), (0.1, 0.0, 9), (0.0, 0.1, 9), (0.1, 0.3, 25)])
def test_patch_choice__the_grid_edges_and_what_is_unlike_them(edges: float, unlike: float, kept: int) -> None:
    patches = torch.randn(2, 6 * 9, 4)
    found = PatchChoice(4, edges, unlike).keep(patches, (6, 9))
    assert found.places[:, :4].tolist() == [[10, 14, 46, 50]] * 2
    assert found.places.shape == (2, kept)
    assert found.stand_ins.shape == (2, 54 - kept, kept)
    assert torch.equal(
        torch.cat((found.places, found.left_out), dim=1).sort(dim=1).values, torch.arange(54).expand(2, -1)
    )
    strength = edge_strength(F.layer_norm(patches, (4,)), (6, 9), 3)
    strongest = highest(strength, found.places[:, :4], 5)
    if edges:
        assert torch.equal(found.places[:, 4:9], strongest)


def test_patch_choice__of_many_that_are_alike_and_unlike_the_grid_a_few_stay() -> None:
    """Each round sees those before it: nine of one kind do not crowd out the one of another."""
    background, thing, speck = torch.linalg.qr(torch.randn(16, 16))[0][:3]
    patches = background.repeat(1, 8 * 8, 1)
    things = torch.tensor([0, 1, 2, 8, 9, 10, 16, 17, 18])
    patches[0, things] = thing
    patches[0, 54] = speck
    sampled = sampled_patches((8, 8), 7, patches.device)
    assert set(sampled.tolist()).isdisjoint([*things.tolist(), 54])
    found = PatchChoice(7, unlike=2 / 64).keep(patches, (8, 8))
    chosen = set(found.places[0, len(sampled) :].tolist())
    assert 54 in chosen
    assert len(chosen & set(things.tolist())) == 1


def test_patch_choice__rounds_by_hand() -> None:
    patches = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    found = PatchChoice(3, unlike=0.7).keep(patches, (5, 6))  # 21 patches in 16 rounds
    normed = F.layer_norm(patches, (16,)).double()
    for image in range(2):
        stay = sampled_patches((5, 6), 3, patches.device).tolist()
        for count in (1, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 2):
            covered = torch.zeros(30, dtype=torch.float64)
            for patch in range(30):
                logits = []
                for token in stay:
                    apart = (patch // 6 - token // 6) ** 2 + (patch % 6 - token % 6) ** 2
                    logits.append(LIKENESS * (normed[image, patch] @ normed[image, token]) / 16 - DISTANCE * apart)
                covered[patch] = torch.stack(logits).logsumexp(0) if patch not in stay else torch.inf
            stay += covered.argsort()[:count].tolist()
        assert found.places[image].tolist() == stay


@pytest.mark.parametrize(
    ("grid", "stride", "sampled"),
    [((3, 5), 2, [0, 2, 4, 10, 12, 14]), ((5, 5), 4, [6]), ((1, 6), 4, [1, 5]), ((2, 3), 9, [5])],
)
def test_sampled_patches__from_the_middle_of_the_first_stride(
    grid: tuple[int, int], stride: int, sampled: list[int]
) -> None:
    assert sampled_patches(grid, stride, torch.device("cpu")).tolist() == sampled


def test_highest__elsewhere_than_at_the_places() -> None:
    scores = torch.tensor([[3.0, 9, 1, 7, 5], [1, 2, 3, 4, 5]])
    assert highest(scores, torch.tensor([[1], [4]]), 2).tolist() == [[3, 4], [3, 2]]
    assert highest(scores, torch.tensor([[1], [4]]), 0).shape == (2, 0)


@pytest.mark.parametrize("window", [3, 5, 9])
def test_edge_strength__by_hand(window: int) -> None:
    grid = (4, 7)
    normed = torch.randn(2, 28, 16, generator=torch.Generator().manual_seed(0))
    cells, reach, expected = torch.unflatten(normed, 1, grid), window // 2, torch.empty(2, *grid)
    for row, column in product(range(4), range(7)):
        rows = torch.arange(row - reach, row + reach + 1).clamp(0, 3)
        columns = torch.arange(column - reach, column + reach + 1).clamp(0, 6)
        around = cells[:, rows][:, :, columns]
        expected[:, row, column] = (cells[:, row, column] - around.mean((1, 2))).square().sum(1)
    torch.testing.assert_close(edge_strength(normed, grid, window), expected.flatten(1))


@torch.no_grad()
def test_query_block__norms_and_gate() -> None:
    plain = Block(dim=24, num_heads=3, qkv_bias=False, qk_norm=True, scale_attn_norm=True).eval()
    gated = EvaBlock(dim=24, num_heads=3, gated_attn=True, scale_attn_inner=True, init_values=0.5).eval()
    for block in (plain, gated):
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        tokens = torch.randn(2, 12, 24)
        output = query_block(block, tokens[:, ::3], tokens, NOWHERE, 0)
        torch.testing.assert_close(output, block(tokens)[:, ::3])


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224"]
)
@torch.no_grad()
def test_average__positions_add_the_mean_over_the_pooled_patches(name: str) -> None:
    """With one pooled content, similarities are the mean of those at its four patches."""
    grid = (4, 4)
    vit = random_vit(name, grid)
    positions = token_positions(vit, grid, 1)
    places = positions.of_block(0)
    pooled = downsampled_positions(places, grid, 1, GridDownsampling("average", 48))

    def similarities(query: AttentionPositions, patch: int) -> Tensor:
        """(heads, L) of one query content standing at the patch."""
        content, keys = torch.ones(1, 3, 1, 16), torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
        if query.query_rotary is None:
            assert query.bias is not None
            return query.bias[:, 1 + patch, 1:]
        assert query.key_rotary is not None
        half = vit.blocks[0].attn.rotate_half
        turned = rotate_rows(content, query.query_rotary[..., patch : patch + 1, :], half)
        return (turned @ rotate_rows(keys, query.key_rotary, half).transpose(-1, -2))[0, :, 0]

    expected = torch.stack([similarities(places, patch) for patch in (2, 3, 6, 7)]).mean(0)
    torch.testing.assert_close(similarities(pooled, 1), expected)


def rotate_rows(heads: Tensor, rotary: Tensor, rotate_half: bool) -> Tensor:
    """Rotation written out: pairs of channels, adjacent or half the width apart, turn by the table's angle."""
    sine, cosine = rotary.chunk(2, dim=-1)
    if rotate_half:
        first, second = heads.chunk(2, dim=-1)
        return heads * cosine + torch.cat((-second, first), dim=-1) * sine
    turned = torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2)
    return heads * cosine + turned * sine


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_later_blocks__halved_rotary_distances_are_those_of_the_smaller_grid(name: str) -> None:
    """Families that scale positions by the grid's extent give patches the same distances either way."""
    block = (vit := random_vit(name, (4, 8))).blocks[1]
    block.attn.num_prefix_tokens = 0
    tokens = torch.randn(1, 8, 48)
    halved = token_positions(vit, (4, 8), 0).halved((4, 8))
    own = token_positions(vit, (2, 4), 0)
    outputs = [run_block(block, tokens, one.of_block(1), 0) for one in (halved, own)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert (outputs[0] - run_block(block, tokens, NOWHERE, 0)).abs().max() > 1e-2


@torch.no_grad()
def test_later_blocks__halved_bias_is_that_of_the_kept_patches() -> None:
    vit = random_vit("beit_base_patch16_224", (4, 6))
    positions = token_positions(vit, (3, 5), 1)  # of a resized table
    full, halved = positions.of_block(1).bias, positions.halved((3, 5)).of_block(1).bias
    assert full is not None
    assert halved is not None
    kept = [0, *(1 + row * 5 + column for row in (0, 2) for column in (0, 2, 4))]
    assert torch.equal(halved, full[:, kept][:, :, kept])


@pytest.mark.parametrize(("name", "prefix"), FAMILIES)
@pytest.mark.parametrize("kind", SHRINK_QUERIES)
def test_downsampling__gradients_reach_every_parameter(name: str, prefix: int, kind: ShrinkQueries) -> None:
    backbone = PlainBackbone(random_vit(name, (3, 4)), (1,), Downsampling(1, kind))
    side = backbone.patch_size
    [feature] = backbone(torch.randn(1, 3, 5 * side, 3 * side))
    assert (feature.grid, feature.stride, feature.patch_grid) == ((3, 2), 2 * side, (5, 3))
    assert backbone.num_prefix_tokens == prefix
    feature.tokens.square().sum().backward()
    assert [key for key, one in backbone.named_parameters() if one.grad is None or not one.grad.any()] == []


@pytest.mark.parametrize("kind", SHRINK_QUERIES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_downsampling__gradient_check_in_float64(name: str, kind: ShrinkQueries) -> None:
    backbone = PlainBackbone(random_vit(name, (2, 2)), (1,), Downsampling(1, kind)).double().eval()
    prefix = backbone.num_prefix_tokens

    def shrunk(tokens: Tensor) -> Tensor:
        return backbone.downsample(tokens, token_positions(backbone.vit, (3, 2), prefix), (3, 2))[0][..., :4]

    tokens = torch.randn(1, prefix + 6, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shrunk, tokens, fast_mode=True)


def test_block_problem__unknown_attention_is_refused() -> None:
    class Gated(Block):
        pass

    for block in (Gated(dim=24, num_heads=3), nn.Identity()):
        problem = block_problem(block)
        assert problem is not None
        assert problem.startswith(f"query-based downsampling does not know {type(block).__name__} with")
    with pytest.raises(ValueError, match="does not know EvaBlockPostNorm with EvaAttention"):
        PlainBackbone(random_vit("eva02_enormous_patch14_clip_224", (2, 2)), (1,), Downsampling(1))


def test_positions__plain_vit_has_none() -> None:
    vit = random_vit("vit_tiny_patch16_224", (2, 2))
    positions = token_positions(vit, (2, 2), 1)
    assert positions == TokenPositions(vit, 1, None, None, None)
    assert downsampled_positions(positions.of_block(0), (2, 2), 1, GridDownsampling("average", 48)) == NOWHERE


def test_patch_choice__is_the_same_under_autocast() -> None:
    patches = torch.randn(2, 35, 16, generator=torch.Generator().manual_seed(0))
    expected = PatchChoice(3, 0.1, 0.3).keep(patches, (5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        found = PatchChoice(3, 0.1, 0.3).keep(patches, (5, 7))
    assert torch.equal(found.places, expected.places)
    assert torch.equal(found.stand_ins, expected.stand_ins)
