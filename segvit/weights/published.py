"""The published checkpoint format of SegViT (arXiv 2210.05844): reading it into a model, and writing it."""

from __future__ import annotations

import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from segvit.backbones.families import is_hierarchical, num_heads_of, outline_backbone
from segvit.config import ModelConfig
from segvit.losses.segmentation_loss import NO_OBJECT_WEIGHT
from segvit.model import SegViT, build_model
from segvit.weights.fitting import blocks_of
from segvit.weights.published_names import Layout, tensor_names

# The published backbones are of this architecture, with sizes of their own.
ARCHITECTURE = "vit_base_patch16_384"
EMPTY_WEIGHT = "loss_decode.criterion.empty_weight"
PUBLISHED_STRUCTURES = ("cascade", "single", "naive_qd", "shrunk")
MOST_NAMED = 20
PREFIX = "module."

Shape = tuple[int, ...]


def load_published(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    num_heads: int,
    out_layers: Sequence[int],
    shrink_at: int | None = None,
    image_size: int | tuple[int, int],
    attention_scale: float | None = None,
) -> SegViT:
    """The model of a published checkpoint, in evaluation mode, on the device of the tensors.

    Widths, depth, patch size, classes, decoder layers and the structure are read from the tensors: several
    stages are a cascade, one stage the single-layer baseline (with `shrink_at`: naive QD), and stages beside an
    ``atm`` part are Shrunk. Blocks after the last of `out_layers` and a final norm of the backbone have no
    effect on the output and are left out. Half precision is raised to float32, float64 stays. Inputs of any
    size are taken afterwards.

    Args:
        path_or_state_dict: A ``.safetensors`` file, a torch file (read without unpickling anything but tensors
            and plain containers), or its contents: the tensors by name, or a mapping with a ``state_dict``.
        num_heads: Attention heads of backbone and decoder.
        out_layers: 0-based blocks that are read, ascending.
        shrink_at: 0-based block inside which query-based downsampling halves the tokens; None: no downsampling.
        image_size: Side, or (height, width), in pixels of the training crop.
        attention_scale: Factor of ATM's similarity; None: head width ** -0.5.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is damaged or needs pickled classes, tensors that are missing, unknown or of
            another shape than the structure needs, or arguments that do not fit them.
    """
    state = read_state(path_or_state_dict)
    layout = read_layout(state, shrinks=shrink_at is not None)
    config = read_config(state, layout, num_heads, tuple(out_layers), shrink_at, image_size, attention_scale)
    return fill_model(config, state, layout)


def fill_model(config: ModelConfig, state: Mapping[str, Tensor], layout: Layout) -> SegViT:
    """The model of the configuration with published tensors; ValueError names those that do not fit."""
    num_classes = len(state[class_head(layout.structure)]) - 1
    with torch.device(next(iter(state.values())).device):
        model = build_model(config, num_classes)
    names = rename(model)
    check_state(state, {name: tuple(model.get_parameter(own).shape) for name, own in names.items()}, num_classes)

    tensors = {own: state[name] for name, own in names.items()}
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        model = model.double()
    model.load_state_dict(tensors)
    return model.eval()


def published_arguments(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of `load_published` for files of that configuration, as a preset has it.

    Raises:
        ValueError: The configuration computes something that the format has no place for.
    """
    if config.structure not in PUBLISHED_STRUCTURES or is_hierarchical(config.backbone):
        raise ValueError(
            f"the published format has no place for structure {config.structure} on {config.backbone}; describe the "
            f"file by a plain ViT with structure {', '.join(PUBLISHED_STRUCTURES)}"
        )
    blocks = blocks_of(outline_backbone(config.backbone, config.backbone_options))
    shrinks = config.decoder.downsampling(len(blocks))
    return {
        "num_heads": config.decoder_heads or num_heads_of(blocks[0]),
        "out_layers": config.out_layers or config.decoder.default_out_layers(len(blocks), hierarchical=False),
        "shrink_at": shrinks.block if shrinks else None,
        "image_size": config.image_size,
        "attention_scale": config.attention_scale,
    }


def published_state_dict(model: SegViT) -> dict[str, Tensor]:
    """A model's tensors under their published names, with the loss's class weights; the inverse of `load_published`.

    Raises:
        ValueError: The model computes something that the format has no place for.
    """
    config = model.config
    fixed = {
        "chain_stages": True,
        "share_queries": True,
        "accumulate_masks": True,
        "shrink_queries": "nearest",
        "shrink_keys": False,
    }
    values = config.to_dict()
    reasons = [f"{name} {values[name]}" for name, only in fixed.items() if values.get(name, only) != only]
    if config.structure not in PUBLISHED_STRUCTURES:
        reasons.append(f"structure {config.structure}")
    if config.structure == "cascade" and len(model.backbone.widths) < 2:
        reasons.append("a cascade of one stage")
    if config.class_token:
        reasons.append("class_token True")
    if config.decoder_heads not in (None, model.backbone.num_heads):
        reasons.append(f"decoder_heads {config.decoder_heads}")
    if reasons:
        raise ValueError(f"the published format has no place for {', '.join(reasons)}; use segvit.save_checkpoint")
    tensors = model.state_dict()
    names = rename(model)
    state = {name: tensors[own] for name, own in names.items()}
    weight = next(iter(state.values())).new_ones(model.num_classes + 1)
    weight[-1] = NO_OBJECT_WEIGHT
    heads = ("decode_head.", "decode_head.atm.") if config.structure == "shrunk" else ("decode_head.",)
    return state | {head + EMPTY_WEIGHT: weight.clone() for head in heads}


def rename(model: SegViT) -> dict[str, str]:
    """The model's own tensor names by their published ones.

    Raises:
        ValueError: A tensor without a published name.
    """
    config, own = model.config, model.state_dict()
    blocks = {match[1] for name in own if (match := re.match(r"backbone\.vit\.blocks\.(\d+)\.", name))}
    names = tensor_names(
        Layout(
            config.structure,
            len(blocks),
            len(model.backbone.widths) if config.structure in ("cascade", "shrunk") else 1,
            config.decoder_layers,
            config.to_dict().get("input_projection", True),
        )
    )
    if strange := sorted(set(own) ^ set(names.values())):
        raise ValueError(f"the published format has no place for {listing(strange)}; use segvit.save_checkpoint")
    return names


def read_state(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file or mapping by published name."""
    contents = source if isinstance(source, Mapping) else read_file(Path(source))
    state = _nested_state(contents) or contents
    if strange := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"not a state dict: {listing(strange)} hold no tensors; pass the tensors by name")
    if state and all(name.startswith(PREFIX) for name in state):
        return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    return dict(state)


def read_file(path: Path) -> Mapping[str, Tensor]:
    """The contents of a checkpoint file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    num_bytes = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        refuse_swelling(path, num_bytes)
        # Only the zip format can be mapped into memory instead of read.
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} needs pickled classes, or is no torch file, and is not loaded ({first_line(error)}); "
            "save its state_dict alone, where you trust it, and load that"
        ) from None
    except Exception as error:  # torch's reader fails on damaged bytes in any way, with KeyError for one
        raise ValueError(f"{path} is damaged or no checkpoint ({first_line(error)}); get it again") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not tensors by name; save a state_dict")
    for name, tensor in {**contents, **_nested_state(contents)}.items():
        # Strides of 0 repeat one number for ever.
        if isinstance(tensor, Tensor) and tensor.numel() * tensor.element_size() > num_bytes:
            raise ValueError(f"{path} says that {name} has the shape {tuple(tensor.shape)}, which it cannot hold")
    return contents


def refuse_swelling(path: Path, num_bytes: int) -> None:
    """Raise ValueError for a torch file that takes more memory than it is long: packed, or with zeros made on demand.

    PyTorch stores without compression, and its unpickler for tensors alone may still make a bytearray of any length.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            swells = content.find(b"bytearray") >= 0
    else:
        with zipfile.ZipFile(path) as archive:
            swells = sum(member.file_size for member in archive.infolist()) > num_bytes
            pickles = [member for member in archive.namelist() if member.endswith(".pkl")]
            swells = swells or any(b"bytearray" in archive.read(member) for member in pickles)
    if swells:
        raise ValueError("it holds more than tensors by name, or is compressed; save a state_dict by torch.save")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its advice."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def _nested_state(contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `state_dict` holds, empty where there is none."""
    nested = contents.get("state_dict")
    return nested if isinstance(nested, Mapping) else {}


def read_layout(state: Mapping[str, Tensor], *, shrinks: bool) -> Layout:
    """The structure, and how many of each part there are, from the names alone."""
    num_blocks = count(state, r"backbone\.layers\.(\d+)\.")
    num_stages = count(state, r"decode_head\.decoder_(\d+)\.", first=1)
    layers_of = r"decode_head\.decoder_\d+\.layers\.(\d+)\."
    projection = any(name.startswith(("decode_head.input_proj_", "decode_head.proj_norm_")) for name in state)
    if any(name.startswith("decode_head.atm.") for name in state):
        structure = "shrunk"
    elif num_stages > 1:
        structure = "cascade"
    else:
        structure = "naive_qd" if shrinks else "single"
    if not (num_blocks and num_stages):
        raise ValueError(
            "not a published SegViT checkpoint: it needs tensors backbone.layers.0.* and decode_head.decoder_1.*, "
            f"got {listing(sorted(state)) or 'none'}"
        )
    if max(num_blocks, num_stages, count(state, layers_of)) > len(state):
        raise ValueError(
            f"the checkpoint numbers up to {max(num_blocks, num_stages, count(state, layers_of))} parts and has "
            f"{len(state)} tensors; get it again"
        )
    if shrinks and structure == "cascade":
        raise ValueError(f"shrink_at has no meaning for a cascade of {num_stages} stages; leave it out")
    if not shrinks and structure == "shrunk":
        raise ValueError("the checkpoint is of Shrunk, which downsamples; pass shrink_at, 8 in the published ViT-L")
    return Layout(structure, num_blocks, num_stages, max(count(state, layers_of), 1), projection)


def count(names: Iterable[str], pattern: str, first: int = 0) -> int:
    """How many numbered parts there are: the highest number in the pattern's group, counted from `first`."""
    numbers = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(numbers, default=first - 1) + 1 - first


def read_config(
    state: Mapping[str, Tensor],
    layout: Layout,
    num_heads: int,
    out_layers: tuple[int, ...],
    shrink_at: int | None,
    image_size: int | tuple[int, int],
    attention_scale: float | None,
) -> ModelConfig:
    """The configuration with the widths of the tensors."""
    classes = class_head(layout.structure)
    sized = {
        "backbone.patch_embed.projection.weight": 4,
        "backbone.pos_embed": 3,
        "backbone.layers.0.ffn.layers.0.0.weight": 2,
        classes: 2,
    }
    if unfit := [name for name, rank in sized.items() if name not in state or state[name].ndim != rank]:
        raise ValueError(f"the checkpoint's sizes cannot be read: {listing(unfit)} missing or of another rank")
    width, _, patch_size, _ = state["backbone.patch_embed.projection.weight"].shape
    hidden = len(state["backbone.layers.0.ffn.layers.0.0.weight"])
    decoder_width = state[classes].shape[1]
    for part, value in {"backbone": width, "decoder": decoder_width}.items():
        if num_heads < 1 or value % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {part}'s width {value}; use one that does")
    if len(out_layers) != layout.num_stages:
        stages_word = "upsampling stages" if layout.structure == "shrunk" else "stages"
        raise ValueError(
            f"out_layers {out_layers} are {len(out_layers)} blocks, the checkpoint has {layout.num_stages} "
            f"{stages_word}; name a block for each"
        )
    height, width_px = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (height, width_px)
    check_image_size(size, patch_size, state["backbone.pos_embed"].shape[1] - 1)
    ratio = hidden / width
    if int(width * ratio) < hidden:  # timm cuts the product down to a whole number
        ratio = math.nextafter(ratio, math.inf)
    return ModelConfig(
        backbone=ARCHITECTURE,
        image_size=size,
        structure=layout.structure,
        out_layers=out_layers,
        decoder_layers=layout.num_layers,
        decoder_width=decoder_width,
        decoder_heads=num_heads,
        input_projection=layout.input_projection or layout.structure == "shrunk",
        attention_scale=attention_scale,
        shrink_at=shrink_at,
        class_token=False,
        backbone_options={
            "embed_dim": width,
            "depth": layout.num_blocks,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "mlp_ratio": ratio,
        },
    )


def check_image_size(size: tuple[int, int], patch_size: int, num_patches: int) -> None:
    """Raise ValueError unless the position embedding has one entry a patch of the training crop."""
    height, width = size
    if not height % patch_size and not width % patch_size and height * width == num_patches * patch_size**2:
        return
    side = math.isqrt(num_patches)
    fits = f"{side * patch_size}" if side**2 == num_patches else f"(height, width) of {num_patches} patches"
    raise ValueError(
        f"image_size {height} x {width} does not fit the position embedding of {num_patches} patches of "
        f"{patch_size} pixels; use {fits} (inputs may have any size)"
    )


def class_head(structure: str) -> str:
    """The name of the tensor (N + 1, C) that tells the number of classes and the decoder's width."""
    return "decode_head.atm.class_embed.weight" if structure == "shrunk" else "decode_head.class_embed.weight"


def check_state(state: Mapping[str, Tensor], needed: Mapping[str, Shape], num_classes: int) -> None:
    """Raise one ValueError naming every tensor that is missing, unknown or of another shape."""
    allowed: dict[str, Shape] = {
        head + EMPTY_WEIGHT: (num_classes + 1,) for head in ("decode_head.", "decode_head.atm.")
    }
    block = {name: shape for name, shape in needed.items() if name.startswith("backbone.layers.0.")}
    num_kept = count(needed, r"backbone\.layers\.(\d+)\.")
    for index, name in product(range(num_kept, count(state, r"backbone\.layers\.(\d+)\.")), block):
        allowed[name.replace("layers.0.", f"layers.{index}.", 1)] = block[name]
    width = needed["backbone.pos_embed"][-1]
    allowed |= {f"backbone.ln1.{part}": (width,) for part in ("weight", "bias")}
    shapes = {**needed, **allowed}
    of_another_shape = [
        f"{name} {tuple(tensor.shape)} instead of {shapes[name]}"
        for name, tensor in state.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    problems = {
        "missing": [name for name in needed if name not in state],
        "unknown": [name for name in state if name not in shapes],
        "of another shape": of_another_shape,
    }
    if found := [f"{kind}: {listing(names)}" for kind, names in problems.items() if names]:
        raise ValueError(f"the checkpoint does not fit the structure its names tell; {'; '.join(found)}")


def listing(names: Sequence[str]) -> str:
    """Names in a row, the rest counted where they are many."""
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + rest
