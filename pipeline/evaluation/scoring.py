"""Predictions over a split against its labels: the counting that validation during training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import segvit
from pipeline.shards.loader import EvalSample
from segvit.compilation import warm_up
from segvit.inference.precision import in_precision
from segvit.inference.predict import shares_batches
from segvit.metrics import ConfusionMatrix

WHOLE: Mapping[str, Any] = MappingProxyType({})


def predictions(
    model: segvit.SegViT,
    samples: Iterable[EvalSample],
    device: torch.device,
    inference: Mapping[str, Any] = WHOLE,
    batch_size: int = 8,
) -> Iterator[tuple[EvalSample, Tensor]]:
    """Each sample with its predicted label map (H, W) int64 on `device`.

    `inference` holds keyword arguments of segvit.predict; with the image taken whole, consecutive equal sizes share a
    batch.
    """
    if not shares_batches(inference):
        yield from ((sample, segvit.predict(model, sample.image, **inference)) for sample in samples)
        return
    group: list[EvalSample] = []

    def flush() -> Iterator[tuple[EvalSample, Tensor]]:
        if group:
            images = torch.stack([sample.image for sample in group]).to(device, non_blocking=True)
            yield from zip(group, segvit.predict_batch(model, images, **inference), strict=True)
            group.clear()

    for sample in samples:
        if group and (sample.image.shape != group[0].image.shape or len(group) == batch_size):
            yield from flush()
        group.append(sample)
    yield from flush()


def confusion_of_split(
    model: segvit.SegViT,
    samples: Iterable[EvalSample],
    device: torch.device,
    visit: Callable[[EvalSample, Tensor], None] | None = None,
    inference: Mapping[str, Any] = WHOLE,
) -> ConfusionMatrix:
    """The confusion matrix of `model` over `samples`; `visit` sees every sample and its prediction."""
    confusion = ConfusionMatrix(model.num_classes)
    # Around all images, so that autocast lowers the weights once.
    with in_precision(model, inference.get("precision")):
        warm_up(model)
        for sample, predicted in predictions(model, samples, device, inference):
            confusion.update(predicted, sample.label.to(device))
            if visit is not None:
                visit(sample, predicted)
    return confusion
