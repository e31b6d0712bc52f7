"""Feature distillation: a shrunk model learns the features that its teacher's decoder reads, without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segvit.backbones.families import is_hierarchical, outline_backbone
from segvit.backbones.feature_map import FeatureMap
from segvit.config import ModelConfig
from segvit.decoders.anchored import Anchored
from segvit.model import SegViT
from segvit.output import at_least_float32, full_precision
from segvit.weights.fitting import blocks_of
from segvit.weights.start import start_problem

# B batch, P patches, C channels


class FeatureDistillation(nn.Module):
    """The loss of a student's features against its teacher's at the same places.

    The mean over features and patches of the squared distance, each feature's in units of its mean squared length.
    The student's ATM stages get no gradient: they should be the teacher's (`segvit.take_weights`).

    Args:
        student: Trained; what of it the features do not depend on is frozen.
        teacher: Frozen, and in evaluation mode for good.

    Raises:
        ValueError: The two do not read the same features; see `distillation_problem`.
    """

    def __init__(self, student: SegViT, teacher: SegViT) -> None:
        super().__init__()
        if problem := distillation_problem(student.config, teacher.config):
            raise ValueError(problem)
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        for name, module in student.decoder.named_children():
            if name != "upsampling":
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> FeatureDistillation:
        """Set the student's mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """The loss of normalised images (B, 3, H, W), a scalar of float32 or more."""
        with torch.no_grad():
            wanted = self.teacher.features(images)
        found = self.student.features(images)
        errors = [feature_error(one, other) for one, other in zip(found, wanted, strict=True)]
        return torch.stack(errors).mean()


def feature_error(found: FeatureMap, wanted: FeatureMap) -> Tensor:
    """Mean squared distance of tokens (B, P, C) over the mean squared length of the wanted ones."""
    with full_precision(found.tokens):
        ours, theirs = at_least_float32(found.tokens), at_least_float32(wanted.tokens)
        return (ours - theirs).square().mean() / theirs.square().mean()


def distillation_problem(student: ModelConfig, teacher: ModelConfig) -> str | None:
    """Why the features of one model cannot be learned from the other's, or None.

    Raises:
        ValueError: A backbone that there is not.
    """
    for config in (student, teacher):
        if config.decoder.shrinks and not isinstance(config.decoder, Anchored):
            return f"structure {config.structure} has no features at all patches to compare; use anchored"
    if problem := start_problem(student, teacher):
        return problem
    layers, others = (read_layers(config) for config in (student, teacher))
    if layers == others:
        return None
    return f"out_layers {layers} are not those of its teacher, {others}, whose features it learns; make them the same"


def read_layers(config: ModelConfig) -> tuple[int, ...]:
    """The blocks or stages that a model reads; raises ValueError for a backbone that there is not."""
    outline = outline_backbone(config.backbone, config.backbone_options)
    hierarchical = is_hierarchical(config.backbone)
    return config.out_layers or config.decoder.default_out_layers(len(blocks_of(outline)), hierarchical)
