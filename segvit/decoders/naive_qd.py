"""Naive query-based downsampling (SegViT, arXiv 2210.05844, ablation of Shrunk): no upsampling after it."""

from __future__ import annotations

from dataclasses import dataclass

from segvit.decoders.shrinking import ShrinkingDecoder
from segvit.decoders.single import Single


@dataclass(frozen=True, kw_only=True)
class NaiveQD(Single, ShrinkingDecoder):
    """One ATM stage on the downsampled features."""
