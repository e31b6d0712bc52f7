"""The published optimiser settings: parameter groups (SegViT, arXiv 2210.05844)."""

from __future__ import annotations

from typing import Any

from segvit.model import SegViT


def parameter_groups(
    model: SegViT, learning_rate: float, weight_decay: float, decoder_lr_multiplier: float = 10.0
) -> list[dict[str, Any]]:
    """Groups for AdamW: backbone, backbone norms without weight decay, decoder at a higher rate.

    Frozen parameters are left out, and so is a group that would be empty.

    Args:
        model: The model, after any `freeze_blocks`.
        learning_rate: Of the backbone.
        weight_decay: Of all but the backbone's norms; the decoder's norms are decayed.
        decoder_lr_multiplier: The decoder's learning rate over the backbone's.

    Returns:
        Dicts with ``name``, ``params``, ``lr`` and ``weight_decay``.
    """
    backbone = [(name, parameter) for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    decoder_lr = learning_rate * decoder_lr_multiplier
    groups = [
        ("backbone", [p for name, p in backbone if not is_norm(name)], learning_rate, weight_decay),
        ("backbone_norms", [p for name, p in backbone if is_norm(name)], learning_rate, 0.0),
        ("decoder", [p for p in model.decoder.parameters() if p.requires_grad], decoder_lr, weight_decay),
    ]
    keys = ("name", "params", "lr", "weight_decay")
    return [dict(zip(keys, group, strict=True)) for group in groups if group[1]]


def is_norm(parameter_name: str) -> bool:
    """Whether a backbone parameter belongs to a normalisation (timm: norm1, q_norm, norm_pre, ...)."""
    return any("norm" in module for module in parameter_name.split(".")[:-1])
