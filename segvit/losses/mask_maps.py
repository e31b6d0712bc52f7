"""Maps of full resolution that several loss terms of masks are made of, each computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# P masks, H W pixels

NUM_BUFFERS = 4


class MaskMaps:
    """What fused terms share of some masks; they read it and write to `scratch` alone.

    With s = -1 on the mask and 1 off it: e = sigmoid(s x) is the probability given to the wrong side, and the
    cross-entropy is softplus(s x).

    Args:
        logits: (P, H, W) before the sigmoid; overwritten.
        target: Ones where the mask should be, zeros elsewhere, in the logits' type; overwritten.
        ignored: Booleans, the pixels that are left out; None: none. The target is zero there.
        buffers: (NUM_BUFFERS, P, H, W) of any content, for all maps; None: made. Giving the same to one `MaskMaps`
            after the other keeps them in the processor's cache.
    """

    def __init__(
        self, logits: Tensor, target: Tensor, ignored: Tensor | None, buffers: Sequence[Tensor] | None = None
    ) -> None:
        wrong, wrong_squared, *scratch = buffers or [torch.empty_like(logits) for _ in range(NUM_BUFFERS)]
        self._wrong_squared, self._is_squared = wrong_squared, False
        self._entropy: Tensor | None = None
        self.area = target.sum((1, 2))
        """(P,): pixels where the mask should be."""
        self.count = torch.full_like(self.area, logits[0].numel())
        """(P,): pixels that count, at least 1."""
        self.sign = target.mul_(-2.0).add_(1.0)
        """s (P, H, W)."""
        self._signed = logits.mul_(self.sign)
        self.wrong = torch.sigmoid(self._signed, out=wrong)
        """e (P, H, W), zero for ignored pixels."""
        if ignored is not None:
            self.wrong.masked_fill_(ignored, 0.0)
            self.count = (~ignored).sum((1, 2)).clamp_(min=1).to(logits.dtype)
        self.scratch = scratch
        """Two maps (P, H, W) for a term's own use, after it has asked for the others; a gradient may lie in one."""

    @property
    def entropy(self) -> Tensor:
        """softplus(s x) (P, H, W), also of ignored pixels."""
        # Of the logits, which it overwrites; functools.cached_property cannot be compiled.
        if self._entropy is None:
            self._entropy = softplus(self._signed, self.scratch[0])
        return self._entropy

    @property
    def wrong_squared(self) -> Tensor:
        """e^2 (P, H, W)."""
        if not self._is_squared:
            self._is_squared = True
            torch.square(self.wrong, out=self._wrong_squared)
        return self._wrong_squared


def softplus(values: Tensor, small: Tensor) -> Tensor:
    """log(1 + exp(x)), exact for any x; overwrites x, and `small` of its shape.

    torch's own takes three times as long, for its log1p; here what 1 + u rounds away is added to the logarithm.
    """
    torch.abs(values, out=small).neg_().exp_()
    rounded = small + 1.0
    small.sub_(rounded - 1.0)
    return values.clamp_(min=0.0).add_(rounded.log_()).add_(small)
