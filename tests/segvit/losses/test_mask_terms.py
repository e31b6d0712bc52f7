from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.losses import mask_terms
from segvit.losses.dice import DICE, fused_dice_loss
from segvit.losses.focal import FOCAL, fused_focal_loss
from segvit.losses.mask_maps import MaskMaps, softplus
from segvit.losses.mask_terms import MaskTerms, bilinear_matrix, compare_masks
from segvit.losses.term import LossTerm


def some_case(height: int, width: int, **options: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """Logits of three masks on a 2 x 3 grid, and the other arguments for two images of that size."""
    logits = (3 * torch.randn(3, 2, 3, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 3, (2, height, width))
    labels[:, 0] = 255
    covered = (-(-height // 2) * 2, -(-width // 3) * 3)
    return logits, (labels, torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]), covered, options.get("ignore_index"))


# The published terms as they are, in one sweep, and by autograd through their plain functions.
FUSED = (FOCAL, DICE)
PLAIN = (replace(FOCAL, fused=None), replace(DICE, fused=None))


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("terms", [FUSED, PLAIN, (PLAIN[1], FOCAL, DICE)])
@pytest.mark.parametrize("cached_elements", [1, 1 << 18])
def test_mask_terms__gradient_check(
    monkeypatch: pytest.MonkeyPatch, ignore_index: int | None, cached_elements: int, terms: tuple[LossTerm, ...]
) -> None:
    """One mask at a time, and all at once."""
    monkeypatch.setattr(mask_terms, "CACHED_ELEMENTS", cached_elements)
    logits, others = some_case(5, 7, ignore_index=ignore_index)
    assert torch.autograd.gradcheck(lambda x: MaskTerms.apply(x, *others, terms, compare_masks), (logits,))


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("terms", [FUSED, PLAIN])
def test_mask_terms__equals_the_formulas(ignore_index: int | None, terms: tuple[LossTerm, ...]) -> None:
    logits, (labels, image, class_index, covered, _) = some_case(6, 8)
    focal, dice = MaskTerms.apply(logits, labels, image, class_index, covered, ignore_index, terms, compare_masks)
    for index in range(3):
        full = F.interpolate(logits[None, index : index + 1], size=covered, mode="bilinear", align_corners=False)
        x, pixels = full[0, 0, :6, :8], labels[image[index]]
        t = (pixels == class_index[index]).double()
        if ignore_index is not None:
            x, t = x[pixels != ignore_index], t[pixels != ignore_index]
        p, ce = x.sigmoid(), F.binary_cross_entropy_with_logits(x, t, reduction="none")
        alpha, p_true = 0.25 * t + 0.75 * (1 - t), p * t + (1 - p) * (1 - t)
        torch.testing.assert_close(focal[index], (alpha * (1 - p_true) ** 2 * ce).mean(), rtol=1e-12, atol=0)
        expected = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        torch.testing.assert_close(dice[index], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("terms", [FUSED, PLAIN])
def test_mask_terms__keeps_nothing_of_full_resolution(terms: tuple[LossTerm, ...]) -> None:
    logits = torch.randn(1, 4, 4, requires_grad=True)
    saved: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    index = torch.tensor([0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = MaskTerms.apply(
            logits, torch.zeros(1, 64, 64).long(), index, index, (64, 64), None, terms, compare_masks
        )
    gc.collect()
    kept = [tensor.numel() for one in saved if (tensor := one()) is not None]
    assert kept == [2 * logits.numel()]
    assert len(losses) == 2


def test_fused__extreme_logits_stay_finite() -> None:
    masks = torch.tensor([-1e4, 1e4, -1e4, 1e4]).view(1, 2, 2)
    positive = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 2, 2)
    maps = MaskMaps(masks, positive, None)
    focal, *gradients = (tensor.clone() for tensor in fused_focal_loss(maps, True) if tensor is not None)
    dice, *others = (tensor for tensor in fused_dice_loss(maps, True) if tensor is not None)
    assert focal.item() == pytest.approx((0.25 * 1e4 + 0.75 * 1e4) / 4)
    assert dice.item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))
    assert all(gradient.isfinite().all() for gradient in (*gradients, *others))


def test_fused__confident_and_right_costs_its_own_probability() -> None:
    """Where 1 - p rounds to 1, the cross-entropy is still p."""
    focal, _ = fused_focal_loss(MaskMaps(torch.full((1, 1, 1), -20.0), torch.zeros(1, 1, 1), None), False)
    wrong = torch.tensor(-20.0, dtype=torch.float64).sigmoid()
    assert focal.item() == pytest.approx(0.75 * wrong.item() ** 3, rel=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_softplus__is_exact_everywhere(dtype: torch.dtype, rtol: float) -> None:
    values = torch.linspace(-80, 80, 20_001, dtype=torch.float64).to(dtype)
    exact = torch.logaddexp(values.double(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(softplus(values.clone(), torch.empty_like(values)).double(), exact, rtol=rtol, atol=0)
    far = torch.tensor([1e30, -1e30], dtype=dtype)
    assert softplus(far, torch.empty_like(far)).tolist() == pytest.approx([1e30, 0.0])


@settings(max_examples=50, deadline=None)
@given(cells=st.integers(1, 9), stride=st.integers(1, 7), cut=st.integers(0, 6))
def test_bilinear_matrix__equals_interpolate(cells: int, stride: int, cut: int) -> None:
    covered = cells * stride
    kept = max(1, covered - min(cut, stride - 1))
    values = torch.randn(1, 1, cells, dtype=torch.float64)
    expected = F.interpolate(values, size=covered, mode="linear", align_corners=False)[0, 0, :kept]
    torch.testing.assert_close(bilinear_matrix(cells, covered, kept, values) @ values[0, 0], expected)
