"""Whether a timm file's tensors fit a network, and how those of another grid are adapted to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from segvit.backbones.feature_map import resize_positions
from segvit.backbones.positions import resize_bias_table

UNUSED_PREFIXES = ("norm.", "fc_norm.", "head.", "attn_pool.", "mask_token")
BIAS_TABLE = "relative_position_bias_table"
CLEARLY_SMOOTHER = 0.8  # of learned embeddings laid out wrongly, a third; of random ones, 1
COMPUTED_SUFFIXES = ("relative_position_index", "attn_mask", "k_bias")

Shape = tuple[int, ...]
Entry = TypeVar("Entry")


def key_mismatch(network: nn.Module, given: Mapping[str, Shape]) -> str | None:
    """What keeps tensors of these names and shapes from being loaded into the network, or None."""
    depth = len(blocks_of(network))
    wanted = {name: tensor for name, tensor in network.state_dict().items() if not is_unused(name, depth)}
    given = {name: shape for name, shape in current_names(given).items() if not is_unused(name, depth)}
    if getattr(network, "rope", None) is not None:
        # Files of other releases hold the tables that are computed here.
        given = {name: shape for name, shape in given.items() if name in wanted or not name.startswith("rope.")}
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unexpected": sorted(given.keys() - wanted.keys()),
        "of another shape": [
            problem
            for name, tensor in wanted.items()
            if name in given and (problem := shape_mismatch(network, name, given[name], tensor))
        ],
    }
    texts = [f"{kind}: {shorten(names)}" for kind, names in problems.items() if names]
    return "; ".join(texts) or None


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def shape_mismatch(network: nn.Module, name: str, given: Shape, wanted: Tensor) -> str | None:
    """Why a tensor of that shape cannot be loaded under the name, or None."""
    shape = tuple(wanted.shape)
    if given == shape:
        return None
    width = shape[-1] if shape else 0
    if name == "pos_embed":
        prefix = prefix_entries(network)
        if len(given) == 3 and square_side(given[1] - prefix) and given[2] == width:
            return None
        return f"pos_embed {given}, which is no square grid and {prefix} prefix tokens of width {width}"
    if name.endswith(BIAS_TABLE):
        extra = bias_extra(network, name, wanted)
        if len(given) == 2 and square_side(given[0] - extra) and given[1] == width:
            return None
        return f"{name} {given}, which is no square of distances and {extra} more for {width} heads"
    if name == "rope.freqs" and given[:1] + given[2:] == shape[:1] + shape[2:] and given[1] >= shape[1]:
        return None
    return f"{name} {given} instead of {shape}"


def adapt(network: nn.Module, name: str, tensor: Tensor, wanted: Tensor) -> Tensor:
    """A tensor that `shape_mismatch` accepts, at the network's own grid, window or depth."""
    if name == "pos_embed":
        prefix = prefix_entries(network)
        embedding: Any = network.patch_embed
        old = stored_grid(tensor[:, prefix:], embedding.grid_size)
        return resize_positions(tensor, old, embedding.grid_size, prefix)
    if tensor.shape == wanted.shape:
        return tensor
    if name.endswith(BIAS_TABLE):
        side = (square_side(len(tensor) - bias_extra(network, name, wanted)) + 1) // 2
        return resize_bias_table(tensor, (side, side), bias_window(network, name))
    return tensor[:, : wanted.shape[1]] if name == "rope.freqs" else tensor


def stored_grid(positions: Tensor, own_grid: tuple[int, int]) -> tuple[int, int]:
    """The grid that position embeddings (1, h*w, C) were learned for: the network's own where the number agrees.

    A number can be that of both a square and the network's oblong grid (24 x 24 and 18 x 32). It is the square's
    only where the embeddings say so: neighbours on the grid that they were learned for are much more alike.
    """
    side = square_side(positions.shape[1])
    square = (side, side)
    if positions.shape[1] != own_grid[0] * own_grid[1] or own_grid == square:
        return square if side else own_grid

    def roughness(grid: tuple[int, int]) -> float:
        cells = torch.unflatten(positions[0].float(), 0, grid)
        return float(cells.diff(dim=0).square().mean() + cells.diff(dim=1).square().mean())

    is_square = bool(side) and roughness(square) < CLEARLY_SMOOTHER * roughness(own_grid)
    return square if is_square else own_grid


def prefix_entries(network: nn.Module) -> int:
    """Entries of the position embedding in front of the patches'."""
    prefix: Any = getattr(network, "num_prefix_tokens", 0)
    return 0 if getattr(network, "no_embed_class", False) else int(prefix)


def bias_window(network: nn.Module, name: str) -> tuple[int, int]:
    """Rows and columns of the grid or window that a relative position bias table is for."""
    owner: Any = network.get_submodule(name.removesuffix(f".{BIAS_TABLE}"))
    rows, columns = owner.window_size
    return rows, columns


def bias_extra(network: nn.Module, name: str, wanted: Tensor) -> int:
    """Entries of the table after its distances: BEiT's three of the class token, none in Swin."""
    rows, columns = bias_window(network, name)
    return len(wanted) - (2 * rows - 1) * (2 * columns - 1)


def square_side(count: int) -> int:
    """The side of a square of that many cells, 0 if it is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def current_names(state: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors, or what is known of them, under timm's present names, without tables that are computed anew.

    Swin files from its authors, and of early timm releases, merge patches at the end of a stage, not at the
    start of the next.
    """
    merges_at_end = "layers.0.downsample.reduction.weight" in state

    def renamed(name: str) -> str:
        part, _, rest = name.partition(".")
        stage, _, inner = rest.partition(".")
        moves = merges_at_end and part == "layers" and inner.startswith("downsample.")
        return f"layers.{int(stage) + 1}.{inner}" if moves else name

    return {renamed(name): entry for name, entry in state.items() if not name.endswith(COMPUTED_SUFFIXES)}


def blocks_of(network: nn.Module) -> Sequence[nn.Module]:
    """A plain network's blocks or a hierarchical one's stages."""
    found: Any = network.layers if isinstance(network, SwinTransformer) else network.blocks
    blocks: Sequence[nn.Module] = found
    return blocks


def is_unused(name: str, depth: int) -> bool:
    """Whether a timm tensor belongs to parts after the features: final norm, head, later blocks or stages."""
    part, _, rest = name.partition(".")
    later_block = part in ("blocks", "layers") and int(rest.partition(".")[0]) >= depth
    return later_block or name.startswith(UNUSED_PREFIXES)


def shorten(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
