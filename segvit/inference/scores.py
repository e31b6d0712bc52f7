"""Semantic scores: class probability times mask probability, summed over queries (SegViT, section 3.2).

All scores of an image at once take N floats a pixel. `ScoreMap` gives those of some rows instead, which is
all that a label map needs: memory stays bounded, and a few rows at a time stay in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.output import SegmentationOutput, at_least_float32, full_precision, resize_to_image

# B batch, N classes, H W image pixels, h w mask grid. Score rows are (rows, W, N): classes last, so that the
# product over queries, the bilinear resize and the argmax all run along contiguous memory.

CACHED_ELEMENTS = 400_000  # of a float map (rows, W, N) that stays in a CPU's cache between operations
# Columns of a product for which its kernel has no remainder: of 11 classes it takes a quarter of the time.
WHOLE_COLUMNS = 16
DEVICE_ELEMENTS = 32_000_000  # on other devices few large kernels are fastest: 128 MB in float32


def semantic_scores(output: SegmentationOutput, size: tuple[int, int]) -> Tensor:
    """Class scores of every pixel: sum over queries of class probability times mask probability.

    Masks are brought to the image's own size first; scores are resized bilinearly to another `size`. Of a
    linear head, whose masks are class logits, the scores are their softmax over classes.

    Args:
        output: The model's output for B images.
        size: (H, W) of the scores in pixels.

    Returns:
        (B, N, H, W) in float32 or more.
    """
    with full_precision(output.mask_logits):
        masks = resize_to_image(at_least_float32(output.mask_logits), output)
        classes = class_probabilities(output)
        scores = masks.softmax(1) if classes is None else torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid())
        if size == output.image_size:
            return scores
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def semantic_labels(output: SegmentationOutput) -> Tensor:
    """The argmax of `semantic_scores` at the image's own size, (B, H, W) int64, a few rows at a time.

    Of a linear head it is the argmax of its resized logits.
    """
    num_images, num_classes = output.mask_logits.shape[:2]
    device = output.mask_logits.device
    height, width = output.image_size
    labels = torch.empty(num_images, height, width, dtype=torch.int64, device=device)
    with full_precision(output.mask_logits):
        for image in range(num_images):
            scores = ScoreMap.of(output, image)
            for top, bottom in bands(0, height, chunk_rows(width, num_classes, device)):
                rows = scores.resized_logits(top, bottom) if scores.classes is None else scores.rows(top, bottom)
                # Of equal ones the first, as argmax, but faster.
                labels[image, top:bottom] = rows.max(-1).indices
    return labels


def class_probabilities(output: SegmentationOutput) -> Tensor | None:
    """(B, N, N): each query's probabilities of the classes, "no object" left out; None for a linear head."""
    if output.class_logits is None:
        return None
    return at_least_float32(output.class_logits).softmax(-1)[..., :-1]


@dataclass(frozen=True, slots=True)
class ScoreMap:
    """One image's semantic scores, computed row by row on request; holds only the prediction itself."""

    mask_logits: Tensor
    """(h, w, N), in the type the model gave."""
    classes: Tensor | None
    """(N, N or more) probabilities, query by class, then columns of zeros; None: the masks are class logits."""
    size: tuple[int, int]
    """(H, W) in pixels."""
    padded_size: tuple[int, int]
    """(height, width) in pixels that the mask grid covers."""

    @classmethod
    def of(cls, output: SegmentationOutput, image: int) -> ScoreMap:
        """The scores of one image of a batch; keeps nothing else of the output alive."""
        classes = class_probabilities(output)
        return cls(
            output.mask_logits[image].permute(1, 2, 0).clone(memory_format=torch.contiguous_format),
            None if classes is None else F.pad(classes[image], (0, -classes.shape[2] % WHOLE_COLUMNS)),
            output.image_size,
            output.padded_size,
        )

    def rows(self, top: int, bottom: int) -> Tensor:
        """Scores (bottom - top, W, N) of rows `top` to `bottom`, in float32 or more."""
        logits = self.resized_logits(top, bottom)
        if self.classes is None:
            return logits.softmax(-1)
        return (logits.sigmoid() @ self.classes)[..., : logits.shape[-1]]

    def resized_logits(self, top: int, bottom: int) -> Tensor:
        """Mask logits (bottom - top, W, N) at the pixels of rows `top` to `bottom`."""
        logits = resize_rows(self.mask_logits, 0, self.mask_logits.shape[0], self.padded_size, top, bottom)
        return logits[:, : self.size[1]]


def resize_rows(rows: Tensor, first: int, height: int, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Some rows of a bilinear resize (align_corners false), from the rows of the source that they need.

    Args:
        rows: (r, w, N): rows `first` to `first` + r of the source; they cover `source_rows`.
        first: Index of the first of them.
        height: Rows of the whole source.
        size: (height, width) of the whole result.
        top: First row wanted.
        bottom: End of the rows wanted.

    Returns:
        (bottom - top, width, N) in float32 or more.
    """
    if size[0] != height:
        # On the rows' own device: a GPU would be waited for at every band.
        above, below, weight = row_neighbours(height, size[0], top, bottom, rows.device)
        upper, lower = (at_least_float32(rows[index - first]) for index in (above, below))
        rows = torch.lerp(upper, lower, weight.to(upper)[:, None, None])
    else:
        rows = at_least_float32(rows[top - first : bottom - first])
    if size[1] == rows.shape[1]:
        return rows
    # As (1, N, r, w) in channels-last memory, so that all classes of a pixel are interpolated in one sweep.
    images = rows[None].permute(0, 3, 1, 2)
    images = F.interpolate(images, size=(bottom - top, size[1]), mode="bilinear", align_corners=False)
    return images[0].permute(1, 2, 0)


def source_rows(height: int, resized_height: int, top: int, bottom: int) -> tuple[int, int]:
    """First and end of the source rows from which rows `top` to `bottom` of a resize are made."""
    if height == resized_height:
        return top, bottom
    above, below, _ = row_neighbours(height, resized_height, top, bottom, torch.device("cpu"))
    return int(above[0]), int(below[-1]) + 1


def row_neighbours(
    height: int, resized_height: int, top: int, bottom: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a bilinear resize: the source rows above and below, and the weight of the lower one."""
    centre = torch.arange(top, bottom, dtype=torch.float64, device=device) + 0.5
    position = (centre * (height / resized_height) - 0.5).clamp_(min=0)
    above = position.long()
    below = (above + 1).clamp_(max=height - 1)
    return above, below, position - above


def bands(top: int, bottom: int, num_rows: int) -> list[tuple[int, int]]:
    """Rows `top` to `bottom` cut into bands of at most `num_rows`, as (first, end)."""
    return [(first, min(first + num_rows, bottom)) for first in range(top, bottom, num_rows)]


def chunk_rows(width: int, num_classes: int, device: torch.device) -> int:
    """Rows of scores to compute at once."""
    elements = CACHED_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
    return max(1, elements // (width * num_classes))
