"""SegViT: semantic segmentation with plain vision transformers (arXiv 2210.05844), in PyTorch and timm."""

from segvit.checkpoint import load_checkpoint, save_checkpoint
from segvit.config import ModelConfig
from segvit.flops import ModelCost, PresetCost, model_cost, preset_cost
from segvit.inference.export import export_onnx, export_program
from segvit.inference.latency import measure_latency
from segvit.inference.predict import PUBLISHED_SCALES, predict, predict_batch, semantic_labels, semantic_scores
from segvit.losses.cross_entropy import PixelNormalizer, SemanticCrossEntropy
from segvit.losses.segmentation_loss import LossNormalizer, SegmentationLoss
from segvit.metrics import BoundaryIoU, ConfusionMatrix, SegmentationMetrics, segmentation_metrics
from segvit.model import SegViT, build_model, check_config
from segvit.optim import parameter_groups, poly_lambda
from segvit.output import SegmentationOutput
from segvit.presets import PRESETS, Preset, PublishedResult, find_preset
from segvit.visualize import colorize, draw_legend, overlay, palette_image
from segvit.weights.pretrained import BackboneWeights, find_backbone_weights, load_backbone_state
from segvit.weights.published import load_published, published_state_dict

__all__ = [
    "PRESETS",
    "PUBLISHED_SCALES",
    "BackboneWeights",
    "BoundaryIoU",
    "ConfusionMatrix",
    "LossNormalizer",
    "ModelConfig",
    "ModelCost",
    "PixelNormalizer",
    "Preset",
    "PresetCost",
    "PublishedResult",
    "SegViT",
    "SegmentationLoss",
    "SegmentationMetrics",
    "SegmentationOutput",
    "SemanticCrossEntropy",
    "build_model",
    "check_config",
    "colorize",
    "draw_legend",
    "export_onnx",
    "export_program",
    "find_backbone_weights",
    "find_preset",
    "load_backbone_state",
    "load_checkpoint",
    "load_published",
    "measure_latency",
    "model_cost",
    "overlay",
    "palette_image",
    "parameter_groups",
    "poly_lambda",
    "predict",
    "predict_batch",
    "preset_cost",
    "published_state_dict",
    "save_checkpoint",
    "segmentation_metrics",
    "semantic_labels",
    "semantic_scores",
]
