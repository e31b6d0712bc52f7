"""Where tokens lie, as a plain ViT's attention takes it: rotary tables and relative position bias at any grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.beit import Beit
from torch import Tensor

from segvit.backbones.downsampling import GridDownsampling, halve_nearest, with_prefix
from segvit.backbones.families import PlainViT
from segvit.backbones.timm_blocks import AttentionPositions
from segvit.output import at_least_float32

# L tokens with prefix tokens first, h w patch grid, D head width


class TokenPositions(NamedTuple):
    """Positions of the current tokens, in units of the patches before any downsampling."""

    vit: PlainViT
    num_prefix_tokens: int
    rotary: Tensor | None
    """Sine and cosine (patches, 2D) for all blocks, or (depth, heads, patches, 2D); None: not rotary. Where every
    image kept other patches, (1, B, 1, patches, 2D) or (depth, B, heads, patches, 2D)."""
    bias_index: Tensor | None
    """(L, L) or (B, L, L) entries of the relative position bias table; None: no such bias."""
    interpolation: tuple[Tensor, Tensor] | None
    """Resizes such a table to the grid; None: it has the grid's size."""
    log_counts: Tensor | None = None
    """(B, L) log of how many patches each token stands for, added to its similarity as a key (proportional attention
    of ToMe, arXiv 2210.09461, section 3); None: one each."""

    def of_block(self, index: int) -> AttentionPositions:
        """Positions as the block's attention takes them."""
        rotary = self.rotary
        if rotary is not None and rotary.ndim > 2:
            rotary = rotary[index if len(rotary) > 1 else 0]
        bias = None
        if self.bias_index is not None:
            bias = bias_table(self, index)[self.bias_index].movedim(-1, -3)
        if self.log_counts is not None:
            counts = self.log_counts[:, None, None]
            bias = counts if bias is None else bias + counts
        return AttentionPositions(rotary, rotary, bias)

    def halved(self, grid: tuple[int, int]) -> TokenPositions:
        """Of the tokens that downsampling leaves of (h, w): each stands at the top-left of its 2 x 2 patches.

        Distances stay those in patches. Pooled tokens lie half a patch from there, all alike, so distances
        between them are the same. A family that scales positions by the grid's extent (EVA-02, DINOv3) gives the
        smaller grid the same distances.
        """
        rotary, index = self.rotary, self.bias_index
        if rotary is not None:
            rotary = halve_nearest(rotary, grid, 0)
        if index is not None:
            rows = halve_nearest(index, grid, self.num_prefix_tokens)
            index = halve_nearest(rows.T, grid, self.num_prefix_tokens).T
        return self._replace(rotary=rotary, bias_index=index)

    def at(self, places: Tensor) -> TokenPositions:
        """Of the prefix tokens and, in each image, of the patches `places` (B, M) alone; they stay where they are."""
        rotary, index = self.rotary, self.bias_index
        if rotary is not None:
            rows = rows_of(rotary, places)
            rotary = rows[None, :, None] if rotary.ndim == 2 else rows.movedim(1, 0)
        if index is not None:
            left = with_prefix(places, self.num_prefix_tokens)
            index = index[left.unsqueeze(2), left.unsqueeze(1)]
        return self._replace(rotary=rotary, bias_index=index)


def positions_at(positions: AttentionPositions, places: Tensor, num_prefix_tokens: int) -> AttentionPositions:
    """Positions for the block whose queries are the prefix tokens and the patches `places` (B, M) of its tokens."""
    rotary, bias = positions.query_rotary, positions.bias
    if rotary is not None:
        rows = rows_of(rotary, places)
        rotary = rows.unsqueeze(1) if rotary.ndim == 2 else rows
    if bias is not None:
        bias = rows_of(bias, with_prefix(places, num_prefix_tokens))
    return AttentionPositions(rotary, positions.key_rotary, bias)


def rows_of(table: Tensor, places: Tensor) -> Tensor:
    """(B, ..., M, X): of a table (..., L, X), the rows `places` (B, M) of every image."""
    return table[..., places, :].movedim(-3, 0)


def downsampled_positions(
    positions: AttentionPositions, grid: tuple[int, int], num_prefix_tokens: int, downsampling: GridDownsampling
) -> AttentionPositions:
    """Positions for the block whose queries are downsampled; keys stay where they are.

    A pooled query's rotation and bias are the means over the patches that it pools (an odd last row or column
    for itself alone), so that what positions contribute to its similarity is the mean of what they would for
    these patches.
    """
    rotary, bias = positions.query_rotary, positions.bias
    if rotary is not None:
        rotary = downsampling.positions(rotary, grid, 0)
    if bias is not None:
        bias = downsampling.positions(bias, grid, num_prefix_tokens)
    return AttentionPositions(rotary, positions.key_rotary, bias)


def token_positions(vit: PlainViT, grid: tuple[int, int], num_prefix_tokens: int) -> TokenPositions:
    """Positions of all tokens of a patch grid (h, w)."""
    rope: Any = getattr(vit, "rope", None)
    rotary = None if rope is None else rope.get_embed(shape=grid)
    if not isinstance(vit, Beit):
        return TokenPositions(vit, num_prefix_tokens, rotary, None, None)
    index = relative_index(grid, vit.patch_embed.proj.weight.device)
    stored: Any = vit.patch_embed.grid_size
    interpolation = None if grid == stored else interpolation_matrices(stored, grid)
    # Without the class token its row and column are left out.
    first = 1 - num_prefix_tokens
    return TokenPositions(vit, num_prefix_tokens, rotary, index[first:, first:], interpolation)


def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Entries (1 + h*w, 1 + h*w) of BEiT's bias table, by query and key, the class token first.

    The table holds one entry a (row, column) distance, row by row, and then those of the class token.
    """
    rows, columns = grid
    span = 2 * columns - 1
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    row_distance = row[:, None] - row[None] + rows - 1
    column_distance = column[:, None] - column[None] + columns - 1
    patches = row_distance * span + column_distance
    first_extra = (2 * rows - 1) * span
    from_class = torch.full((1, rows * columns), first_extra, device=device)
    corner = torch.full((1, 1), first_extra + 2, device=device)
    to_class = torch.full((rows * columns, 1), first_extra + 1, device=device)
    return torch.cat((torch.cat((corner, from_class), dim=1), torch.cat((to_class, patches), dim=1)))


def bias_table(positions: TokenPositions, index: int) -> Tensor:
    """The block's bias table (distances + 3, heads) at the grid: its own, the shared one, or their sum."""
    vit: Any = positions.vit
    tables = [vit.blocks[index].attn.relative_position_bias_table]
    tables += [] if vit.rel_pos_bias is None else [vit.rel_pos_bias.relative_position_bias_table]
    table: Tensor = sum(table for table in tables if table is not None)
    return table if positions.interpolation is None else interpolate_distances(table, positions.interpolation)


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Relative position biases (distances + extra, heads) of the old grid for the new one.

    BEiT's rule: the old distances are stretched in a geometric progression over the new ones, so that near
    distances keep their meaning and far ones are stretched; linear in between. Entries beyond the
    (2h - 1) x (2w - 1) distances are kept. Differentiable.
    """
    return table if old == new else interpolate_distances(table, interpolation_matrices(old, new))


def interpolate_distances(table: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """A bias table resized by the matrices of both axes; entries beyond the distances are kept."""
    rows, columns = (matrix.to(at_least_float32(table)) for matrix in matrices)
    num_distances = rows.shape[1] * columns.shape[1]
    distances, extra = at_least_float32(table[:num_distances]), table[num_distances:]
    cells = torch.unflatten(distances, 0, (rows.shape[1], columns.shape[1]))
    resized = torch.einsum("yr,rch,xc->yxh", rows, cells, columns).flatten(0, 1)
    return torch.cat((resized.to(table.dtype), extra))


def interpolation_matrices(old: tuple[int, int], new: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Linear interpolation (2 new - 1, 2 old - 1) between distances along the rows and along the columns."""
    rows, columns = (torch.tensor(interpolation_weights(*cells)) for cells in zip(old, new, strict=True))
    return rows, columns


def interpolation_weights(old: int, new: int) -> list[list[float]]:
    """Weights of the old distances -(old - 1)..old - 1 along one axis in each of the new."""
    stretched = geometric_distances(old, new)
    weights = []
    for distance in range(1 - new, new):
        row = [0.0] * len(stretched)
        position = min(max(float(distance), stretched[0]), stretched[-1])
        right = min(max(sum(one < position for one in stretched), 1), len(stretched) - 1)
        share = (position - stretched[right - 1]) / (stretched[right] - stretched[right - 1]) if right else 1.0
        row[right - 1] = 1.0 - share
        row[right] = share
        weights.append(row)
    return weights


def geometric_distances(old: int, new: int) -> list[float]:
    """Where the old distances -(old - 1)..old - 1 lie among the new: 1, 1 + q, 1 + q + q^2, ... to new - 1."""
    low, high = 1.01, 1.5  # BEiT's bounds of the ratio q
    ratio = high
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1:
            high = ratio
        else:
            low = ratio
    stretched = [0.0]
    for step in range(old - 1):
        stretched.append(stretched[-1] + ratio**step)
    return [-position for position in stretched[:0:-1]] + stretched
