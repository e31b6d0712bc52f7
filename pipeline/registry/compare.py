"""Two registered versions against each other: overall, by class, image by image."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.evaluation.bootstrap import Interval, difference_interval
from pipeline.evaluation.per_image import read_counts
from pipeline.records import Evaluation, ModelVersion, Record
from pipeline.registry import store
from pipeline.registry.gate import scoring_differences
from pipeline.registry.rescoring import comparable_scores
from pipeline.workflow.tracking import Tracking

NUM_EXAMPLES = 4
ROUNDING = 1e-12


class ClassDifference(Record):
    """A class's IoU in both versions, and second minus first; None where it does not occur in one."""

    name: str
    first: float | None
    second: float | None
    difference: float | None


class ImageDifference(Record):
    """One image's mIoU, over the classes in its label or prediction, in both versions, and second minus first."""

    key: str
    first: float
    second: float
    difference: float


class Comparison(Record):
    """What the second version does better or worse than the first on the same images.

    Attributes:
        first, second: each with the evaluation that is compared, which may be one made after it was registered.
        scored_on: of the two, the version whose data it is.
        difference: mIoU of the second minus that of the first.
        interval: of the difference, over resamples of the images.
        classes: in the data's order.
        wins, losses, ties: images that the second scores higher, lower, the same.
        gains, drops: the images with the largest differences, the largest first.
    """

    name: str
    first: ModelVersion
    second: ModelVersion
    scored_on: int
    difference: float
    interval: Interval
    classes: tuple[ClassDifference, ...]
    wins: int
    losses: int
    ties: int
    gains: tuple[ImageDifference, ...]
    drops: tuple[ImageDifference, ...]


def compare_versions(tracking: Tracking, name: str, first: int, second: int) -> Comparison:
    """Compare two versions of a registered model.

    Raises UserError for versions that do not exist or are the same, that were not scored alike, and for
    evaluations whose counts of single images are gone.
    """
    if first == second:
        raise UserError(f"version {first} is named twice; name two versions to compare")
    named = (store.get_version(tracking, name, version) for version in (first, second))
    ours, theirs, scored_on = _scored_alike(tracking, *named)
    before, after = (read_counts(version.evaluation) for version in (ours, theirs))
    if before.keys != after.keys:
        raise UserError(
            f"versions {first} and {second} of {name} were scored on {len(before.keys)} and {len(after.keys)} images "
            "that are not the same: not comparable; run the flow again"
        )
    gains, drops, tally = _image_differences(before.keys, before.image_mious(), after.image_mious())
    return Comparison(
        name=name,
        first=ours,
        second=theirs,
        scored_on=scored_on,
        difference=theirs.evaluation.miou - ours.evaluation.miou,
        interval=difference_interval(before, after),
        classes=_class_differences(ours.evaluation, theirs.evaluation),
        wins=tally[0],
        losses=tally[1],
        ties=tally[2],
        gains=gains,
        drops=drops,
    )


def _scored_alike(
    tracking: Tracking, first: ModelVersion, second: ModelVersion
) -> tuple[ModelVersion, ModelVersion, int]:
    """Both with evaluations that are alike, of which one is registered, and whose that is, rather the second's."""
    ours = comparable_scores(tracking, first, second.evaluation)
    if ours is not None:
        return first.model_copy(update={"evaluation": ours.evaluation}), second, second.version
    theirs = comparable_scores(tracking, second, first.evaluation)
    if theirs is not None:
        return first, second.model_copy(update={"evaluation": theirs.evaluation}), first.version
    differences = scoring_differences(first.evaluation, second.evaluation, f"version {second.version}")
    alike = f"score it like the other: segvit evaluate {first.model_uri} {second.model_uri}"
    same_classes = first.evaluation.class_names == second.evaluation.class_names
    raise UserError(
        f"version {first.version} was scored {'; '.join(differences)}: not comparable; "
        f"{alike if same_classes else 'name two versions of the same classes'}"
    )


def _class_differences(first: Evaluation, second: Evaluation) -> tuple[ClassDifference, ...]:
    rows = zip(first.class_names, first.per_class_iou, second.per_class_iou, strict=True)
    return tuple(
        ClassDifference(name=name, first=a, second=b, difference=None if a is None or b is None else b - a)
        for name, a, b in rows
    )


def _image_differences(
    keys: tuple[str, ...], first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[tuple[ImageDifference, ...], tuple[ImageDifference, ...], tuple[int, int, int]]:
    """The largest gains and drops, and how many images won, lost and tied; images without labels count as ties."""
    images = [
        ImageDifference(key=key, first=float(a), second=float(b), difference=float(b - a))
        for key, a, b in zip(keys, first, second, strict=True)
        if not math.isnan(a) and not math.isnan(b)
    ]
    ranked = sorted(images, key=lambda image: (-image.difference, image.key))
    gains = [image for image in ranked if image.difference > ROUNDING]
    drops = [image for image in reversed(ranked) if image.difference < -ROUNDING]
    tally = len(gains), len(drops), len(keys) - len(gains) - len(drops)
    return tuple(gains[:NUM_EXAMPLES]), tuple(drops[:NUM_EXAMPLES]), tally
