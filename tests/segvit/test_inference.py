from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segvit import inference
from segvit.inference import (
    image_tensor,
    predict,
    predict_batch,
    resize_band,
    semantic_labels,
    semantic_scores,
)
from segvit.model import SegViT
from segvit.output import SegmentationOutput

MakeModel = Callable[..., SegViT]


def some_output(size: tuple[int, int] = (21, 30), padded: tuple[int, int] = (24, 32)) -> SegmentationOutput:
    return SegmentationOutput(torch.randn(2, 5, 6), torch.randn(2, 5, 3, 4), (), size, padded)


def test_semantic_scores__class_times_mask_summed_over_queries() -> None:
    output = some_output()
    scores = semantic_scores(output, (21, 30))
    classes = output.class_logits.softmax(-1)
    masks = F.interpolate(output.mask_logits, size=(24, 32), mode="bilinear").sigmoid()
    expected = sum(classes[1, q, 3] * masks[1, q, 20, 29] for q in range(5))
    torch.testing.assert_close(scores[1, 3, 20, 29], expected)


def test_semantic_scores__another_size_resizes_the_scores() -> None:
    output = some_output()
    expected = F.interpolate(semantic_scores(output, (21, 30)), size=(42, 50), mode="bilinear")
    torch.testing.assert_close(semantic_scores(output, (42, 50)), expected)


@pytest.mark.parametrize("size", [(24, 32), (7, 9), (3, 4)])
def test_resize_band__equals_the_rows_of_the_whole(size: tuple[int, int]) -> None:
    masks = torch.randn(5, 6, 8, dtype=torch.float64)
    whole = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    for top, bottom in ((0, 1), (1, size[0]), (size[0] - 1, size[0])):
        torch.testing.assert_close(resize_band(masks, size, top, bottom), whole[:, top:bottom])


@pytest.mark.parametrize("max_elements", [1, 5 * 32 * 4, 10**9])
def test_semantic_labels__equal_argmax_of_scores_for_any_band(
    monkeypatch: pytest.MonkeyPatch, max_elements: int
) -> None:
    monkeypatch.setattr(inference, "BAND_MAX_ELEMENTS", max_elements)
    output = some_output()
    assert torch.equal(semantic_labels(output), semantic_scores(output, (21, 30)).argmax(1))


def test_predict__array_and_tensor_agree_with_the_batch(make_model: MakeModel) -> None:
    model = make_model("cascade")
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    batch = predict_batch(model, images)
    assert (batch.shape, batch.dtype) == ((2, 40, 56), torch.int64)
    expected = semantic_scores(model(model.normalize(images)), (40, 56)).argmax(1)
    assert torch.equal(batch, expected)
    assert torch.equal(predict(model, images[1]), predict(model, images[1].permute(1, 2, 0).numpy()))
    assert (predict(model, images[1]) == batch[1]).float().mean().item() > 0.99


def test_predict_batch__keeps_training_mode_and_frozen_parts(make_model: MakeModel) -> None:
    model = make_model("cascade", dropout=0.5, drop_path_rate=0.5).train()
    model.freeze_blocks(2)
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    assert torch.equal(predict_batch(model, images), predict_batch(model, images))
    assert model.training
    assert model.decoder.training
    assert not model.backbone.vit.blocks[1].training
    assert model.backbone.vit.blocks[2].training


def test_predict_batch__under_autocast_close_to_full_precision(make_model: MakeModel) -> None:
    model = make_model("shrunk")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    full = semantic_scores(model(model.normalize(images)), (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        labels = predict_batch(model, images)
        half = semantic_scores(model(model.normalize(images)), (64, 64))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    chosen = full.gather(1, labels[:, None])[:, 0]
    assert (full.amax(1) - chosen).max().item() < 0.05


def test_image_tensor__wrong_layout_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\), got uint8 \(3, 8, 8\)"):
        image_tensor(np.zeros((3, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"image must be uint8 \(3, H, W\), got torch.float32 \(3, 8, 8\)"):
        image_tensor(torch.zeros(3, 8, 8))


def test_predict__unknown_mode(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="unknown inference mode 'slide'; choose whole"):
        predict(make_model("single"), torch.zeros(3, 8, 8, dtype=torch.uint8), mode="slide")  # type: ignore[arg-type]
