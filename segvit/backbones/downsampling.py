"""Query-based downsampling (SegViT, arXiv 2210.05844, section 3.3): the queries of the downsampling block."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.feature_map import KeptPatches
from segvit.output import at_least_float32

ShrinkQueries = Literal["nearest", "average", "convolution"]
SHRINK_QUERIES: tuple[ShrinkQueries, ...] = get_args(ShrinkQueries)

# B batch, L tokens with prefix tokens first, C channels, h w patch grid

# How like two patches are: logits of two that look the same, and what one patch of distance takes away. Fitted to a
# full model's features on CamVid (docs/benchmarks.md).
LIKENESS = 11.0
DISTANCE = 0.16


class Downsampling(NamedTuple):
    """Where and how a backbone leaves tokens out.

    Attributes:
        block: 0-based block inside which tokens are left out.
        queries: how the queries of that block are made, see `GridDownsampling`.
        patches: which of the patches stay; None: those that `queries` makes, half the grid.
    """

    block: int
    queries: ShrinkQueries = "nearest"
    patches: PatchChoice | None = None


class PatchChoice(NamedTuple):
    """Patches that stay in the sequence: every `stride`-th row and column, and a `keep` share of all at edges.

    `window`: rows and columns, an odd number, of the surroundings that tell an edge.
    `proportional`: whether attention weighs a token by how many patches it stands for, see `stand_in_counts`.
    """

    stride: int
    keep: float
    window: int = 3
    proportional: bool = True

    def split(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Indices into h*w of the patches (B, h*w, C) that stay, those of the grid first, and of the others.

        (B, M) and (B, h*w - M); M is one for all images.
        """
        sampled = sampled_patches(grid, self.stride, patches.device)
        edges, others = edge_patches(patches, grid, self.window, sampled, round(self.keep * grid[0] * grid[1]))
        return torch.cat((sampled.expand(patches.shape[0], -1), edges), dim=1), others


def halved_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns left when every second one is kept, from the first; an odd count rounds up."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


class GridDownsampling(nn.Module):
    """Patches of half the resolution: the queries, and the residual, of the downsampling block.

    Keys and values of that block come from all tokens, and prefix tokens stay queries.

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


def edge_patches(
    patches: Tensor, grid: tuple[int, int], window: int, sampled: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The patches that differ most from the mean of the window around them, and the others, without those sampled.

    Differences are squared distances of layer-normed tokens (without affine). At edges and on small things, a
    patch's surroundings tell little of it; so these stay in the sequence (SegViTv2, arXiv 2306.06289, Shrunk++).

    Args:
        patches: (B, h*w, C), before the block that leaves others out.
        grid: (h, w).
        window: Rows and columns of the window, an odd number; beyond the border, the outermost patches again.
        sampled: Indices (L,) into h*w.
        count: How many; where there are fewer, all.

    Returns:
        Indices (B, K) into h*w, ascending, and (B, h*w - L - K), the greatest difference first.
    """
    normed = F.layer_norm(at_least_float32(patches.detach()), patches.shape[-1:])
    cells = torch.unflatten(normed.transpose(1, 2), 2, grid)
    means = F.avg_pool2d(F.pad(cells, (window // 2,) * 4, mode="replicate"), window, stride=1)
    difference = (cells - means).square().sum(1).flatten(1).index_fill(1, sampled, -1.0)
    ranked = difference.argsort(dim=1, descending=True)[:, : difference.shape[1] - len(sampled)]
    return ranked[:, :count].sort(dim=1).values, ranked[:, count:]


def sampled_patches(grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Indices (L,) into h*w of every `stride`-th row and column, from the middle of the first `stride` on.

    With a stride of 2 these are the first ones, as nearest sampling takes them.
    """
    patches = torch.arange(grid[0] * grid[1], device=device).view(grid)
    first = (stride - 1) // 2
    rows, columns = (slice(min(first, cells - 1), None, stride) for cells in grid)
    return patches[rows, columns].flatten()


@torch.no_grad()
def stand_in_counts(kept: KeptPatches, grid: tuple[int, int]) -> Tensor:
    """How many patches each one that was kept stands for: itself, and its share of those that were left out.

    A patch that was left out is shared out by `LIKENESS` and `DISTANCE`, in layer-normed tokens (without affine).
    Without these counts the edges, where most patches stay, would draw too much of the later blocks' attention.

    Args:
        kept: M patches of the grid, and the others.
        grid: (h, w).

    Returns:
        (B, M), float32 or more; h*w in sum.
    """
    normed = F.layer_norm(at_least_float32(kept.before), kept.before.shape[-1:])
    likeness = rows_at(normed, kept.left_out) @ rows_at(normed, kept.places).transpose(1, 2)
    distance = squared_distances(kept.left_out, kept.places, grid[1])
    return 1 + (likeness * (LIKENESS / normed.shape[-1]) - DISTANCE * distance).softmax(dim=2).sum(dim=1)


def squared_distances(places: Tensor, others: Tensor, columns: int) -> Tensor:
    """(B, K, M) squared distance in patches between places (B, K) and others (B, M) of a grid of `columns`."""
    place, other = places.unsqueeze(2), others.unsqueeze(1)
    return (place // columns - other // columns).square() + (place % columns - other % columns).square()


def with_prefix(places: Tensor, num_prefix_tokens: int) -> Tensor:
    """Indices (B, prefix + M) into a sequence of prefix tokens and patches, of the patches `places` (B, M)."""
    prefix = torch.arange(num_prefix_tokens, device=places.device).expand(places.shape[0], -1)
    return torch.cat((prefix, places + num_prefix_tokens), dim=1)


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """(B, K, X) of rows (B, L, X), by indices (B, K)."""
    return rows.gather(1, places.unsqueeze(2).expand(-1, -1, rows.shape[2]))
