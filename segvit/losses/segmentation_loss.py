"""SegViT's loss (arXiv 2210.05844, section 3.4) as a weighted sum of terms: of classes, of masks, of pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segvit.decoders import DECODERS
from segvit.inference.scores import semantic_scores
from segvit.labels import check_ignore_index, check_labels
from segvit.losses import LOSS_TERMS
from segvit.losses.mask_terms import CompareMasks, MaskTerms, compare_masks
from segvit.losses.term import LossTerm
from segvit.output import SegmentationOutput, at_least_float32, full_precision, resize_to_image

# B batch, N classes, H W pixels

NO_OBJECT_WEIGHT = 0.1
# Added to semantic scores before their logarithm, which zero has not.
LEAST_SCORE = 1e-6
PUBLISHED_WEIGHTS: Mapping[str, float] = {
    name: LOSS_TERMS.get(name).default_weight for name in ("class", "focal", "dice")
}
"""The weights of the published models, by term."""


class LossNormalizer(NamedTuple):
    """What the loss terms are divided by; scalars that can be summed over processes and micro-batches."""

    class_weight_sum: Tensor
    """Sum of the class targets' weights over all queries of all images."""
    num_masks: Tensor
    """Number of present (image, class) pairs."""
    num_pixels: Tensor
    """Number of labelled pixels."""


class LossTargets(NamedTuple):
    """What labels ask of every prediction of an image."""

    labels: Tensor
    """(B, H, W), int64."""
    present: Tensor
    """(B, N) booleans: which classes the images show."""
    image: Tensor
    """(P,), of each present (image, class) pair."""
    class_index: Tensor
    """(P,), likewise."""


class SegmentationLoss(nn.Module):
    """Weighted terms of the final prediction and of every auxiliary one.

    Query n is matched to class n. Its class target is n where the image shows class n, else "no object"
    (weight 0.1). Masks are compared for present classes only, at the label's resolution.

    Args:
        num_classes: Number of classes N.
        weights: Weight by name of a term in `segvit.losses.LOSS_TERMS`; a term of weight 0 is not computed.
            None: the published ones.
        ignore_index: Label of pixels without a class.
        count_ignored_as_background: Whether ignored pixels count as "not this class" in the mask terms, as in
            the published formulation, or are left out of them.
        label_smoothing: Share of the targets of terms of classes and of cross-entropies that goes to all classes
            alike (arXiv 1512.00567).

    Raises:
        ValueError: An unknown term, weights that break a rule, smoothing outside [0, 1), or an ignore index that is a
            class.
    """

    def __init__(
        self,
        num_classes: int,
        weights: Mapping[str, float] | None = None,
        *,
        ignore_index: int = 255,
        count_ignored_as_background: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        weights = PUBLISHED_WEIGHTS if weights is None else weights
        if problems := loss_problems(weights):
            raise ValueError("; ".join(problems))
        check_ignore_index(num_classes, ignore_index)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        self.terms = {name: LOSS_TERMS.get(name) for name in self.weights}
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.count_ignored_as_background = count_ignored_as_background
        self.compare_masks: CompareMasks = compare_masks

    def forward(
        self,
        output: SegmentationOutput,
        labels: Tensor | LossTargets,
        normalizer: LossNormalizer | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms and their sum.

        For a batch in W equal shares, processes or accumulated micro-batches, pass the sum of all shares'
        normalizers divided by W: the mean of the shares' losses is then exactly the loss of the whole batch.

        Args:
            output: The model's output for B images.
            labels: (B, H, W) class indices or the ignore index, of the images' size; or their `targets`, with which
                nothing waits for a GPU.
            normalizer: What to divide by; this batch's own by default.

        Returns:
            Every term by name, such as ``class``, ``focal`` and ``dice``, those of the auxiliary predictions as
            ``auxiliary.0.class``, ..., and ``total``: scalars in float32 up.

        Raises:
            ValueError: Labels of another size than the images, or that are no class; or an output without masks,
                of a linear head, for terms that compare masks or classes.
        """
        targets = self.targets(labels)
        if tuple(targets.labels.shape[-2:]) != tuple(output.image_size):
            raise ValueError(
                f"labels are {tuple(targets.labels.shape[-2:])} pixels, the images {tuple(output.image_size)}"
            )
        normalizer = self.normalizer(targets) if normalizer is None else normalizer
        terms: dict[str, Tensor] = {}
        with full_precision(output.mask_logits):
            for prefix, prediction in named_predictions(output):
                values = self._terms(prediction, targets, normalizer)
                terms |= {prefix + name: self.weights[name] * values[name] for name in self.weights}
        return terms | {"total": torch.stack(list(terms.values())).sum()}

    def targets(self, labels: Tensor | LossTargets) -> LossTargets:
        """What labels (B, H, W) ask of predictions; waits for what the current stream of their device has to do.

        Raises:
            ValueError: A label that is neither a class nor the ignore index.
        """
        if isinstance(labels, LossTargets):
            return labels
        labels = labels.long()
        present = self.present_classes(labels)
        return LossTargets(labels, present, *present.nonzero(as_tuple=True))

    def normalizer(self, labels: Tensor | LossTargets) -> LossNormalizer:
        """The normalizer of labels (B, H, W) or of their targets, without any prediction.

        Raises:
            ValueError: A label that is neither a class nor the ignore index.
        """
        targets = self.targets(labels)
        # Float64, so that sums over shares of a batch in any order are the whole batch's sum.
        return LossNormalizer(
            query_weights(targets.present, torch.float64).sum(),
            targets.present.sum(dtype=torch.float64),
            (targets.labels != self.ignore_index).sum(dtype=torch.float64),
        )

    def present_classes(self, labels: Tensor) -> Tensor:
        """(B, N) booleans: which classes the labels (B, H, W) show; ValueError for a label that is none."""
        # Of 8 bits, -1 and 65535 would both be taken for 255.
        labels = labels.long()
        check_labels(labels, self.num_classes, self.ignore_index)
        flat = labels.flatten(1)
        seen = torch.zeros(len(flat), self.num_classes + 1, dtype=torch.bool, device=labels.device)
        index = torch.where(flat == self.ignore_index, self.num_classes, flat)
        return seen.scatter_(1, index, True)[:, : self.num_classes]

    def _terms(
        self, prediction: SegmentationOutput, targets: LossTargets, normalizer: LossNormalizer
    ) -> dict[str, Tensor]:
        groups = {"classes": self._class_sums, "masks": self._mask_sums, "pixels": self._pixel_sums}
        divisors = dict(zip(groups, normalizer, strict=True))
        values: dict[str, Tensor] = {}
        for compares, sums in groups.items():
            terms = {name: term for name, term in self.terms.items() if term.compares == compares}
            if not terms:
                continue
            if compares != "pixels" and prediction.class_logits is None:
                raise ValueError(f"loss term {', '.join(terms)} compares {compares}, {WITHOUT_MASKS}")
            # The sums are zero when the count is; shares of a batch may have a count below one.
            divisor = torch.where(divisors[compares] > 0, divisors[compares], 1)
            values |= {
                name: total / divisor.to(total.dtype)
                for name, total in zip(terms, sums(tuple(terms.values()), prediction, targets), strict=True)
            }
        return values

    def _class_sums(
        self, terms: tuple[LossTerm, ...], prediction: SegmentationOutput, targets: LossTargets
    ) -> list[Tensor]:
        assert prediction.class_logits is not None
        class_logits, present = at_least_float32(prediction.class_logits), targets.present
        classes = torch.where(present, torch.arange(self.num_classes, device=present.device), self.num_classes)
        weights = query_weights(present, class_logits.dtype)
        return [(term.function(class_logits, classes, **self._smoothing(term)) * weights).sum() for term in terms]

    def _mask_sums(
        self, terms: tuple[LossTerm, ...], prediction: SegmentationOutput, targets: LossTargets
    ) -> list[Tensor]:
        labels, _, image, class_index = targets
        mask_logits = at_least_float32(prediction.mask_logits)
        if not len(image):
            return [mask_logits.sum() * 0] * len(terms)
        ignore_index = None if self.count_ignored_as_background else self.ignore_index
        masks = mask_logits[image, class_index]
        losses = MaskTerms.apply(
            masks, labels, image, class_index, prediction.padded_size, ignore_index, terms, self.compare_masks
        )
        return [loss.sum() for loss in losses]

    def _pixel_sums(
        self, terms: tuple[LossTerm, ...], prediction: SegmentationOutput, targets: LossTargets
    ) -> list[Tensor]:
        logits = pixel_logits(prediction)
        ignored = targets.labels == self.ignore_index
        known = targets.labels.masked_fill(ignored, 0)
        losses = []
        for term in terms:
            counted = {"counted": ~ignored} if term.counts_pixels else {}
            losses.append(term.function(logits, known, **counted, **self._smoothing(term)))
        return [loss.masked_fill(ignored, 0.0).sum() for loss in losses]

    def _smoothing(self, term: LossTerm) -> dict[str, float]:
        return {"label_smoothing": self.label_smoothing} if term.smooths else {}


WITHOUT_MASKS = "which a structure without masks has none of; use terms that compare pixels, such as cross_entropy"


def loss_problems(weights: Mapping[str, float], structure: str | None = None) -> list[str]:
    """Everything that keeps the weights by term from being a loss, of the structure where one is named."""
    problems, has_masks = [], structure is None or DECODERS.get(structure).has_masks
    compared = set()
    for name, weight in weights.items():
        try:
            term = LOSS_TERMS.get(name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            problems.append(f"weight of loss term {name} must be a number >= 0, got {weight!r}; 0 leaves it out")
        elif weight and term.compares != "pixels" and not has_masks:
            problems.append(f"structure {structure}: loss term {name} compares {term.compares}, {WITHOUT_MASKS}")
        elif weight:
            compared.add(term.compares)
    if structure is not None and has_masks and compared in ({"masks"}, {"classes"}):
        [trained] = compared
        problems.append(
            f"structure {structure}: the loss has terms of {trained} alone, {dict(weights)}; name terms of classes and "
            "of masks, as class, focal and dice, for both are learned (a variant's loss has no others than it names)"
        )
    if not any(isinstance(weight, int | float) and weight > 0 for weight in weights.values()):
        problems.append(f"the loss has no term of weight > 0, got {dict(weights)}; name one")
    return problems


def pixel_logits(output: SegmentationOutput) -> Tensor:
    """(B, N, H, W): class logits at the image's size, a linear head's, or the logarithm of ATM's semantic scores.

    Their softmax is the scores' share of their sum. Scores that were logits themselves could not tell classes apart,
    for they lie between 0 and 1.
    """
    if output.class_logits is None:
        return resize_to_image(at_least_float32(output.mask_logits), output)
    return (semantic_scores(output, output.image_size) + LEAST_SCORE).log()


def query_weights(present: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each query's class target, (B, N): 1 for a present class, 0.1 for "no object"."""
    weights = torch.full(present.shape, NO_OBJECT_WEIGHT, dtype=dtype, device=present.device)
    return weights.masked_fill_(present, 1.0)


def named_predictions(output: SegmentationOutput) -> list[tuple[str, SegmentationOutput]]:
    """The final prediction under an empty prefix, then ``auxiliary.0.``, ``auxiliary.1.``, ..."""
    return [("", output), *((f"auxiliary.{index}.", item) for index, item in enumerate(output.auxiliary))]
