"""Query-based downsampling (SegViT, arXiv 2210.05844, section 3.3): the queries of the downsampling block."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.output import at_least_float32

ShrinkQueries = Literal["nearest", "average", "convolution"]
SHRINK_QUERIES: tuple[ShrinkQueries, ...] = get_args(ShrinkQueries)

# B batch, L tokens with prefix tokens first, C channels, h w patch grid


class Downsampling(NamedTuple):
    """Where and how a backbone leaves tokens out.

    Attributes:
        block: 0-based block inside which the grid is halved.
        queries: how the queries of that block are made, see `GridDownsampling`.
        keep: share of all patches that stay besides, those at edges, see `edge_patches`.
    """

    block: int
    queries: ShrinkQueries = "nearest"
    keep: float = 0.0


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


def edge_patches(patches: Tensor, grid: tuple[int, int], keep: float) -> Tensor:
    """The patches that differ most from the mean of their 2 x 2, of those that nearest sampling drops.

    Differences are squared distances of layer-normed tokens (without affine). At edges and on small things, a
    patch's surroundings tell little of it; so these stay in the sequence (SegViTv2, arXiv 2306.06289, Shrunk++).

    Args:
        patches: (B, h*w, C), before the block that downsamples.
        grid: (h, w).
        keep: Share of h*w.

    Returns:
        Indices (B, K) into h*w, ascending; K is the share rounded, at most what sampling drops.
    """
    rows, columns = grid
    normed = F.layer_norm(at_least_float32(patches.detach()), patches.shape[-1:])
    cells = fill_windows(torch.unflatten(normed.transpose(1, 2), 2, grid))
    means = F.avg_pool2d(cells, 2).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    difference = (cells - means).square().sum(1)[:, :rows, :columns]
    sampled = torch.zeros(grid, dtype=torch.bool, device=patches.device)
    sampled[::2, ::2] = True
    difference = difference.masked_fill(sampled, -1.0).flatten(1)
    return difference.topk(num_edge_patches(grid, keep), dim=1).indices.sort(dim=1).values


def num_edge_patches(grid: tuple[int, int], keep: float) -> int:
    """How many patches `edge_patches` returns."""
    halved = halved_grid(grid)
    dropped = grid[0] * grid[1] - halved[0] * halved[1]
    return min(round(keep * grid[0] * grid[1]), dropped)


def sampled_patches(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Indices (L,) into h*w of what nearest sampling keeps."""
    patches = torch.arange(grid[0] * grid[1], device=device).view(grid)
    return patches[::2, ::2].flatten()


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """(B, K, X) of rows (B, L, X), by indices (B, K)."""
    return rows.gather(1, places.unsqueeze(2).expand(-1, -1, rows.shape[2]))
