"""Query-based downsampling (SegViT, arXiv 2210.05844, section 3.3): the queries of the downsampling block."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.feature_map import KeptPatches
from segvit.output import at_least_float32, full_precision

ShrinkQueries = Literal["nearest", "average", "convolution"]
SHRINK_QUERIES: tuple[ShrinkQueries, ...] = get_args(ShrinkQueries)

# B batch, L tokens with prefix tokens first, C channels, h w patch grid

# How like two patches are: logits of two that look the same, and what one patch of distance takes away. Fitted to a
# full model's features on CamVid (docs/benchmarks.md).
LIKENESS = 11.0
DISTANCE = 0.16
# In how many rounds the patches that are unlike those that stay are chosen, each round seeing those before it.
ROUNDS = 16


class Downsampling(NamedTuple):
    """Where and how a backbone leaves tokens out.

    Attributes:
        block: 0-based block inside which tokens are left out.
        queries: how the queries of that block are made, see `GridDownsampling`.
        patches: which of the patches stay; None: those that `queries` makes, half the grid.
        keys: whether that block's keys and values are those of the queries too, or of all tokens. Only without
            `patches`.
    """

    block: int
    queries: ShrinkQueries = "nearest"
    patches: PatchChoice | None = None
    keys: bool = False


class PatchChoice(NamedTuple):
    """Patches that stay in the sequence: every `stride`-th row and column, and of all patches two shares besides.

    `edges`: those that differ most from the mean of the `window` x `window` patches around them, an odd number.
    `unlike`: those that the patches which stay already tell least of.
    `proportional`: whether attention weighs a token by how many patches it stands for, see `stand_in_counts`.
    """

    stride: int
    edges: float = 0.0
    unlike: float = 0.0
    window: int = 3
    proportional: bool = True

    @torch.no_grad()
    def keep(self, patches: Tensor, grid: tuple[int, int]) -> KeptPatches:
        """Choose of the patches (B, h*w, C), as they are before the block that leaves others out; M for each image."""
        normed = F.layer_norm(at_least_float32(patches), patches.shape[-1:])
        num_patches = grid[0] * grid[1]
        sampled = sampled_patches(grid, self.stride, patches.device).expand(len(patches), -1)
        edges, unlike = (
            min(round(share * num_patches), num_patches - sampled.shape[1]) for share in (self.edges, self.unlike)
        )
        places = sampled
        if edges:
            places = torch.cat((sampled, highest(edge_strength(normed, grid, self.window), sampled, edges)), dim=1)
        likeness_to = Likeness(normed, grid)
        likeness = [likeness_to(places)]
        # How well all that stay stand for each patch; those that stay need no other.
        stood_for = likeness[0].exp().sum(1).scatter(1, places, torch.inf)
        unlike = min(unlike, num_patches - places.shape[1])
        rounds = min(ROUNDS, unlike)
        chosen = [places]
        for number in range(rounds):
            count = unlike * (number + 1) // rounds - unlike * number // rounds
            chosen.append(stood_for.topk(count, dim=1, largest=False).indices)
            likeness.append(likeness_to(chosen[-1]))
            stood_for = (stood_for + likeness[-1].exp().sum(1)).scatter(1, chosen[-1], torch.inf)
        places = torch.cat(chosen, dim=1)
        left_out = stood_for.topk(num_patches - places.shape[1], dim=1, largest=False).indices
        stand_ins = rows_at(torch.cat(likeness, dim=1).transpose(1, 2), left_out).softmax(2)
        return KeptPatches(places, left_out, patches, stand_ins)


def halved_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns left when every second one is kept, from the first; an odd count rounds up."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


class GridDownsampling(nn.Module):
    """Patches of half the resolution: the queries, and the residual, of the downsampling block.

    Prefix tokens stay queries.

    Args:
        kind: ``nearest`` keeps the top-left of each 2 x 2 patches (the published choice), ``average`` takes their
            mean, ``convolution`` a learned 2 x 2 convolution of stride 2 that starts as the mean.
        width: Channels C.
    """

    def __init__(self, kind: ShrinkQueries, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "convolution":
            self.convolution = nn.Conv2d(width, width, kernel_size=2, stride=2)
            nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]
            with torch.no_grad():
                self.convolution.weight.copy_((torch.eye(width) / 4)[:, :, None, None].expand(-1, -1, 2, 2))

    def forward(self, tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """Prefix tokens as they are, and the downsampled patches.

        Args:
            tokens: (B, prefix + h*w, C).
            grid: (h, w); an odd last row or column stands for itself alone.
            num_prefix_tokens: Class and register tokens in front of the patches.

        Returns:
            (B, prefix + ceil(h/2)*ceil(w/2), C).
        """
        if self.kind == "nearest":
            return halve_nearest(tokens, grid, num_prefix_tokens)
        if self.kind == "average":
            return halve_mean(tokens, grid, num_prefix_tokens)
        prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
        cells = self.convolution(fill_windows(torch.unflatten(patches.transpose(1, 2), 2, grid)))
        return torch.cat((prefix, cells.flatten(2).transpose(1, 2)), dim=1)

    def positions(self, rows: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """What tells the queries' positions, (..., prefix + h*w, X), of the downsampled ones.

        The top-left patch's for ``nearest``, else the mean of the pooled patches'.
        """
        halve = halve_nearest if self.kind == "nearest" else halve_mean
        return halve(rows, grid, num_prefix_tokens)


def halve_nearest(rows: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Of (..., prefix + h*w, X), the prefix and every second row and column of the patches."""
    prefix, patches = rows[..., :num_prefix_tokens, :], rows[..., num_prefix_tokens:, :]
    return torch.cat((prefix, torch.unflatten(patches, -2, grid)[..., ::2, ::2, :].flatten(-3, -2)), dim=-2)


def halve_mean(rows: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Of (..., prefix + h*w, X), the prefix and the mean of each 2 x 2 patches."""
    prefix, patches = rows[..., :num_prefix_tokens, :], rows[..., num_prefix_tokens:, :]
    cells = patches.flatten(0, -3) if patches.ndim > 2 else patches.unsqueeze(0)
    pooled = F.avg_pool2d(fill_windows(torch.unflatten(cells.transpose(1, 2), 2, grid)), 2)
    return torch.cat((prefix, pooled.flatten(2).transpose(1, 2).reshape(*rows.shape[:-2], -1, rows.shape[-1])), dim=-2)


def fill_windows(cells: Tensor) -> Tensor:
    """Cells (B, C, h, w) with a lone last row or column doubled, so that every 2 x 2 window is full."""
    rows, columns = cells.shape[-2:]
    return F.pad(cells, (0, columns % 2, 0, rows % 2), mode="replicate")


def edge_strength(normed: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(B, h*w): squared distance of each layer-normed patch (B, h*w, C) from the mean of the window around it.

    At edges and on small things, a patch's surroundings tell little of it; so SegViTv2's Shrunk++ (arXiv 2306.06289)
    keeps those. Beyond the border, the window sees the outermost patches again.
    """
    cells = torch.unflatten(normed.transpose(1, 2), 2, grid)
    means = F.avg_pool2d(F.pad(cells, (window // 2,) * 4, mode="replicate"), window, stride=1)
    return (cells - means).square().sum(1).flatten(1)


def highest(scores: Tensor, places: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the highest scores (B, h*w) elsewhere than at `places` (B, M)."""
    return scores.scatter(1, places, -torch.inf).topk(count, dim=1).indices


class Likeness:
    """How well patches stand for each other: logits, by `LIKENESS` and `DISTANCE`, that are called by indices.

    Args:
        normed: The layer-normed patches (B, h*w, C).
        grid: (h, w).
    """

    def __init__(self, normed: Tensor, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.scaled = normed * (LIKENESS / normed.shape[2]) ** 0.5
        rows, columns = (torch.arange(cells, dtype=normed.dtype, device=normed.device) for cells in grid)
        # (h*w, h) and (h*w, w): what the distance in rows, and that in columns, takes away.
        self.row_distance = _distances(rows.repeat_interleave(grid[1]), rows)
        self.column_distance = _distances(columns.repeat(grid[0]), columns)

    def __call__(self, places: Tensor) -> Tensor:
        """(B, M, h*w): how well the patches `places` (B, M) stand for each patch.

        The sum of the exponentials over M tells how well a patch is stood for by all of them.
        """
        # Of patches alike, rounding to bf16 would choose.
        with full_precision(self.scaled):
            alike = torch.unflatten(rows_at(self.scaled, places) @ self.scaled.transpose(1, 2), 2, self.grid)
        apart = self.row_distance[places].unsqueeze(3), self.column_distance[places].unsqueeze(2)
        return (alike - apart[0] - apart[1]).flatten(2)


def _distances(lines: Tensor, others: Tensor) -> Tensor:
    return DISTANCE * (lines[:, None] - others).square()


def sampled_patches(grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Indices (L,) into h*w of every `stride`-th row and column, from the middle of the first `stride` on.

    With a stride of 2 these are the first ones, as nearest sampling takes them.
    """
    patches = torch.arange(grid[0] * grid[1], device=device).view(grid)
    first = (stride - 1) // 2
    rows, columns = (slice(min(first, cells - 1), None, stride) for cells in grid)
    return patches[rows, columns].flatten()


def stand_in_counts(kept: KeptPatches) -> Tensor:
    """How many patches each one that was kept stands for, (B, M): itself, and its share of those that were left out.

    h*w in sum. Without these counts the parts of an image where most patches stay would draw too much of the later
    blocks' attention.
    """
    return 1 + kept.stand_ins.sum(dim=1)


def with_prefix(places: Tensor, num_prefix_tokens: int) -> Tensor:
    """Indices (B, prefix + M) into a sequence of prefix tokens and patches, of the patches `places` (B, M)."""
    prefix = torch.arange(num_prefix_tokens, device=places.device).expand(places.shape[0], -1)
    return torch.cat((prefix, places + num_prefix_tokens), dim=1)


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """(B, K, X) of rows (B, L, X), by indices (B, K)."""
    # Whole rows are copied, which is several times as fast as gathering every element by an index of its own.
    first = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1) * rows.shape[1]
    return torch.unflatten(rows.flatten(0, 1).index_select(0, (places + first).flatten()), 0, places.shape)
