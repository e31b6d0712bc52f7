"""Masks finer than the patch grid: where they start, what they cover, and that they learn what patches cannot show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segvit


def model_of(upsampling: int, **settings: Any) -> segvit.SegViT:
    torch.manual_seed(0)
    config = segvit.ModelConfig(
        backbone="vit_tiny_patch16_224",
        image_size=(64, 96),
        backbone_options={"depth": 4, "embed_dim": 48, "num_heads": 3},
        decoder_layers=1,
        dropout=0.0,
        drop_path_rate=0.0,
        **{"out_layers": (1, 3), "mask_upsampling": upsampling, **settings},
    )
    return segvit.build_model(config, 3)


@pytest.mark.parametrize("upsampling", [2, 4])
@pytest.mark.parametrize("settings", [{}, {"structure": "single", "out_layers": (3,)}])
def test_finer_masks__start_as_the_coarse_ones_enlarged(upsampling: int, settings: dict[str, Any]) -> None:
    coarse, fine = model_of(1, **settings).eval(), model_of(upsampling, **settings).eval()
    fine.load_state_dict(coarse.state_dict(), strict=False)
    images = torch.randn(2, 3, 60, 96)
    with torch.no_grad():
        one, other = coarse(images), fine(images)
    assert other.mask_logits.shape == (2, 3, 4 * upsampling, 6 * upsampling)
    assert other.padded_size == one.padded_size == (64, 96)
    enlarged = F.interpolate(one.mask_logits, scale_factor=upsampling, mode="bilinear", align_corners=False)
    torch.testing.assert_close(other.mask_logits, enlarged)
    assert [item.mask_logits.shape[-1] for item in other.auxiliary] == [6 * upsampling] * len(other.auxiliary)


def test_finer_masks__learn_stripes_within_a_patch() -> None:
    errors = []
    for upsampling in (1, 4):
        model = model_of(upsampling)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        images = torch.randn(1, 3, 64, 96)
        target = (torch.arange(64) // 4 % 2).float().view(1, 1, 64, 1).expand(1, 3, 64, 96)
        for _ in range(60):
            masks = F.interpolate(model(images).mask_logits, size=(64, 96), mode="bilinear", align_corners=False)
            loss = F.binary_cross_entropy_with_logits(masks, target)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        errors.append(float(loss))
    assert errors[0] > 0.6
    assert errors[1] < 0.3


def test_finer_masks__anchored_restores_and_then_refines() -> None:
    model = model_of(2, structure="anchored", shrink_at=2, keep_every=2, keep_unlike=0.2).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96))
    assert output.mask_logits.shape == (1, 3, 8, 12)


def test_mask_upsampling__of_another_number_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_upsampling must be 1, 2 or 4, got 3"):
        model_of(3)
    with pytest.raises(ValueError, match="mask_upsampling 2 has no meaning for structure 'linear'"):
        model_of(2, structure="linear", out_layers=(3,))
