"""What the gate asks of a candidate."""

from __future__ import annotations

from typing import Literal

from pipeline.config.section import Fraction, Positive, PositiveFloat, Section


class PromotionPolicy(Section):
    """What a candidate must hold to become champion.

    `unmeasured_classes`: `refuse` a candidate of whose classes some have no labelled pixel in the data that it was
    scored on, so that its mIoU says nothing of them; or `allow` it.
    """

    min_miou: Fraction = 0.0
    max_regression: Fraction = 0.0
    protected_classes: tuple[str, ...] = ()
    max_class_regression: Fraction = 0.05
    unmeasured_classes: Literal["refuse", "allow"] = "refuse"
    max_gflops: PositiveFloat | None = None
    max_parameters: Positive | None = None
    max_latency_ms: PositiveFloat | None = None
