"""Training in bf16 parameters: the optimizer keeps float32 master weights, a bf16 copy of them computes.

Micikevicius et al., arXiv 1710.03740, section 3.1; bf16 needs no scaling of the loss.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from segvit.model import SegViT


class MasterWeights:
    """A model whose parameters the optimizer changes in float32, and its copy in bf16 that runs forward and backward.

    Args:
        model: The masters, in float32, after `freeze_blocks`.

    Attributes:
        copy: Takes normalised images of any type.
    """

    def __init__(self, model: SegViT) -> None:
        self.copy = copy.deepcopy(model).bfloat16().train()
        self.copy.register_forward_pre_hook(_in_bf16)
        self._pairs = [
            (master, half)
            for master, half in zip(model.parameters(), self.copy.parameters(), strict=True)
            if master.requires_grad
        ]

    def take_gradients(self) -> None:
        """Add the copy's gradients to the masters', in float32, and free them."""
        for master, half in self._pairs:
            if half.grad is not None:
                gradient, half.grad = half.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def update_copy(self) -> None:
        """Round the masters into the copy, after the optimizer's step."""
        for master, half in self._pairs:
            half.copy_(master)


def _in_bf16(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].bfloat16(),)
