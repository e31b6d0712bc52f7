from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from segvit.inference.predict import semantic_scores
from segvit.losses.segmentation_loss import LossNormalizer, SegmentationLoss
from segvit.model import SegViT

MakeModel = Callable[..., SegViT]


def cross_entropy() -> SegmentationLoss:
    return SegmentationLoss(4, {"cross_entropy": 1.0})


def some_labels(*shape: int) -> torch.Tensor:
    labels = torch.randint(0, 4, shape)
    labels[0, :5] = 255
    return labels


def test_cross_entropy__linear_head_equals_torch(make_model: MakeModel) -> None:
    output = make_model("linear", out_layers=(3,))(torch.randn(2, 3, 40, 64))
    labels = some_labels(2, 40, 64)
    logits = F.interpolate(output.mask_logits, size=(48, 64), mode="bilinear")[:, :, :40]
    terms = cross_entropy()(output, labels)
    assert terms["total"].item() == pytest.approx(F.cross_entropy(logits, labels, ignore_index=255).item(), rel=1e-5)
    assert set(terms) == {"cross_entropy", "total"}


def test_cross_entropy__of_semantic_scores(make_model: MakeModel) -> None:
    output = make_model("single", out_layers=None)(torch.randn(1, 3, 48, 64))
    labels = some_labels(1, 48, 64)
    terms = cross_entropy()(output, labels)
    for name, prediction in {"": output, "auxiliary.0.": output.auxiliary[0]}.items():
        scores = semantic_scores(prediction, (48, 64))
        expected = F.nll_loss((scores / scores.sum(1, keepdim=True)).log(), labels, ignore_index=255)
        torch.testing.assert_close(terms[f"{name}cross_entropy"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["total"], terms["cross_entropy"] + terms["auxiliary.0.cross_entropy"])


def test_normalizer__mean_of_shares_is_the_whole_batch(make_model: MakeModel) -> None:
    model, loss = make_model("linear", out_layers=(3,)), cross_entropy()
    images, labels = torch.randn(2, 3, 32, 32), some_labels(2, 32, 32)
    whole = loss(model(images), labels)["total"]
    shared = LossNormalizer(*(scalar / 2 for scalar in loss.normalizer(labels)))
    parts = [loss(model(images[i : i + 1]), labels[i : i + 1], shared)["total"] for i in range(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert loss.normalizer(labels).num_pixels.item() == 2 * 32 * 32 - 5 * 32


def test_cross_entropy__no_labelled_pixel_is_zero(make_model: MakeModel) -> None:
    output = make_model("linear", out_layers=(3,))(torch.randn(1, 3, 32, 32))
    assert cross_entropy()(output, torch.full((1, 32, 32), 255))["total"].item() == 0.0
