"""Objects as masks of the whole image, to compare them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.rasterise import Canvas, Patch


def on_image(patch: Patch, height: int, width: int) -> NDArray[np.bool_]:
    canvas = Canvas(np.zeros((height, width), np.uint8))
    canvas.paint([patch], 1)
    return np.asarray(canvas.label > 0)
