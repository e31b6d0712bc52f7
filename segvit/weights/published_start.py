"""Starting from a published checkpoint (SegViT, arXiv 2210.05844): what its tensors and the new model tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from segvit.backbones.families import num_heads_of, outline_backbone
from segvit.config import ModelConfig
from segvit.decoders import DECODERS
from segvit.model import SegViT
from segvit.weights.fitting import blocks_of, square_side
from segvit.weights.published import class_head, count, fill_model, read_config, read_file, read_layout, read_state
from segvit.weights.published_names import Layout


class PublishedStart(NamedTuple):
    """A published checkpoint as models of a configuration can start from it."""

    config: ModelConfig
    """Of the checkpoint's model."""
    state: dict[str, Tensor]
    """By published name."""
    layout: Layout
    class_names: tuple[str, ...]
    """As its metadata has them; empty: it has none."""

    def build(self) -> SegViT:
        """The checkpoint's model, in evaluation mode."""
        return fill_model(self.config, self.state, self.layout)


def read_published_start(path: str | Path, config: ModelConfig) -> PublishedStart:
    """What a published checkpoint is, told by its tensors and by a model that will start from it.

    Structure, widths and classes are the file's own; the backbone is the configuration's. So are the blocks that
    are read, where both have as many stages. The crop is a square, as of all that were published, or the
    configuration's own.

    Args:
        path: See `load_published`; tensors are mapped, not read, where the file allows it.
        config: Of the model that is to start from it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: As `load_published`; or the file's backbone is another one, or its crop may be either.
    """
    contents = read_file(Path(path))
    state = read_state(contents)
    single = read_layout_shrinks(state, config.structure)
    layout = read_layout(state, shrinks=single)
    outline = outline_backbone(config.backbone, config.backbone_options)
    if isinstance(outline, SwinTransformer):
        raise ValueError(f"its backbone is a plain ViT, not {config.backbone}; start from a model of the same backbone")
    decoder = config.decoder if config.structure == layout.structure else DECODERS.get(layout.structure)()
    shrinking = decoder.downsampling(layout.num_blocks) if single else None
    found = read_config(
        state,
        layout,
        num_heads_of(blocks_of(outline)[0]),
        start_layers(config, layout),
        shrinking.block if shrinking else None,
        start_crop(config, state),
        None,
    )
    sizes = ("embed_dim", "depth", "patch_size")
    own = (outline.embed_dim, len(outline.blocks), outline.patch_embed.patch_size[0])
    theirs = tuple(found.backbone_options[name] for name in sizes)
    if own != theirs:
        texts = [
            f"width {width}, {depth} blocks and patches of {patch} pixels" for width, depth, patch in (theirs, own)
        ]
        raise ValueError(
            f"its backbone has {texts[0]}, {config.backbone} has {texts[1]}; start from a model of the same backbone"
        )
    names = class_names_of(contents, len(state[class_head(layout.structure)]) - 1)
    config = found.replace(backbone=config.backbone, backbone_options=dict(config.backbone_options))
    return PublishedStart(config, state, layout, names)


def read_layout_shrinks(state: Mapping[str, Tensor], structure: str) -> bool:
    """Whether a checkpoint's backbone downsamples: Shrunk does; of one stage, only the model that starts can tell."""
    is_shrunk = any(name.startswith("decode_head.atm.") for name in state)
    return is_shrunk or (structure == "naive_qd" and count(state, r"decode_head\.decoder_(\d+)\.", first=1) == 1)


def start_layers(config: ModelConfig, layout: Layout) -> tuple[int, ...]:
    """The blocks that a checkpoint's model is taken to read; all of its blocks are kept but where `config` has less."""
    own = config.out_layers or config.decoder.default_out_layers(layout.num_blocks, hierarchical=False)
    if len(own) == layout.num_stages:
        return own
    default = DECODERS.get(layout.structure)().default_out_layers(layout.num_blocks, hierarchical=False)
    if len(default) == layout.num_stages:
        return default
    return tuple(range(layout.num_blocks - layout.num_stages, layout.num_blocks))


def start_crop(config: ModelConfig, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(height, width) in pixels of a checkpoint's training crop; ValueError where its patches leave that open."""
    patch_size = state["backbone.patch_embed.projection.weight"].shape[-1]
    num_patches = state["backbone.pos_embed"].shape[1] - 1
    height, width = config.image_size
    side = square_side(num_patches) * patch_size
    is_own = height * width == num_patches * patch_size**2
    if is_own and side and (height, width) != (side, side):
        raise ValueError(
            f"its {num_patches} patches may be of a crop of {side} x {side} or {height} x {width}; load it with "
            "segvit.load_published and its image_size, and start from the folder that segvit.save_checkpoint writes"
        )
    if not is_own and not side:
        raise ValueError(
            f"its {num_patches} patches are of no square crop, and not of {height} x {width}; load it with "
            "segvit.load_published and its image_size, and start from the folder that segvit.save_checkpoint writes"
        )
    return (height, width) if is_own else (side, side)


def class_names_of(contents: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """The class names of a checkpoint's metadata, by class id; empty where it has none, or another number."""
    meta = contents.get("meta")
    if not isinstance(meta, Mapping):
        return ()
    nested = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (nested.get("classes") if isinstance(nested, Mapping) else None)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names) if len(names) == num_classes == len(set(names)) else ()
