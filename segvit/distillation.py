"""Feature distillation without training: what a shrunk model restores is fitted to its teacher's features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from segvit.backbones.downsampling import rows_at
from segvit.backbones.families import is_hierarchical, outline_backbone
from segvit.config import ModelConfig
from segvit.decoders.anchored import Anchored, AnchoredCascade, kept_of
from segvit.model import SegViT
from segvit.output import at_least_float32, full_precision
from segvit.weights.fitting import blocks_of
from segvit.weights.start import start_problem

# B batch, L patches that were left out, C channels

RIDGE = 0.01  # of the mean square of what the maps read


class FeatureFit(NamedTuple):
    """Errors of the features at the patches that were left out, on the images that they were fitted to.

    Mean over the features of the squared distance to the teacher's, in units of the teacher's mean square.
    """

    before: float
    after: float


@torch.no_grad()
def fit_upsampling(
    student: SegViT, teacher: SegViT, images: Iterable[Tensor], add_up: Callable[[Tensor], None] = lambda sums: None
) -> FeatureFit:
    """Find the corrections of an anchored student's upsampling by ridge regression to its teacher's features.

    The student should have the teacher's other weights (`segvit.take_weights`). Labels are not needed, and nothing
    else of the student is changed. Both models are left in evaluation mode.

    Args:
        student: Of structure ``anchored``; changed in place.
        teacher: Reads the same blocks; on the student's device.
        images: Batches of normalised images (B, 3, H, W).
        add_up: Adds up a float64 tensor over processes that have other images each, in place.

    Returns:
        The errors that are left without and with the corrections.

    Raises:
        ValueError: The two do not read the same features; see `distillation_problem`. No image.
    """
    if problem := distillation_problem(student.config, teacher.config):
        raise ValueError(problem)
    decoder = student.decoder
    assert isinstance(decoder, AnchoredCascade)
    upsampling = decoder.upsampling
    for model in (student, teacher):
        model.eval()
    first = upsampling.corrections[0].weight
    assert isinstance(first, Tensor)
    width, count = first.shape[0], len(upsampling.corrections)
    squares = torch.zeros(width, width, dtype=torch.float64)
    products = torch.zeros(count, width, width, dtype=torch.float64)
    lengths = torch.zeros(2, count, dtype=torch.float64)  # of what is missing, and of the teacher's features
    num_images = torch.zeros(1, dtype=torch.float64)
    for batch in images:
        num_images += len(batch)
        wanted = teacher.features(batch)[decoder.num_whole :]
        features = decoder.shrunk(student.backbone(batch))
        stand_ins, difference = upsampling.stand_ins(features)
        left_out = kept_of(features).left_out
        with full_precision(difference):
            inputs = at_least_float32(difference).flatten(0, 1)
            squares += (inputs.T @ inputs).double().cpu()
            for index, (feature, stand_in) in enumerate(zip(wanted, stand_ins, strict=True)):
                target = at_least_float32(rows_at(feature.tokens, left_out))
                missing = (target - at_least_float32(stand_in)).flatten(0, 1)
                products[index] += (inputs.T @ missing).double().cpu()
                lengths[0, index] += missing.square().sum().double().cpu()
                lengths[1, index] += target.square().sum().double().cpu()
    for sums in (squares, products, lengths, num_images):
        add_up(sums)
    if not num_images:
        raise ValueError("there is no image to fit the upsampling to")
    ridge = RIDGE * squares.diagonal().mean().clamp(min=1e-12) * torch.eye(width, dtype=torch.float64)
    maps = torch.linalg.solve(squares + ridge, products)
    explained = 2 * (maps * products).sum((1, 2)) - (maps * (squares @ maps)).sum((1, 2))
    for correction, found in zip(upsampling.corrections, maps, strict=True):
        correction.weight.copy_(found.T)  # type: ignore[operator]
    missing, whole = lengths[0], lengths[1].clamp(min=1e-12)
    return FeatureFit(float((missing / whole).mean()), float(((missing - explained) / whole).mean()))


def distillation_problem(student: ModelConfig, teacher: ModelConfig) -> str | None:
    """Why the features of one model cannot be fitted to the other's, or None.

    Raises:
        ValueError: A backbone that there is not.
    """
    if not isinstance(student.decoder, Anchored):
        return f"structure {student.structure} restores no features that could be fitted; use anchored"
    if teacher.decoder.shrinks and not isinstance(teacher.decoder, Anchored):
        return f"structure {teacher.structure} has no features at all patches to fit to; use anchored"
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
