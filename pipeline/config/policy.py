"""What the gate asks of a candidate."""

from __future__ import annotations

from pipeline.config.section import Fraction, Positive, PositiveFloat, Section


class PromotionPolicy(Section):
    """What a candidate must hold to become champion."""

    min_miou: Fraction = 0.0
    max_regression: Fraction = 0.0
    protected_classes: tuple[str, ...] = ()
    max_class_regression: Fraction = 0.05
    max_gflops: PositiveFloat | None = None
    max_parameters: Positive | None = None
    max_latency_ms: PositiveFloat | None = None
