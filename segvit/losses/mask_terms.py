"""Loss terms of masks at full resolution, and their gradient on the mask's own grid, in one sweep.

A mask is brought to full resolution, compared, and its gradient brought back to the small grid before the next
mask is looked at. So the maps of full resolution stay in the processor's cache, terms with a fused function share
one exponential and one logarithm a pixel, and nothing of full resolution waits for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segvit.losses.mask_maps import NUM_BUFFERS, MaskMaps
from segvit.losses.term import LossTerm

# P masks, H W pixels, h w mask grid

CACHED_ELEMENTS = 1 << 18  # of one full-resolution map on a CPU: 1 MB in float32
QUEUED_ELEMENTS = 1 << 24  # of one map on a GPU, where few large kernels beat many small ones


CompareMasks = Callable[..., list[tuple[Tensor, Tensor | None]]]


class MaskTerms(torch.autograd.Function):
    """Each of some terms' loss of each mask."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        image: Tensor,
        class_index: Tensor,
        padded_size: tuple[int, int],
        ignore_index: int | None,
        terms: tuple[LossTerm, ...],
        compare: CompareMasks,
    ) -> tuple[Tensor, ...]:
        """The loss (P,) of every term, in their order.

        Args:
            ctx: What autograd carries to `backward`.
            logits: (P, h, w) before the sigmoid, float32 or more.
            labels: (B, H, W) class indices.
            image: (P,) index into `labels` of each mask.
            class_index: (P,) class whose pixels each mask should cover.
            padded_size: (height, width) in pixels that the mask grid covers.
            ignore_index: Label of pixels that are left out; None: none are.
            terms: Those that compare masks.
            compare: `compare_masks`, or its compiled form.
        """
        num_masks, *grid = logits.shape
        resizing = tuple(
            bilinear_matrix(cells, covered, kept, logits)
            for cells, covered, kept in zip(grid, padded_size, labels.shape[1:], strict=True)
        )
        losses = [logits.new_empty(num_masks) for _ in terms]
        with_gradient = ctx.needs_input_grad[0]
        gradients = logits.new_empty(len(terms) if with_gradient else 0, *logits.shape)
        limit = CACHED_ELEMENTS if logits.device.type == "cpu" else QUEUED_ELEMENTS
        step = max(1, limit // labels[0].numel())
        buffers = None
        if compare is compare_masks:
            buffers = logits.new_empty(2 + NUM_BUFFERS, min(step, num_masks), *labels.shape[1:])
        for start in range(0, num_masks, step):
            some = slice(start, start + step)
            found = compare(
                logits[some].detach(),
                labels,
                image[some],
                class_index[some],
                resizing,
                ignore_index,
                terms,
                with_gradient,
                buffers,
            )
            for index, (loss, gradient) in enumerate(found):
                losses[index][some] = loss
                if gradient is not None:
                    gradients[index, some] = gradient
        ctx.save_for_backward(gradients)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *loss_grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient with respect to the logits."""
        (gradients,) = ctx.saved_tensors
        parts = [gradient * loss_grad[:, None, None] for gradient, loss_grad in zip(gradients, loss_grads, strict=True)]
        return sum(parts[1:], parts[0]), None, None, None, None, None, None, None


def compare_masks(
    logits: Tensor,
    labels: Tensor,
    image: Tensor,
    class_index: Tensor,
    resizing: tuple[Tensor, ...],
    ignore_index: int | None,
    terms: tuple[LossTerm, ...],
    with_gradient: bool,
    buffers: Tensor | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Of every term, the loss (P,) of some masks (P, h, w) and, if asked for, its gradient (P, h, w).

    Args:
        logits: As in `MaskTerms.forward`, like all that follow.
        labels: Likewise.
        image: Likewise.
        class_index: Likewise.
        resizing: The `bilinear_matrix` of rows and of columns.
        ignore_index: Likewise.
        terms: Likewise.
        with_gradient: Whether gradients are wanted.
        buffers: (2 + NUM_BUFFERS, P or more, H, W) of any content, to work in; None: made.
    """
    rows, columns = resizing
    pixels = labels[image]
    ignored = None if ignore_index is None else pixels == ignore_index
    if buffers is None:
        masks, target, others = rows @ logits @ columns.T, (pixels == class_index[:, None, None]).to(logits.dtype), None
    else:
        masks, target, *others = buffers[:, : len(pixels)]
        torch.matmul(rows @ logits, columns.T, out=masks)
        torch.eq(pixels, class_index[:, None, None], out=target)
    maps: MaskMaps | None = None
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    # Fused terms share what the masks are overwritten with, so the others come first.
    for index in sorted(range(len(terms)), key=lambda index: terms[index].fused is not None):
        term = terms[index]
        if term.fused is None:
            loss, gradient = differentiate(term, masks, target, ignored, with_gradient)
        else:
            maps = MaskMaps(masks, target, ignored, others) if maps is None else maps
            loss, gradient = term.fused(maps, with_gradient)
        found[index] = loss, None if gradient is None or not with_gradient else rows.T @ gradient @ columns
    return [found[index] for index in range(len(terms))]


def differentiate(
    term: LossTerm, masks: Tensor, target: Tensor, ignored: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss (P,) of a term without a fused function and, if asked for, its gradient (P, H, W), by autograd.

    Raises:
        ValueError: The term's function gives something else than one loss a mask.
    """
    with torch.set_grad_enabled(with_gradient):
        logits = masks.detach().requires_grad_(with_gradient)
        loss = term.function(logits, target, None if ignored is None else ~ignored)
        if loss.shape != masks.shape[:1]:
            raise ValueError(
                f"loss term {term.name} gives shape {tuple(loss.shape)} for {len(masks)} masks; "
                f"return one loss a mask, ({len(masks)},)"
            )
        if not with_gradient:
            return loss, None
        return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


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
