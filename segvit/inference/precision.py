"""The precision that a model predicts in."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from segvit.attention import MultiheadAttention
from segvit.bf16 import has_bf16
from segvit.model import SegViT

Precision = Literal["bf16"] | None
# Whose parameters autocast lowers at every call.
MATRIX_PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, MultiheadAttention)


def in_precision(model: SegViT, precision: Precision) -> torch.autocast:
    """A context in which the model runs in a precision of `predict`; raises ValueError for an unknown one."""
    if precision not in (None, "bf16"):
        raise ValueError(f"unknown precision {precision!r} of a prediction; use 'bf16', or None for the model's own")
    device = model.mean.device
    # Within an autocast of the caller's, None leaves that as it is.
    lowered = precision == "bf16" and has_bf16(device)
    enabled = lowered or torch.is_autocast_enabled(device.type)
    dtype = torch.bfloat16 if lowered else torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype, enabled=enabled)


def keep_for_precision(model: SegViT, precision: Precision) -> None:
    """Make a model one that is there to predict in that precision alone: nothing is cast at every prediction.

    For ``bf16`` the weights of matrix products, in place, become what autocast would make of them each time, so
    predictions are the same to the bit, and the model takes little more than half the memory. Where the device has no
    instructions for bf16, and for None, nothing is done.
    """
    if precision is None or not has_bf16(model.mean.device):
        return
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, MATRIX_PRODUCTS) else ():
            parameter.data = parameter.data.to(torch.bfloat16)
