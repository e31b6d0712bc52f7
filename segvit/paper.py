"""The paper's figures for a model, found by what the model computes (SegViT, arXiv 2210.05844, tables 1 to 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

from segvit.config import ModelConfig
from segvit.flops import outline_model
from segvit.presets import PRESETS, PublishedResult, published_names
from segvit.weights.published import PUBLISHED_STRUCTURES, published_arguments


class PaperFigure(NamedTuple):
    """A published model's preset and what the paper reports for it."""

    preset: str
    result: PublishedResult


def paper_figure(config: ModelConfig, num_classes: int) -> PaperFigure | None:
    """The paper's figure for a model with the same tensors that reads the same blocks; None: it is not in the paper.

    What changes training alone, as dropout, does not count, nor does the name of the backbone.

    Raises:
        ValueError: A backbone that there is not.
    """
    if config.structure not in PUBLISHED_STRUCTURES:
        return None
    own: Any = None
    for name in published_names():
        preset = PRESETS[name]
        same = preset.num_classes == num_classes and preset.model.structure == config.structure
        if same and preset.model.image_size == config.image_size and preset.published is not None:
            own = own or computed(config, num_classes)
            if own == computed(preset.model, num_classes):
                return PaperFigure(name, preset.published)
    return None


def computed(config: ModelConfig, num_classes: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """What a model reads, and the names and shapes of its tensors."""
    tensors = outline_model(config, num_classes).state_dict()
    return published_arguments(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
