"""Starting a model from a trained one of another structure or size: what is the same in both is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segvit.backbones.feature_map import resize_positions
from segvit.backbones.positions import resize_bias_table
from segvit.config import ModelConfig
from segvit.flops import outline_model
from segvit.model import SegViT
from segvit.weights.fitting import BIAS_TABLE, bias_window, own_grid, prefix_entries, shorten

_BACKBONE = "backbone.vit."
MOST_NAMED = 8


class TakenWeights(NamedTuple):
    """Names of a model's tensors: those that it took over, and those that stay as they were."""

    taken: tuple[str, ...]
    new: tuple[str, ...]
    classes: tuple[str, ...] = ()
    """Classes that were found by name; empty where names were not compared."""
    new_classes: tuple[str, ...] = ()
    """Classes whose queries and rows of the class head stay as they were."""

    def summary(self) -> str:
        """In a few words, by part: ``backbone and decoder taken, new: decoder.upsampling (9 tensors)``.

        Where classes are new, also which ones were taken.
        """
        parts = [part for part in ("backbone", "decoder") if any(name.startswith(part) for name in self.taken)]
        new: dict[str, int] = {}
        for name in self.new:
            module = ".".join(name.split(".")[:2])
            new[module] = new.get(module, 0) + 1
        rest = ", ".join(f"{module} ({count} tensor{'s' if count > 1 else ''})" for module, count in new.items())
        taken = f"{' and '.join(parts) or 'nothing'} taken ({len(self.taken)} tensors)"
        tensors = f"{taken}, new: {rest}" if rest else f"{taken}, nothing new"
        if not self.new_classes:
            return tensors
        found = f"taken {shorten(list(self.classes), MOST_NAMED)}" if self.classes else "none taken"
        return f"{tensors}; classes by name: {found}; {len(self.new_classes)} new"


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
def take_weights(
    model: SegViT,
    source: SegViT,
    class_names: Sequence[str] | None = None,
    source_class_names: Sequence[str] | None = None,
) -> TakenWeights:
    """Take over every tensor that both models have under the same name and in the same shape.

    Position embeddings and relative position bias tables of another grid are resized. The structures need not be
    the same: ``anchored`` takes all of a ``cascade``, ``shrunk`` its backbone. Of tensors with a row a class, such
    as class queries and the class head, the rows of classes of the same name are taken, wherever these are.

    Args:
        model: Changed in place.
        source: The trained model.
        class_names: The model's classes.
        source_class_names: The trained model's; empty: not known, so that none are taken. Without either, tensors
            with a row a class are taken where their shapes agree.

    Raises:
        ValueError: The backbones are not the same.
    """
    if problem := start_problem(model.config, source.config):
        raise ValueError(f"this model cannot start from the other: {problem}")
    names = None if class_names is None or source_class_names is None else (class_names, source_class_names)
    by_class = _class_tensors(model) if names is not None else frozenset()
    rows = {} if names is None else {names[0].index(one): names[1].index(one) for one in names[0] if one in names[1]}
    theirs, taken, new = source.state_dict(), [], []
    for name, own in model.state_dict().items():
        tensor = theirs.get(name)
        if tensor is not None and name.startswith(_BACKBONE):
            tensor = _at_grid(model, source, name.removeprefix(_BACKBONE), tensor)
        if tensor is not None and name in by_class:
            tensor = _rows_by_class(own, tensor, rows, model.num_classes, source.num_classes)
        if tensor is None or tensor.shape != own.shape:
            new.append(name)
        else:
            own.copy_(tensor)
            taken.append(name)
    if names is None:
        return TakenWeights(tuple(taken), tuple(new))
    found = [name in names[1] for name in names[0]]
    return TakenWeights(
        tuple(taken),
        tuple(new),
        tuple(name for name, is_found in zip(names[0], found, strict=True) if is_found),
        tuple(name for name, is_found in zip(names[0], found, strict=True) if not is_found),
    )


def _class_tensors(model: SegViT) -> frozenset[str]:
    """Names of the tensors with a row a class: those that are longer by one in a model of one class more."""
    longer = outline_model(model.config, model.num_classes + 1).state_dict()
    return frozenset(
        name
        for name, tensor in model.state_dict().items()
        if tensor.ndim and longer[name].shape[0] == tensor.shape[0] + 1
    )


def _rows_by_class(
    own: Tensor, theirs: Tensor, rows: dict[int, int], num_classes: int, num_theirs: int
) -> Tensor | None:
    """Their rows of the same classes, and those after all classes ("no object"); the model's own for the others.

    None where no class is the same, or the rows are of another width.
    """
    if not rows or own.shape[1:] != theirs.shape[1:] or len(own) - num_classes != len(theirs) - num_theirs:
        return None
    mixed = own.clone()
    mixed[list(rows)] = theirs[list(rows.values())].to(own)
    mixed[num_classes:] = theirs[num_theirs:].to(own)
    return mixed


def _at_grid(model: SegViT, source: SegViT, name: str, tensor: Tensor) -> Tensor:
    ours: Any = model.backbone.vit
    theirs: Any = source.backbone.vit
    if name == "pos_embed":
        return resize_positions(tensor, own_grid(theirs), own_grid(ours), prefix_entries(ours))
    if name.endswith(BIAS_TABLE):
        return resize_bias_table(tensor, bias_window(theirs, name), bias_window(ours, name))
    return tensor[:, : ours.rope.freqs.shape[1]] if name == "rope.freqs" else tensor
