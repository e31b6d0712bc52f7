from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from segvit.inference.predict import (
    image_tensor,
    predict,
    predict_batch,
    semantic_scores,
    shares_batches,
    window_geometry,
)
from segvit.model import SegViT

MakeModel = Callable[..., SegViT]


def test_predict__array_and_tensor_agree_with_the_batch(make_model: MakeModel) -> None:
    model = make_model("cascade")
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    batch = predict_batch(model, images)
    assert (batch.shape, batch.dtype) == ((2, 40, 56), torch.int64)
    expected = semantic_scores(model(model.normalize(images)), (40, 56)).argmax(1)
    assert torch.equal(batch, expected)
    assert torch.equal(predict(model, images[1]), predict(model, images[1].permute(1, 2, 0).numpy()))
    assert (predict(model, images[1]) == batch[1]).float().mean().item() > 0.99


def test_predict__resize_goes_before_the_scales(make_model: MakeModel) -> None:
    model = make_model("cascade")
    image = torch.randint(0, 256, (3, 40, 80), dtype=torch.uint8)
    # The longer side counts at (96, 96), the shorter one at (400, 60).
    for resize, factor in (((96, 96), 1.2), ((400, 60), 1.5)):
        expected = predict(model, image, scales=(0.5 * factor, factor), flip=True)
        assert torch.equal(predict(model, image, resize=resize, scales=(0.5, 1.0), flip=True), expected)
        assert expected.shape == (40, 80)
    with pytest.raises(ValueError, match=r"^resize must be \(long, short\) with 1 <= short <= long, got \(60, 96\)"):
        predict(model, image, resize=(60, 96))


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


def test_shares_batches__where_the_image_is_taken_whole() -> None:
    assert shares_batches({})
    assert shares_batches({"precision": "bf16"})
    assert not shares_batches({"precision": "bf16", "flip": True})


@pytest.mark.filterwarnings("error")
def test_image_tensor__a_read_only_array_is_taken_without_a_warning() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    array.flags.writeable = False
    assert torch.equal(image_tensor(array), torch.tensor(array.tolist(), dtype=torch.uint8).permute(2, 0, 1))


def test_image_tensor__wrong_layout_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image must be uint8 \(H, W, 3\), got uint8 \(3, 8, 8\)"):
        image_tensor(np.zeros((3, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"image must be uint8 \(3, H, W\), got torch.float32 \(3, 8, 8\)"):
        image_tensor(torch.zeros(3, 8, 8))


def test_predict__compiled_model_gives_the_same_labels(make_model: MakeModel) -> None:
    model = make_model("single", decoder_layers=1)
    image = torch.randint(0, 256, (3, 64, 100), dtype=torch.uint8)
    compiled = cast(SegViT, torch.compile(model, backend="eager"))
    expected = predict(model, image, mode="slide", batch_size=1)
    try:
        # Windows of the whole image's size: one graph serves both modes.
        assert torch.equal(predict(compiled, image, mode="slide", batch_size=1), expected)
        assert torch.equal(predict(compiled, image[..., :64]), predict(model, image[..., :64]))
    finally:
        torch.compiler.reset()


def test_predict__keeps_training_mode_and_gradients_off(make_model: MakeModel) -> None:
    model = make_model("cascade", dropout=0.5).train()
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    first, second = (predict(model, image, mode="slide", flip=True) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "tile"}, "unknown inference mode 'tile'; choose from whole, slide"),
        ({"crop": 32}, "crop 32 has no meaning in mode 'whole'; use mode 'slide', or leave it out"),
        ({"stride": (8, 8)}, r"stride \(8, 8\) has no meaning in mode 'whole'; use mode 'slide', or leave it out"),
        ({"mode": "slide", "crop": (32, 0)}, r"crop must be >= 1 pixel, got \(32, 0\); use the training crop"),
        ({"mode": "slide", "crop": 32, "stride": 0}, r"stride 0 must be from 1 to the crop \(32, 32\).*\(21, 21\)"),
        ({"mode": "slide", "stride": (64, 65)}, r"stride \(64, 65\) must be from 1 to the crop \(64, 64\)"),
        ({"scales": ()}, "scales must name at least one factor, got none"),
        ({"scales": (1.0, 0.0)}, "scales must be positive factors of the image's size, got 0.0"),
        ({"scales": (float("nan"),)}, "scales must be positive factors of the image's size, got nan"),
        ({"scales": (float("inf"),)}, "scales must be positive factors of the image's size, got inf"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_predict__refuses_what_has_no_meaning(make_model: MakeModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(make_model("single"), torch.zeros(3, 8, 8, dtype=torch.uint8), **arguments)


def test_window_geometry__defaults_follow_published_practice(make_model: MakeModel) -> None:
    model = make_model("single")
    assert window_geometry(model, "slide", None, None) == ((64, 64), (42, 42))
    assert window_geometry(model, "slide", 512, None) == ((512, 512), (341, 341))
    assert window_geometry(model, "slide", (480, 1), None) == ((480, 1), (320, 1))
    assert window_geometry(model, "slide", 640, 608) == ((640, 640), (608, 608))
