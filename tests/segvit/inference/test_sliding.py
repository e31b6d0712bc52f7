from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from segvit.inference import sliding
from segvit.inference.predict import PUBLISHED_SCALES, predict
from segvit.inference.sliding import View, resize_image, scan_image, window_starts
from segvit.model import SegViT
from segvit.output import SegmentationOutput

MakeModel = Callable[..., SegViT]


class PatchModel(nn.Module):
    """A model of 4-pixel patches, in float64, whose output depends on the pixels and on where they lie."""

    mean: Tensor

    def __init__(self, num_classes: int, linear: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=(16, 16))
        self.linear = linear
        self.register_buffer("mean", torch.full((1,), 127.5, dtype=torch.float64))
        self.masks = nn.Conv2d(3, num_classes, 4, stride=4, dtype=torch.float64)
        self.classes = nn.Linear(3, num_classes * (num_classes + 1), dtype=torch.float64)

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / 50

    def forward(self, images: Tensor) -> SegmentationOutput:
        height, width = images.shape[-2:]
        masks = 3 * self.masks(F.pad(images, (0, -width % 4, 0, -height % 4)))
        class_logits = 3 * self.classes(images.mean((2, 3))).unflatten(1, (masks.shape[1], -1))
        padded = (masks.shape[2] * 4, masks.shape[3] * 4)
        return SegmentationOutput(None if self.linear else class_logits, masks, (), (height, width), padded)


def patch_model(num_classes: int, linear: bool = False) -> SegViT:
    return cast(SegViT, PatchModel(num_classes, linear))


def naive_scores(output: SegmentationOutput) -> Tensor:
    """(B, N, H, W)."""
    masks = F.interpolate(output.mask_logits, size=output.padded_size, mode="bilinear", align_corners=False)
    masks = masks[..., : output.image_size[0], : output.image_size[1]]
    if output.class_logits is None:
        return masks.softmax(1)
    return torch.einsum("bqc,bqhw->bchw", output.class_logits.softmax(-1)[..., :-1], masks.sigmoid())


def naive_view(model: SegViT, image: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Scores (1, N, H, W) of an image (3, H, W), averaged over windows."""
    height, width = image.shape[1:]
    total = torch.zeros(1, 1, height, width, dtype=torch.float64)
    count = torch.zeros(height, width)
    ends_y = [*range(crop[0], height, stride[0]), height]
    ends_x = [*range(crop[1], width, stride[1]), width]
    for bottom in ends_y:
        for right in ends_x:
            top, left = max(0, bottom - crop[0]), max(0, right - crop[1])
            scores = naive_scores(model(model.normalize(image[None, :, top:bottom, left:right])))
            padding = (left, width - right, top, height - bottom)
            total = total + F.pad(scores, padding)
            count[top:bottom, left:right] += 1
    return total / count


@torch.no_grad()
def naive_mean_scores(
    model: SegViT,
    image: Tensor,
    crop: tuple[int, int],
    stride: tuple[int, int],
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Scores (N, H, W) averaged over scales and flips."""
    size = image.shape[1:]
    views = []
    for scale in scales:
        scaled_size = [max(1, int(side * scale + 0.5)) for side in size]
        scaled = F.interpolate(image[None].float(), size=scaled_size, mode="bilinear", align_corners=False)[0]
        scaled = scaled.round().to(torch.uint8)
        for mirrored in (False, True) if flip else (False,):
            scores = naive_view(model, scaled.flip(-1) if mirrored else scaled, crop, stride)
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            views.append(scores.flip(-1) if mirrored else scores)
    return torch.stack(views).mean(0)[0]


@settings(max_examples=80, deadline=None)
@given(length=st.integers(1, 300), crop=st.integers(1, 300), data=st.data())
def test_window_starts__cover_every_pixel_inside_the_image(length: int, crop: int, data: st.DataObject) -> None:
    crop = min(crop, length)
    stride = data.draw(st.integers(1, crop))
    starts = window_starts(length, crop, stride)
    assert {pixel for start in starts for pixel in range(start, start + crop)} == set(range(length))
    assert len(set(starts)) == len(starts)
    assert starts[:-1] == [stride * index for index in range(len(starts) - 1)]


def test_window_starts__published_crops() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(2048, 640, 608) == [0, 608, 1216, 1408]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    crop=st.tuples(st.integers(6, 30), st.integers(6, 30)),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    scales=st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.25, 1.7]), min_size=1, max_size=2),
    flip=st.booleans(),
    num_classes=st.integers(1, 4),
    linear=st.booleans(),
    elements=st.sampled_from([1, 300, 10**9]),
    seed=st.integers(0, 2**31),
)
def test_predict__slide_equals_full_score_maps(
    size: tuple[int, int],
    crop: tuple[int, int],
    steps: tuple[int, int],
    scales: list[float],
    flip: bool,
    num_classes: int,
    linear: bool,
    elements: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = patch_model(num_classes, linear)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    stride = (max(1, crop[0] // steps[0]), max(1, crop[1] // steps[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliding, "BAND_ELEMENTS", elements)
        labels = predict(model, image, mode="slide", crop=crop, stride=stride, scales=scales, flip=flip, batch_size=3)
    assert torch.equal(labels, naive_mean_scores(model, image, crop, stride, tuple(scales), flip).argmax(0))


@pytest.mark.parametrize("structure", ["cascade", "shrunk", "anchored"])
@pytest.mark.parametrize("flip", [False, True])
def test_predict__whole_at_scales_equals_full_score_maps(make_model: MakeModel, structure: str, flip: bool) -> None:
    model = make_model(structure, num_classes=7).double()
    image = torch.randint(0, 256, (3, 45, 70), dtype=torch.uint8)
    labels = predict(model, image, scales=(0.5, 1.0, 1.5), flip=flip)
    # A crop of any view's size: one window.
    scores = naive_mean_scores(model, image, (999, 999), (999, 999), (0.5, 1.0, 1.5), flip)
    assert torch.equal(labels, scores.argmax(0))


@pytest.mark.parametrize("structure", ["cascade", "linear"])
def test_predict__slide_of_a_vit_equals_full_score_maps(make_model: MakeModel, structure: str) -> None:
    model = make_model(structure, num_classes=7).double()
    image = torch.randint(0, 256, (3, 90, 131), dtype=torch.uint8)
    labels = predict(model, image, mode="slide", scales=(0.5, 1.0), flip=True)
    # By default the training crop, 64, and two thirds of it.
    scores = naive_mean_scores(model, image, (64, 64), (42, 42), (0.5, 1.0), flip=True)
    assert torch.equal(labels, scores.argmax(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_predict__half_precision_model_close_to_full_precision(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model("cascade")
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    scores = naive_mean_scores(model, image, (64, 64), (42, 42), (1.0, 1.5))
    labels = predict(model.to(dtype), image, mode="slide", scales=(1.0, 1.5))
    chosen = scores.gather(0, labels[None])[0]
    assert (scores.amax(0) - chosen).max().item() < 0.05


def test_predict__slide_under_autocast_close_to_full_precision(make_model: MakeModel) -> None:
    model = make_model("shrunk")
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    scores = naive_mean_scores(model, image, (64, 64), (42, 42), (1.0,), flip=True)
    with torch.autocast("cpu", torch.bfloat16):
        labels = predict(model, image, mode="slide", flip=True)
    chosen = scores.gather(0, labels[None])[0]
    assert (scores.amax(0) - chosen).max().item() < 0.05


def test_predict__published_scales_are_averaged_with_their_flips(make_model: MakeModel) -> None:
    model = make_model("single").double()
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    labels = predict(model, image, scales=PUBLISHED_SCALES, flip=True)
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    assert torch.equal(labels, naive_mean_scores(model, image, (99, 99), (99, 99), scales, flip=True).argmax(0))


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_scan_image__batches_hold_at_most_batch_size_windows(batch_size: int) -> None:
    model = patch_model(3)
    seen: list[tuple[int, ...]] = []
    cast(nn.Module, model).register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    image = torch.randint(0, 256, (3, 30, 20), dtype=torch.uint8)
    views = scan_image(model, image, scale=1.0, flip=True, crop=(16, 24), stride=(8, 8), batch_size=batch_size)
    # Rows 0, 8 and 14; 24 columns do not fit in 20, so the windows are 20 wide.
    assert [(window.top, window.left) for window in views[1].windows] == [(0, 0), (8, 0), (14, 0)]
    assert sum(shape[0] for shape in seen) == 6
    assert max(shape[0] for shape in seen) == min(batch_size, 6)
    assert {shape[1:] for shape in seen} == {(3, 16, 20)}


def test_view__overlapping_windows_are_averaged() -> None:
    model = patch_model(2).eval()
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        (view,) = scan_image(model, image, scale=1.0, flip=False, crop=(16, 16), stride=(16, 8), batch_size=2)
        left, right = (window.scores.rows(0, 16) for window in view.windows)
        rows = view.rows(3, 9)
    torch.testing.assert_close(rows[:, :8], left[3:9, :8])
    torch.testing.assert_close(rows[:, 8:16], (left[3:9, 8:] + right[3:9, :8]) / 2)
    torch.testing.assert_close(rows[:, 16:], right[3:9, 8:])


def test_view__flipped_sees_the_mirror_image() -> None:
    model = patch_model(2).eval()
    image = torch.randint(0, 256, (3, 16, 40), dtype=torch.uint8)

    def views(pixels: Tensor, flip: bool) -> list[View]:
        return scan_image(model, pixels, scale=1.0, flip=flip, crop=(16, 16), stride=(16, 12), batch_size=4)

    with torch.no_grad():
        flipped = views(image, flip=True)[1].resized_rows((16, 40), 0, 16)
        mirror = views(image.flip(-1), flip=False)[0].resized_rows((16, 40), 0, 16)
    torch.testing.assert_close(flipped, mirror.flip(1))


def test_resize_image__bilinear_rounded_to_whole_intensities() -> None:
    image = torch.tensor([[[0, 100], [3, 201]]], dtype=torch.uint8).expand(3, 2, 2)
    expected = torch.tensor([[0, 25, 75, 100], [1, 32, 94, 125], [2, 46, 132, 176], [3, 52, 152, 201]])
    assert torch.equal(resize_image(image, (4, 4))[2], expected.to(torch.uint8))
    assert resize_image(image, (2, 2)) is image


MEASURE = """
import torch
from segvit import ModelConfig, build_model, predict
config = ModelConfig(backbone="vit_tiny_patch16_224", image_size=(256, 256), structure="cascade", out_layers=(0, 1),
                     decoder_layers=1)
model = build_model(config, 150)
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
predict(model, torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8))
before = peak()
predict(model, torch.randint(0, 256, (3, 512, 768), dtype=torch.uint8), mode="slide", stride=256, scales=(0.5, 1.0))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_predict__slide_never_holds_the_score_map() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 0.6 * 150 * 512 * 768 * 4
