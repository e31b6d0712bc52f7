"""A term of the loss: a name, a function, and what a search may make of its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from segvit.losses.mask_maps import MaskMaps

Compares = Literal["classes", "masks", "pixels"]

# B batch, N classes and queries, P masks, H W pixels


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One term, whose function is differentiable and gets float32 or more.

    What `function` takes and gives follows from what the term compares:

    - ``classes``: class logits (B, N, N + 1), last column "no object", and each query's target (B, N); the loss of
      every query, (B, N). The mean over queries, "no object" counting a tenth, is the term.
    - ``masks``: mask logits (P, H, W) of the classes that images show, the truth (P, H, W) as zeros and ones, and
      the pixels that count (P, H, W) as booleans, or None for all; the loss of every mask, (P,). The mean over masks
      is the term. The function sees some masks at a time and must not change what it is given.
    - ``pixels``: class logits (B, N, H, W), a linear head's or the logarithm of semantic scores, and labels (B, H, W);
      the loss of every pixel, (B, H, W). The mean over labelled pixels is the term; ignored ones are labelled 0.

    A function with `smooths` also takes a keyword ``label_smoothing``, the share of a target that goes to all classes
    alike; one with `counts_pixels` a keyword ``counted``, the labelled pixels (B, H, W) as booleans.
    """

    name: str
    compares: Compares
    function: Callable[..., Tensor]
    default_weight: float = 1.0
    search_range: tuple[float, float] = (0.3, 3.0)
    """Least and greatest weight that a search tries."""
    smooths: bool = False
    counts_pixels: bool = False
    fused: Callable[[MaskMaps, bool], tuple[Tensor, Tensor | None]] | None = None
    """For terms that compare masks: the same from maps that such terms share. Given whether the gradient is wanted;
    returns the loss of every mask (P,) and its gradient with respect to the mask's logits (P, H, W) or None."""
