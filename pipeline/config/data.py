"""Which raw data set, and how it becomes shards; lengths are pixels."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Fraction, Positive, Section
from pipeline.workflow.step import NotFingerprinted


class DigitsConfig(Section):
    """The embedded data set: scenes of real handwritten digits on textured ground."""

    num_train: Positive = 480
    num_val: Positive = 96
    image_size: Annotated[int, Field(ge=88)] = 112
    max_digits: Annotated[int, Field(ge=1, le=6)] = 3
    digit_size: tuple[Positive, Positive] = (44, 80)
    ink_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.35

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.digit_size
        if not 8 <= low <= high <= self.image_size:
            raise ValueError(
                f"digit_size {low}-{high} must rise, from 8 to at most image_size {self.image_size}; "
                "lower digit_size or raise image_size"
            )
        return self


class FolderConfig(Section):
    """A data set of one's own; all paths are below data.root.

    `classes`: names a line in the order of their ids, or JSON or YAML with names and, if wanted, palette, ids and
    ignore_ids (255 by default).
    `val_fraction`: share of the images that a hash of data.seed and their name draws for val; None: the lists
    `splits`/train.txt and `splits`/val.txt say.
    """

    images: str = "images"
    labels: str = "labels"
    classes: str = "classes.txt"
    splits: str = "splits"
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None


class DataConfig(Section):
    """Which raw data set, and how it becomes shards.

    `root`: the data set's folder, the .zip or .tar that holds it, or a folder with the publisher's archives; a
    local path or any fsspec URL.
    `on_bad_sample`: `fail` at the first sample that cannot be read or used, or whose image is there twice; or
    `quarantine` them, at most `max_quarantined_fraction` of all.
    `classes_without_pixels`: `refuse` data whose train or val shows no labelled pixel of a class, which nothing could
    learn or measure; or `allow` it. Left out, it is refused, but for the embedded digits, whose scenes are drawn.
    `grey_range`: of images with more than 8 bits a channel, the two values of the files that become 0 and 255; what is
    between them in proportion, what is outside as the nearer end. Left out, it is measured: from the lowest 0.1 to the
    highest 99.9 percentile of an image in train (0 and 65535 of 16 bits aside, which mark what was not measured).
    Shards hold 8 bits; the range is kept with the shards and with the model, which scales images to predict by it.
    `max_long_side`: scale larger images and their label maps down to it, pixels; left out, images stay as they are, and
    more than 67 million pixels are refused. With it, JPEG (baseline) and PNG may have up to 1 << 30.
    """

    dataset: str
    root: str | None = None
    seed: int = 0
    samples_per_shard: Positive = 128
    max_samples_per_split: Positive | None = None
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    max_quarantined_fraction: Annotated[Fraction, NotFingerprinted] = 0.01
    classes_without_pixels: Literal["refuse", "allow"] | None = None
    grey_range: tuple[float, float] | None = None
    max_long_side: Positive | None = None
    digits: DigitsConfig = DigitsConfig()
    folder: FolderConfig = FolderConfig()

    @model_validator(mode="after")
    def _range_rises(self) -> Self:
        if self.grey_range is not None and not -math.inf < self.grey_range[0] < self.grey_range[1] < math.inf:
            raise ValueError(
                f"grey_range {list(self.grey_range)} must be two values that rise, the one that becomes black first"
            )
        return self
