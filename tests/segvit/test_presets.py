from __future__ import annotations

import re

import pytest
import torch

from segvit.flops import WithoutInitialization
from segvit.model import build_model
from segvit.model_check import model_problems
from segvit.presets import PRESETS, Preset, find_preset, published_names

PUBLISHED_MODELS = {
    # name: (crop, classes, mIoU, multi-scale mIoU, GFLOPs)
    "ade20k_vit_base": (512, 150, 51.3, 53.0, 120.9),
    "ade20k_vit_large_shrunk": (640, 150, 53.9, 55.1, 373.5),
    "ade20k_vit_large": (640, 150, 54.6, 55.2, 637.9),
    "coco_stuff10k_vit_large_shrunk": (512, 171, 49.1, 49.4, 224.8),
    "coco_stuff10k_vit_large": (512, 171, 49.9, 50.3, 383.9),
    "pascal_context_vit_large_shrunk": (480, 60, 62.3, 63.7, 186.9),
    "pascal_context_vit_large": (480, 60, 64.1, 65.3, 321.6),
}


def test_published__figures_of_the_paper() -> None:
    assert published_names() == list(PUBLISHED_MODELS)
    for name, (crop, num_classes, *figures) in PUBLISHED_MODELS.items():
        preset = PRESETS[name]
        result = preset.published
        assert result is not None
        assert [result.miou, result.miou_multi_scale, result.gflops] == figures
        assert preset.model.image_size == (crop, crop)
        assert preset.num_classes == num_classes
        is_large = "large" in name
        assert preset.model.backbone.startswith("vit_large_patch16_384" if is_large else "vit_base_patch16_384")
        assert preset.model.drop_path_rate == (0.3 if is_large else 0.1)
        assert not preset.model.class_token
        assert preset.loss == {"class": 1.0, "focal": 20.0, "dice": 1.0}
        shrunk = name.endswith("shrunk")
        assert preset.model.structure == ("shrunk" if shrunk else "cascade")
        assert preset.model.to_dict().get("shrink_at") == (8 if shrunk else None)
        layers = (7, 23) if shrunk else (7, 15, 23) if is_large else (5, 7, 11)
        assert preset.model.out_layers == layers


def expected_grid(preset: Preset) -> tuple[int, int]:
    """Of the masks, for 96 x 128 pixels."""
    if preset.model.backbone.startswith("swin"):
        return (24, 32)
    return (3, 4) if preset.model.structure == "naive_qd" else (6, 8)


@pytest.mark.parametrize("name", PRESETS)
def test_presets__have_no_problem(name: str) -> None:
    preset = PRESETS[name]
    assert model_problems(preset.model, preset.num_classes, loss=preset.loss) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets__build_and_run(name: str) -> None:
    """At full width and depth, on the meta device."""
    preset = PRESETS[name]
    model = preset.model
    with torch.device("meta"), WithoutInitialization():
        built = build_model(model, preset.num_classes).eval()
    with torch.no_grad():
        output = built(torch.empty(1, 3, 96, 128, device="meta"))
    classes = preset.num_classes
    assert output.mask_logits.shape == (1, classes, *expected_grid(preset))
    assert output.padded_size == (96, 128)
    if model.structure == "linear":
        assert output.class_logits is None
        assert preset.loss == {"cross_entropy": 1.0}
        assert output.auxiliary == ()
        return
    assert output.class_logits.shape == (1, classes, classes + 1)
    assert model.out_layers is not None
    predictions = len(model.out_layers) if model.structure == "cascade" else model.decoder_layers
    assert len(output.auxiliary) == predictions - 1
    assert all(one.mask_logits.shape == output.mask_logits.shape for one in output.auxiliary)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ablation_atm_cross_entropy", {"structure": "single", "out_layers": (11,)}),
        ("ablation_vit_base_layers_7_11", {"structure": "cascade", "out_layers": (7, 11)}),
        ("ablation_vit_large_layers_23", {"structure": "cascade", "out_layers": (23,)}),
        ("ablation_parallel", {"chain_stages": False, "share_queries": True, "accumulate_masks": True}),
        ("ablation_cascade_separate_masks", {"chain_stages": True, "accumulate_masks": False}),
        (
            "ablation_parallel_own_queries_separate_masks",
            {"chain_stages": False, "share_queries": False, "accumulate_masks": False},
        ),
        ("ablation_decoder_layers_6", {"decoder_layers": 6, "out_layers": (5, 7, 11)}),
        ("ablation_swin_tiny", {"backbone": "swin_tiny_patch4_window7_224", "out_layers": (0, 1, 2, 3)}),
        ("ablation_qd_convolution_at_12", {"shrink_queries": "convolution", "shrink_at": 12, "structure": "naive_qd"}),
        ("ablation_shrunk_a_baseline", {"structure": "single", "out_layers": (23,)}),
        ("ablation_shrunk_one_qu", {"structure": "shrunk", "out_layers": (23,), "shrink_at": 8}),
        ("ablation_shrunk_c_two_qu", {"structure": "shrunk", "out_layers": (7, 23), "shrink_at": 8}),
    ],
)
def test_ablations__change_what_their_name_says(name: str, settings: dict[str, object]) -> None:
    model = find_preset(name).model
    assert {key: getattr(model, key) for key in settings} == settings


def test_ablations__train_with_the_loss_their_name_says() -> None:
    by_scores = {name for name, preset in PRESETS.items() if "cross_entropy" in preset.loss}
    assert by_scores == {"ablation_linear_cross_entropy", "ablation_atm_cross_entropy"}
    assert all(preset.published is None for name, preset in PRESETS.items() if name.startswith("ablation_"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ade20k_vit_larg", "did you mean ade20k_vit_large, ade20k_vit_base, ade20k_vit_large_shrunk?"),
        ("zzz", "published models are ade20k_vit_base, "),
    ],
)
def test_find_preset__unknown_name_lists_the_closest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown preset '{name}'; {hint}")):
        find_preset(name)
