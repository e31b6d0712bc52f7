"""SegViT: semantic segmentation with plain vision transformers (arXiv 2210.05844), in PyTorch and timm.

Everything below is loaded when it is first asked for: ``import segvit`` alone loads not even PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segvit.backbones.feature_map import FeatureMap
    from segvit.checkpoint import load_checkpoint, save_checkpoint
    from segvit.config import ModelConfig
    from segvit.decoders import DECODERS
    from segvit.decoders.decoder import Decoder, DecoderOutput, DecoderSpec, Prediction
    from segvit.distillation import FeatureFit, fit_upsampling
    from segvit.flops import CostAtSize, ModelCost, model_cost, preset_cost
    from segvit.inference.export import export_onnx, export_program, save_program
    from segvit.inference.latency import measure_latency
    from segvit.inference.predict import PUBLISHED_SCALES, predict, predict_batch, semantic_labels, semantic_scores
    from segvit.losses import LOSS_TERMS
    from segvit.losses.segmentation_loss import PUBLISHED_WEIGHTS, LossNormalizer, SegmentationLoss, loss_problems
    from segvit.losses.term import LossTerm
    from segvit.metrics import BoundaryIoU, ConfusionMatrix, SegmentationMetrics, segmentation_metrics
    from segvit.model import SegViT, build_model
    from segvit.model_check import model_problems
    from segvit.optim import parameter_groups
    from segvit.optimizers import OPTIMIZERS, build_optimizer
    from segvit.output import SegmentationOutput
    from segvit.paper import PaperFigure, paper_figure
    from segvit.presets import PRESETS, Preset, PublishedResult, find_preset
    from segvit.registry import Registry
    from segvit.schedules import SCHEDULES, build_schedule
    from segvit.visualize import colorize, draw_legend, overlay, palette_image
    from segvit.weights.pretrained import BackboneWeights, find_backbone_weights, load_backbone_state, weights_problem
    from segvit.weights.published import load_published, published_arguments, published_state_dict
    from segvit.weights.start import TakenWeights, take_weights

_NAMES_BY_MODULE = {
    "segvit.backbones.feature_map": ("FeatureMap",),
    "segvit.checkpoint": (
        "load_checkpoint",
        "save_checkpoint",
    ),
    "segvit.config": ("ModelConfig",),
    "segvit.decoders": ("DECODERS",),
    "segvit.decoders.decoder": (
        "Decoder",
        "DecoderOutput",
        "DecoderSpec",
        "Prediction",
    ),
    "segvit.distillation": ("FeatureFit", "fit_upsampling"),
    "segvit.flops": (
        "ModelCost",
        "CostAtSize",
        "model_cost",
        "preset_cost",
    ),
    "segvit.inference.export": (
        "export_onnx",
        "export_program",
        "save_program",
    ),
    "segvit.inference.latency": ("measure_latency",),
    "segvit.inference.predict": (
        "PUBLISHED_SCALES",
        "predict",
        "predict_batch",
        "semantic_labels",
        "semantic_scores",
    ),
    "segvit.losses": ("LOSS_TERMS",),
    "segvit.losses.segmentation_loss": (
        "LossNormalizer",
        "PUBLISHED_WEIGHTS",
        "SegmentationLoss",
        "loss_problems",
    ),
    "segvit.losses.term": ("LossTerm",),
    "segvit.metrics": (
        "BoundaryIoU",
        "ConfusionMatrix",
        "SegmentationMetrics",
        "segmentation_metrics",
    ),
    "segvit.model": (
        "SegViT",
        "build_model",
    ),
    "segvit.model_check": ("model_problems",),
    "segvit.optim": ("parameter_groups",),
    "segvit.optimizers": ("OPTIMIZERS", "build_optimizer"),
    "segvit.output": ("SegmentationOutput",),
    "segvit.paper": (
        "PaperFigure",
        "paper_figure",
    ),
    "segvit.presets": (
        "PRESETS",
        "Preset",
        "PublishedResult",
        "find_preset",
    ),
    "segvit.registry": ("Registry",),
    "segvit.schedules": (
        "SCHEDULES",
        "build_schedule",
    ),
    "segvit.visualize": (
        "colorize",
        "draw_legend",
        "overlay",
        "palette_image",
    ),
    "segvit.weights.pretrained": (
        "BackboneWeights",
        "find_backbone_weights",
        "load_backbone_state",
        "weights_problem",
    ),
    "segvit.weights.published": (
        "load_published",
        "published_arguments",
        "published_state_dict",
    ),
    "segvit.weights.start": (
        "TakenWeights",
        "take_weights",
    ),
}
_MODULES = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = [
    "DECODERS",
    "LOSS_TERMS",
    "OPTIMIZERS",
    "PRESETS",
    "PUBLISHED_SCALES",
    "PUBLISHED_WEIGHTS",
    "SCHEDULES",
    "BackboneWeights",
    "BoundaryIoU",
    "ConfusionMatrix",
    "CostAtSize",
    "Decoder",
    "DecoderOutput",
    "DecoderSpec",
    "FeatureFit",
    "FeatureMap",
    "LossNormalizer",
    "LossTerm",
    "ModelConfig",
    "ModelCost",
    "PaperFigure",
    "Prediction",
    "Preset",
    "PublishedResult",
    "Registry",
    "SegViT",
    "SegmentationLoss",
    "SegmentationMetrics",
    "SegmentationOutput",
    "TakenWeights",
    "build_model",
    "build_optimizer",
    "build_schedule",
    "colorize",
    "draw_legend",
    "export_onnx",
    "export_program",
    "find_backbone_weights",
    "find_preset",
    "fit_upsampling",
    "load_backbone_state",
    "load_checkpoint",
    "load_published",
    "loss_problems",
    "measure_latency",
    "model_cost",
    "model_problems",
    "overlay",
    "palette_image",
    "paper_figure",
    "parameter_groups",
    "predict",
    "predict_batch",
    "preset_cost",
    "published_arguments",
    "published_state_dict",
    "save_checkpoint",
    "save_program",
    "segmentation_metrics",
    "semantic_labels",
    "semantic_scores",
    "take_weights",
    "weights_problem",
]


def __getattr__(name: str) -> Any:
    """Load a public name's module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'segvit' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
