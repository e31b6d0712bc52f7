"""Starting a model from a trained one of another structure or size: what is the same in both is taken."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from segvit.backbones.feature_map import resize_positions
from segvit.backbones.positions import resize_bias_table
from segvit.config import ModelConfig
from segvit.model import SegViT
from segvit.weights.fitting import BIAS_TABLE, bias_window, prefix_entries

_BACKBONE = "backbone.vit."


class TakenWeights(NamedTuple):
    """Names of a model's tensors: those that it took over, and those that stay as they were."""

    taken: tuple[str, ...]
    new: tuple[str, ...]

    def summary(self) -> str:
        """In a few words, by part: ``backbone and decoder taken, new: decoder.upsampling (9 tensors)``."""
        parts = [part for part in ("backbone", "decoder") if any(name.startswith(part) for name in self.taken)]
        new: dict[str, int] = {}
        for name in self.new:
            module = ".".join(name.split(".")[:2])
            new[module] = new.get(module, 0) + 1
        rest = ", ".join(f"{module} ({count} tensor{'s' if count > 1 else ''})" for module, count in new.items())
        taken = f"{' and '.join(parts) or 'nothing'} taken ({len(self.taken)} tensors)"
        return f"{taken}, new: {rest}" if rest else f"{taken}, nothing new"


def start_problem(config: ModelConfig, source: ModelConfig) -> str | None:
    """Why a model of one configuration cannot start from one of another, or None."""
    own, other = (one.backbone.partition(".")[0] for one in (config, source))
    if own == other and dict(config.backbone_options) == dict(source.backbone_options):
        return None
    names = [
        f"{name} with {dict(one.backbone_options)}" if one.backbone_options else name
        for name, one in ((other, source), (own, config))
    ]
    return f"its backbone is {names[0]}, not {names[1]}; start from a model of the same backbone"


@torch.no_grad()
def take_weights(model: SegViT, source: SegViT) -> TakenWeights:
    """Take over every tensor that both models have under the same name and in the same shape.

    Position embeddings and relative position bias tables of another grid are resized. The structures need not be
    the same: ``anchored`` takes all of a ``cascade``, ``shrunk`` its backbone.

    Args:
        model: Changed in place.
        source: The trained model.

    Raises:
        ValueError: The backbones are not the same.
    """
    if problem := start_problem(model.config, source.config):
        raise ValueError(f"this model cannot start from the other: {problem}")
    theirs, taken, new = source.state_dict(), [], []
    for name, own in model.state_dict().items():
        tensor = theirs.get(name)
        if tensor is not None and name.startswith(_BACKBONE):
            tensor = _at_grid(model, source, name.removeprefix(_BACKBONE), tensor)
        if tensor is None or tensor.shape != own.shape:
            new.append(name)
        else:
            own.copy_(tensor)
            taken.append(name)
    return TakenWeights(tuple(taken), tuple(new))


def _at_grid(model: SegViT, source: SegViT, name: str, tensor: Tensor) -> Tensor:
    ours: Any = model.backbone.vit
    theirs: Any = source.backbone.vit
    if name == "pos_embed":
        grids = theirs.patch_embed.grid_size, ours.patch_embed.grid_size
        return resize_positions(tensor, *grids, prefix_entries(ours))
    if name.endswith(BIAS_TABLE):
        return resize_bias_table(tensor, bias_window(theirs, name), bias_window(ours, name))
    return tensor[:, : ours.rope.freqs.shape[1]] if name == "rope.freqs" else tensor
