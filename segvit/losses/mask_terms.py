"""Focal and dice loss of masks at full resolution, and their gradient on the mask's own grid, in one sweep.

A mask is brought to full resolution, compared, and its gradient brought back to the small grid before the next
mask is looked at. So the maps of full resolution stay in the processor's cache, each costs one exponential and one
logarithm, and nothing of full resolution waits for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# P masks, H W pixels, h w mask grid

FOCAL_ALPHA = 0.25
CACHED_ELEMENTS = 1 << 18  # of one full-resolution map on a CPU: 1 MB in float32
QUEUED_ELEMENTS = 1 << 24  # of one map on a GPU, where few large kernels beat many small ones


class MaskTerms(torch.autograd.Function):
    """Sigmoid focal loss (mean over pixels) and dice loss of each mask (SegViT, arXiv 2210.05844, section 3.4)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        image: Tensor,
        class_index: Tensor,
        padded_size: tuple[int, int],
        ignore_index: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Focal and dice loss, each (P,).

        Args:
            ctx: What autograd carries to `backward`.
            logits: (P, h, w) before the sigmoid, float32 or more.
            labels: (B, H, W) class indices.
            image: (P,) index into `labels` of each mask.
            class_index: (P,) class whose pixels each mask should cover.
            padded_size: (height, width) in pixels that the mask grid covers.
            ignore_index: Label of pixels that are left out; None: none are.
        """
        num_masks, *grid = logits.shape
        rows, columns = (
            bilinear_matrix(cells, covered, kept, logits)
            for cells, covered, kept in zip(grid, padded_size, labels.shape[1:], strict=True)
        )
        focal, dice = logits.new_empty(num_masks), logits.new_empty(num_masks)
        with_gradient = ctx.needs_input_grad[0]
        gradients = logits.new_empty(2 if with_gradient else 0, *logits.shape)
        limit = CACHED_ELEMENTS if logits.device.type == "cpu" else QUEUED_ELEMENTS
        step = max(1, limit // labels[0].numel())
        for start in range(0, num_masks, step):
            some = slice(start, start + step)
            masks = rows @ logits[some] @ columns.T
            pixels = labels[image[some]]
            positive = torch.eq(pixels, class_index[some, None, None], out=torch.empty_like(masks))
            ignored = None if ignore_index is None else pixels == ignore_index
            focal[some], dice[some], *maps = compare(masks, positive, ignored, with_gradient)
            for gradient, full in zip(gradients, maps, strict=True):
                gradient[some] = rows.T @ full @ columns
        ctx.save_for_backward(gradients)
        return focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, focal_grad: Tensor, dice_grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient with respect to the logits."""
        focal, dice = ctx.saved_tensors[0]
        grad = focal * focal_grad[:, None, None] + dice * dice_grad[:, None, None]
        return grad, None, None, None, None, None


def compare(masks: Tensor, positive: Tensor, ignored: Tensor | None, with_gradient: bool) -> tuple[Tensor, ...]:
    """Focal and dice loss (P,) of mask logits (P, H, W) and, if asked for, their gradients (P, H, W).

    With s = -1 on the mask and 1 off it: e = sigmoid(s x) is the probability given to the wrong side, and the
    cross-entropy is softplus(s x).

    Args:
        masks: Logits; overwritten.
        positive: Ones where the mask should be, zeros elsewhere, in the logits' type; overwritten.
        ignored: Booleans, the pixels that are left out; None: none.
        with_gradient: Whether to return the gradients too.
    """
    area = positive.sum((1, 2))
    sign = positive.mul_(-2.0).add_(1.0)
    signed = masks.mul_(sign)
    wrong = torch.sigmoid(signed)
    entropy = softplus(signed)
    if ignored is not None:
        wrong.masked_fill_(ignored, 0.0)
    count = masks[0].numel() if ignored is None else (~ignored).sum((1, 2)).clamp_(min=1).to(masks.dtype)
    wrong_squared = wrong.square()
    # alpha on the mask and 1 - alpha off it is 1/2 + s (1/2 - alpha).
    tilt = 0.5 - FOCAL_ALPHA
    weighted = wrong_squared * entropy
    focal = (0.5 * weighted.sum((1, 2)) + tilt * weighted.mul_(sign).sum((1, 2))) / count
    # Foreground probability is 1 - e on the mask and e off it.
    signed_wrong = torch.mul(wrong, sign, out=weighted).sum((1, 2))
    overlap = area - (wrong.sum((1, 2)) - signed_wrong) / 2
    total = signed_wrong + 2 * area
    dice = 1 - (2 * overlap + 1) / (total + 1)
    if not with_gradient:
        return focal, dice
    # d focal / dx = alpha s e^2 (2 (1 - e) softplus + e); alpha s is tilt + s / 2.
    focal_grad = entropy.addcmul_(entropy, wrong, value=-1.0).mul_(2.0).add_(wrong).mul_(wrong_squared)
    focal_grad.mul_(torch.mul(sign, 0.5, out=weighted).add_(tilt)).div_(torch.as_tensor(count)[..., None, None])
    # d dice / dx = e (1 - e) (a - 2 t / (total + 1)), t = (1 - s) / 2.
    slope = wrong.sub_(wrong_squared)
    inverse = 1 / (total + 1)
    everywhere = (2 * overlap + 1) * inverse.square() - inverse
    dice_grad = slope.mul_(sign.mul_(inverse[:, None, None]).add_(everywhere[:, None, None]))
    return focal, dice, focal_grad, dice_grad


def softplus(values: Tensor) -> Tensor:
    """log(1 + exp(x)), exact for any x; overwrites x.

    torch's own takes three times as long, for its log1p; here what 1 + u rounds away is added to the logarithm.
    """
    small = values.abs().neg_().exp_()
    rounded = small + 1.0
    small.sub_(rounded - 1.0)
    return values.clamp_(min=0.0).add_(rounded.log_()).add_(small)


def bilinear_matrix(cells: int, covered: int, kept: int, like: Tensor) -> Tensor:
    """Bilinear resizing (align_corners false) of `cells` values to `covered` pixels, cut to the first `kept`.

    Returns:
        (kept, cells), with which a matrix product resizes; its transpose carries gradients back.
    """
    position = (torch.arange(kept, dtype=like.dtype, device=like.device) + 0.5) * (cells / covered) - 0.5
    position.clamp_(min=0)
    below = position.long()
    above = (below + 1).clamp_(max=cells - 1)
    fraction = (position - below)[:, None]
    matrix = like.new_zeros(kept, cells)
    matrix.scatter_add_(1, below[:, None], 1 - fraction)
    return matrix.scatter_add_(1, above[:, None], fraction)
