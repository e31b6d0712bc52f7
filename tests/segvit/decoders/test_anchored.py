"""Anchored upsampling: where it starts, what it reads, and the cascade over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import segvit
from segvit.backbones.feature_map import FeatureMap, KeptPatches
from segvit.decoders.anchored import AnchoredUpsampling

FINE = (5, 8)
WIDTH = 16
SAMPLED = [row * 8 + column for row in (0, 2, 4) for column in (0, 2, 4, 6)]
KEPT = [[9, 23], [3, 14]]


def patches_before() -> Tensor:
    return torch.randn(2, FINE[0] * FINE[1], WIDTH, generator=torch.Generator().manual_seed(0))


def kept_patches(more: bool = True) -> KeptPatches:
    places = [SAMPLED + (own if more else []) for own in KEPT]
    left_out = [[place for place in range(FINE[0] * FINE[1]) if place not in image] for image in places]
    stand_ins = torch.randn(2, len(left_out[0]), len(places[0]), generator=torch.Generator().manual_seed(2)).softmax(2)
    return KeptPatches(torch.tensor(places), torch.tensor(left_out), patches_before(), stand_ins)


def shrunk_feature(seed: int = 1, more: bool = True) -> FeatureMap:
    kept = kept_patches(more)
    tokens = torch.randn(*kept.places.shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    return FeatureMap(tokens, FINE, 16, FINE, kept)


def tiny(**options: Any) -> segvit.ModelConfig:
    return segvit.ModelConfig(
        backbone="vit_tiny_patch16_224",
        image_size=(80, 128),
        structure="anchored",
        decoder_layers=1,
        backbone_options={"depth": 4},
        **{"out_layers": (0, 1, 3), "shrink_at": 1, "keep_every": 2, "keep_unlike": 0.125, **options},
        dropout=0.0,
        drop_path_rate=0.0,
    )


@pytest.mark.parametrize("more", [False, True])
def test_anchored_upsampling__tokens_that_are_kept_stay_as_they_are(more: bool) -> None:
    feature = shrunk_feature(more=more)
    [restored] = AnchoredUpsampling(WIDTH, 1)([feature])
    assert restored[:1] == (restored.tokens,)
    assert restored[1:] == (FINE, 16, FINE, None)
    for image in range(2):
        places = SAMPLED + (KEPT[image] if more else [])
        assert torch.equal(restored.tokens[image, places], feature.tokens[image])


def test_anchored_upsampling__what_blocks_added_everywhere_is_added_to_every_patch() -> None:
    low, added = patches_before(), torch.linspace(-1, 1, WIDTH)
    kept = kept_patches()
    tokens = torch.stack([low[image, kept.places[image]] for image in range(2)]) + added
    [restored] = AnchoredUpsampling(WIDTH, 1)([FeatureMap(tokens, FINE, 16, FINE, kept)])
    torch.testing.assert_close(restored.tokens, low + added)


def test_anchored_upsampling__what_was_added_to_the_stand_ins_and_the_corrected_difference_from_them() -> None:
    low, features = patches_before(), [shrunk_feature(seed) for seed in (1, 3)]
    upsampling = AnchoredUpsampling(WIDTH, 2)
    for correction in upsampling.corrections:
        torch.nn.init.normal_(correction.weight)  # type: ignore[arg-type]
    restored = upsampling(features)
    image, number = 1, 7
    kept = kept_patches()
    patch, places, weights = kept.left_out[image, number], kept.places[image], kept.stand_ins[image, number]
    normed = torch.nn.functional.layer_norm(low[image], (WIDTH,))
    difference = normed[patch] - weights @ normed[places]
    for feature, one, correction in zip(features, restored, upsampling.corrections, strict=True):
        added = weights @ (feature.tokens[image] - low[image, places])
        expected = low[image, patch] + added + correction(difference)
        torch.testing.assert_close(one.tokens[image, patch], expected)


@pytest.mark.parametrize("size", [(80, 128), (72, 100)])
@pytest.mark.parametrize("keep", [{"keep_unlike": 0.0}, {"keep_unlike": 0.1, "keep_edges": 0.1}])
@pytest.mark.parametrize("out_layers", [(0, 1, 3), (2, 3)])
def test_anchored__every_parameter_learns_at_the_full_grid(
    out_layers: tuple[int, ...], size: tuple[int, int], keep: dict[str, float]
) -> None:
    torch.manual_seed(0)
    model = segvit.build_model(tiny(class_token=False, out_layers=out_layers, **keep), num_classes=3)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    # What lies before a layer that starts at zero learns from the second step on.
    for _ in range(2):
        optimizer.zero_grad()
        output = model(torch.randn(2, 3, *size))
        predictions = (output, *output.auxiliary)
        sum((one.mask_logits.square().mean() + one.class_logits.square().mean()) for one in predictions).backward()
        optimizer.step()
    assert output.mask_logits.shape[-2:] == (5, -(-size[1] // 16))
    assert len(output.auxiliary) == len(out_layers) - 1
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert [name for name, value in learning.items() if value.grad is None or not value.grad.any()] == []


def test_anchored__with_all_patches_kept_it_is_the_cascade() -> None:
    """Nothing is left out, so features and predictions are the full model's, and its weights fit by name."""
    torch.manual_seed(0)
    anchored = segvit.build_model(tiny(keep_unlike=0.99), num_classes=3).eval()
    config = tiny().replace(structure="cascade")
    full = segvit.build_model(config, num_classes=3).eval()
    missing, unexpected = anchored.load_state_dict(full.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[1] for name in missing} == {"upsampling"}
    images = torch.randn(2, 3, 80, 128)
    with torch.no_grad():
        expected, output = full(images), anchored(images)
    torch.testing.assert_close(output.mask_logits, expected.mask_logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.class_logits, expected.class_logits, rtol=1e-3, atol=1e-4)


def test_anchored__images_of_a_batch_do_not_mix() -> None:
    torch.manual_seed(0)
    model = segvit.build_model(tiny(), num_classes=3).eval()
    images = torch.randn(3, 3, 70, 128)

    def masks(batch: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(batch).mask_logits
            return result

    torch.testing.assert_close(masks(images), torch.cat([masks(image[None]) for image in images]), rtol=1e-4, atol=1e-4)


def test_anchored__reads_the_layers_of_a_cascade() -> None:
    decoder = tiny(out_layers=None, shrink_at=None).decoder
    assert [decoder.default_out_layers(depth, hierarchical=False) for depth in (12, 24)] == [(5, 7, 11), (7, 15, 23)]
    assert segvit.model_problems(tiny(out_layers=(1, 2)), 3) == []
    with pytest.raises(ValueError, match=r"^shrink_at 1 lies after the last of out_layers \(0,\)"):
        segvit.build_model(tiny(out_layers=(0,)), num_classes=3)
    [problem] = segvit.model_problems(tiny(out_layers=(0,)), 3)
    assert problem.startswith(
        "shrink_at 1 lies after the last of out_layers (0,), so that nothing would be downsampled"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_edges": 1.0}, r"^keep_edges must be in \[0, 1\), got 1.0; it is a share of the patches$"),
        ({"keep_every": 1}, r"^keep_every must be >= 2, got 1; use a structure that does not shrink$"),
        ({"edge_window": 4}, r"^edge_window must be an odd number >= 3, got 4; a patch lies in its middle$"),
        ({"edge_window": 1}, r"^edge_window must be an odd number >= 3, got 1"),
        ({"keep_edges": -0.1}, r"^keep_edges must be in \[0, 1\), got -0.1"),
        ({"keep_unlike": 1.5}, r"^keep_unlike must be in \[0, 1\), got 1.5; it is a share of the patches$"),
        ({"shrink_queries": "average"}, r"^shrink_queries average does not go with structure anchored"),
        ({"shrink_keys": True}, r"^shrink_keys does not go with structure anchored"),
    ],
)
def test_anchored__rules_of_its_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_anchored__cost_counts_the_patches_that_are_kept() -> None:
    full = segvit.ModelConfig(
        backbone="vit_small_patch14_dinov2",
        image_size=(504, 672),
        decoder_width=384,
        decoder_layers=1,
    )
    shares = {}
    cost = segvit.model_cost(full, 11, (504, 672)).gflops
    for keep in (0.0, 0.125):
        anchored = full.replace(structure="anchored", keep_every=2, keep_unlike=keep)
        shares[keep] = segvit.model_cost(anchored, 11, (504, 672)).gflops / cost
    assert shares[0.0] == pytest.approx(0.51, abs=0.01)
    assert shares[0.125] == pytest.approx(0.585, abs=0.01)
    # An eighth of 36 x 48 patches, C channels: seven blocks, the downsampling one without keys and values, likeness of
    # every patch to each that stays, and the upsampling of what is left out.
    sampled, kept, patches, width = 432, 216, 36 * 48, 384
    attention = 2 * width * ((sampled + kept + 1) ** 2 - (sampled + 1) ** 2)
    blocks = 7 * (12 * kept * width**2 + attention)
    downsampling = 10 * kept * width**2 + 2 * width * kept * (patches + 1)

    def upsampling(tokens: int) -> int:
        left_out = patches - tokens
        # Likeness; three features and the difference from the stand-ins, and a map a feature.
        return patches * tokens * width + 4 * left_out * tokens * width + 3 * left_out * width**2

    added = (shares[0.125] - shares[0.0]) * cost
    assert added == pytest.approx(
        (blocks + downsampling + upsampling(sampled + kept) - upsampling(sampled)) / 1e9, rel=0.02
    )
