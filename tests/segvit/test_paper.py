"""The paper's figure for a model: found by what it computes, whatever its backbone is called."""

from __future__ import annotations

import pytest

import segvit
from segvit.presets import published_names
from segvit.weights.published import ARCHITECTURE


@pytest.mark.parametrize("name", published_names())
def test_paper_figure__of_every_published_preset(name: str) -> None:
    preset = segvit.find_preset(name)
    figure = segvit.paper_figure(preset.model, preset.num_classes)
    assert figure == (name, preset.published)
    # What changes training alone is left out of it.
    assert segvit.paper_figure(preset.model.replace(drop_path_rate=0.0), preset.num_classes) == figure


def test_paper_figure__of_a_converted_file_whose_sizes_are_options() -> None:
    preset = segvit.find_preset("ade20k_vit_base")
    large = segvit.ModelConfig(
        backbone=ARCHITECTURE,
        image_size=(512, 512),
        out_layers=(5, 7, 11),
        decoder_width=384,
        decoder_heads=12,
        class_token=False,
        backbone_options={"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "mlp_ratio": 4.0},
    )
    assert segvit.paper_figure(large, 150) == ("ade20k_vit_base", preset.published)


@pytest.mark.parametrize(
    ("changes", "num_classes"),
    [
        ({}, 149),
        ({"image_size": (640, 640)}, 150),
        ({"out_layers": (3, 7, 11)}, 150),
        ({"decoder_layers": 1}, 150),
        ({"structure": "linear", "out_layers": (11,)}, 150),
    ],
)
def test_paper_figure__none_for_another_model(changes: dict[str, object], num_classes: int) -> None:
    model = segvit.find_preset("ade20k_vit_base").model.replace(**changes)
    assert segvit.paper_figure(model, num_classes) is None


def test_published_arguments__are_what_load_published_takes() -> None:
    shrunk = segvit.find_preset("ade20k_vit_large_shrunk").model
    assert segvit.published_arguments(shrunk) == {
        "num_heads": 16,
        "out_layers": (7, 23),
        "shrink_at": 8,
        "image_size": (640, 640),
        "attention_scale": None,
    }
    with pytest.raises(ValueError, match=r"^the published format has no place for structure linear on vit_base"):
        segvit.published_arguments(segvit.find_preset("ablation_linear_cross_entropy").model)
