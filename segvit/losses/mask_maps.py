"""Maps of full resolution that several loss terms of masks are made of, each computed once."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

# P masks, H W pixels


class MaskMaps:
    """What fused terms share of some masks; they read it and write to `scratch` alone.

    With s = -1 on the mask and 1 off it: e = sigmoid(s x) is the probability given to the wrong side, and the
    cross-entropy is softplus(s x).

    Args:
        logits: (P, H, W) before the sigmoid; overwritten.
        target: Ones where the mask should be, zeros elsewhere, in the logits' type; overwritten.
        ignored: Booleans, the pixels that are left out; None: none. The target is zero there.
    """

    def __init__(self, logits: Tensor, target: Tensor, ignored: Tensor | None) -> None:
        self.area = target.sum((1, 2))
        """(P,): pixels where the mask should be."""
        self.count: Tensor | int = logits[0].numel()
        """Pixels that count, of all masks or (P,) of each; at least 1."""
        self.sign = target.mul_(-2.0).add_(1.0)
        """s (P, H, W)."""
        self._signed = logits.mul_(self.sign)
        self.wrong = torch.sigmoid(self._signed)
        """e (P, H, W), zero for ignored pixels."""
        if ignored is not None:
            self.wrong.masked_fill_(ignored, 0.0)
            self.count = (~ignored).sum((1, 2)).clamp_(min=1).to(logits.dtype)

    @cached_property
    def entropy(self) -> Tensor:
        """softplus(s x) (P, H, W), also of ignored pixels."""
        return softplus(self._signed)

    @cached_property
    def wrong_squared(self) -> Tensor:
        """e^2 (P, H, W)."""
        return self.wrong.square()

    @cached_property
    def scratch(self) -> tuple[Tensor, Tensor]:
        """Two maps (P, H, W) of any content for a term's own use; a returned gradient may lie in one."""
        return torch.empty_like(self.wrong), torch.empty_like(self.wrong)


def softplus(values: Tensor) -> Tensor:
    """log(1 + exp(x)), exact for any x; overwrites x.

    torch's own takes three times as long, for its log1p; here what 1 + u rounds away is added to the logarithm.
    """
    small = values.abs().neg_().exp_()
    rounded = small + 1.0
    small.sub_(rounded - 1.0)
    return values.clamp_(min=0.0).add_(rounded.log_()).add_(small)
