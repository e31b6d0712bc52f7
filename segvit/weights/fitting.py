"""Whether a timm file's tensors fit a network, and how those of another grid are adapted to it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from timm.layers.patch_embed import resample_patch_embed
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from segvit.backbones.feature_map import resize_positions
from segvit.backbones.positions import resize_bias_table

UNUSED_PREFIXES = ("norm.", "fc_norm.", "head.", "attn_pool.", "mask_token")
PATCH_KERNEL = "patch_embed.proj.weight"
BIAS_TABLE = "relative_position_bias_table"
COMPUTED_SUFFIXES = ("relative_position_index", "attn_mask", "k_bias")

Shape = tuple[int, ...]
Grid = tuple[int, int]
Entry = TypeVar("Entry")


def key_mismatch(network: nn.Module, given: Mapping[str, Shape]) -> str | None:
    """What keeps tensors of these names and shapes from being loaded into the network at some grid, or None.

    Whether they are of a grid that is known, `grid_problem` tells.
    """
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
        if len(given) == 3 and given[1] > prefix and given[2] == width:
            return None
        return f"pos_embed {given}, which is not {prefix} prefix tokens and patches of width {width}"
    if name.endswith(BIAS_TABLE):
        extra = bias_extra(network, name, wanted)
        in_windows = isinstance(network, SwinTransformer)
        if len(given) == 2 and given[1] == width and (given[0] > extra if not in_windows else square_side(given[0])):
            return None
        rule = "no square of distances" if in_windows else f"not distances and {extra} more"
        return f"{name} {given}, which is {rule} for {width} heads"
    if name == PATCH_KERNEL and not isinstance(network, SwinTransformer) and given[:2] == shape[:2]:
        if len(given) == 4 and given[2] == given[3] > 0:
            return None
        return f"{name} {given}, which is no square patch"
    if name == "rope.freqs" and given[:1] + given[2:] == shape[:1] + shape[2:] and given[1] >= shape[1]:
        return None
    return f"{name} {given} instead of {shape}"


def grid_problem(network: nn.Module, given: Mapping[str, Shape], source_grid: Grid | None = None) -> str | None:
    """Why positions that `key_mismatch` accepts cannot be brought to the network's grid, or None: theirs is unknown."""
    given = current_names(given)
    for name, wanted in network.state_dict().items():
        if name in given:
            try:
                learned_grid(network, name, given[name], wanted, source_grid)
            except ValueError as error:
                return str(error)
    return None


def adapt(network: nn.Module, name: str, tensor: Tensor, wanted: Tensor, source_grid: Grid | None = None) -> Tensor:
    """A tensor that `key_mismatch` and `grid_problem` accept, at the network's own patch size, grid, window or depth.

    The embedding of patches of another size is resized so that it gives resized patches what it gave them before
    (FlexiViT, arXiv 2212.08013, equation 4).
    """
    if name == PATCH_KERNEL and tensor.shape != wanted.shape:
        return resample_patch_embed(tensor, list(wanted.shape[2:]))
    grid = learned_grid(network, name, tuple(tensor.shape), wanted, source_grid)
    if grid is not None and name == "pos_embed":
        return resize_positions(tensor, grid, own_grid(network), prefix_entries(network))
    if grid is not None:
        return resize_bias_table(tensor, grid, bias_window(network, name))
    if name.endswith(BIAS_TABLE) and tensor.shape != wanted.shape:
        # Published windows are square. Of those as small as a Swin's, hardly any other has as many distances.
        side = (square_side(len(tensor)) + 1) // 2
        return resize_bias_table(tensor, (side, side), bias_window(network, name))
    return tensor[:, : wanted.shape[1]] if name == "rope.freqs" else tensor


def learned_grid(
    network: nn.Module, name: str, given: Shape, wanted: Tensor, source_grid: Grid | None = None
) -> Grid | None:
    """The patch grid that positions of that shape were learned for; None for tensors that are not of a grid.

    It is `source_grid` where that is told. Else it is the network's own, or the one that its architecture is
    published for, whichever has as many entries: a number alone can be that of a square and of an oblong grid.

    Raises:
        ValueError: Both have, or neither; or the told grid has not.
    """
    if name == "pos_embed":
        extra, count = prefix_entries(network), "patches"
        num_entries = operator.mul
    elif name.endswith(BIAS_TABLE) and not isinstance(network, SwinTransformer):
        extra, count = bias_extra(network, name, wanted), "distances"
        num_entries = num_distances
    else:
        return None
    length = given[1 if name == "pos_embed" else 0] - extra
    if source_grid is not None:
        if num_entries(*source_grid) != length:
            raise ValueError(f"{name} is of {length} {count}, source_grid {grid_text(source_grid)} has another number")
        return source_grid
    known = dict.fromkeys((own_grid(network), published_grid(network)))
    fitting = [grid for grid in known if num_entries(*grid) == length]
    if len(fitting) == 1:
        return fitting[0]
    grids = " and ".join(grid_text(grid) for grid in known)
    reason = f"{grids} both have" if fitting else f"neither this model's nor the published one has ({grids})"
    raise ValueError(
        f"{name} is of {length} {count}, which {reason}; "
        "give source_grid, the rows and columns of patches that these weights were trained with"
    )


def own_grid(network: nn.Module) -> Grid:
    """Rows and columns of patches that the network's positions are for."""
    embedding: Any = network.patch_embed
    rows, columns = embedding.grid_size
    return rows, columns


def published_grid(network: nn.Module) -> Grid:
    """Rows and columns of patches of the images that timm's weights of the architecture were trained on."""
    config: Any = network.pretrained_cfg
    embedding: Any = network.patch_embed
    # The network's own patches may be of another size than the architecture's, which its name tells.
    named = re.search(r"_patch(\d+)_?", config["architecture"])
    patch = int(named[1]) if named else embedding.patch_size[0]
    rows, columns = (size // patch for size in config["input_size"][1:])
    return rows, columns


def num_distances(rows: int, columns: int) -> int:
    """How many (row, column) distances there are between the patches of a grid."""
    return (2 * rows - 1) * (2 * columns - 1)


def grid_text(grid: Grid) -> str:
    """For people: ``18 x 32``."""
    return f"{grid[0]} x {grid[1]}"


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
    return len(wanted) - num_distances(rows, columns)


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
