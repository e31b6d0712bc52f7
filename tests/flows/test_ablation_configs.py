"""The experiment files of the paper's six ablations: what their rows are, and that these differ in that alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.experiment import load_experiment
from flows.recipes import parts
from flows.recipes.ablation import AblationConfig, ablation
from pipeline import steps
from pipeline.config import EvaluateConfig
from pipeline.workflow.graph import Plan
from pipeline.workflow.tracking import Tracking
from segvit.config import ModelConfig
from segvit.flops import model_gflops
from segvit.losses.segmentation_loss import PUBLISHED_WEIGHTS
from segvit.model_check import model_problems

CONFIGS = Path(__file__).parents[2] / "flows" / "configs" / "ablations"
# The rows of the paper's tables 4 to 8 that need no other decoder than SegViT's own, by (structure, what differs).
ROWS: dict[str, list[dict[str, Any]]] = {
    "atm": [{"structure": "linear"}, {"structure": "single"}, {"structure": "single"}],
    "layers": [{"out_layers": layers} for layers in ([11], [5, 11], [5, 7, 11], [2, 5, 8, 11])],
    "decoder": [
        {"chain_stages": True, "accumulate_masks": True, "decoder_layers": 1},
        {"chain_stages": True, "accumulate_masks": False},
        {"chain_stages": False, "share_queries": True},
        {"chain_stages": False, "share_queries": False},
        {"decoder_layers": 2},
        {"decoder_layers": 3},
    ],
    "hierarchical": [{"backbone": "swin_tiny_patch4_window7_224", "out_layers": [0, 1, 2, 3]}],
    "downsampling": [
        {"shrink_queries": "nearest", "shrink_keys": False},
        {"shrink_queries": "average"},
        {"shrink_queries": "convolution"},
        {"shrink_keys": True},
        {"shrink_at": 6},
        {"shrink_at": 8},
    ],
    "shrunk": [
        {"structure": "linear"},
        {"structure": "single"},
        {"structure": "naive_qd", "shrink_at": 4},
        {"structure": "shrunk", "out_layers": [11]},
        {"structure": "shrunk", "out_layers": [3, 11]},
    ],
}
NUM_CLASSES = 11
LOSSES = {
    "linear_cross_entropy": {"cross_entropy": 1.0},
    "single_cross_entropy": {"cross_entropy": 1.0},
    "single": {"class": 1.0, "focal": 20.0, "dice": 5.0},
}


def study(name: str, monkeypatch: pytest.MonkeyPatch) -> AblationConfig:
    monkeypatch.setenv("SEGVIT_DATA", "/data")
    config = load_experiment(CONFIGS / f"{name}.yaml").config
    assert isinstance(config, AblationConfig)
    return config


def test_ablation_configs__six() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_ablation_configs__rows_of_the_paper_on_one_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(name, monkeypatch)
    assert len(config.seeds) >= 2
    settings = {variant: config.variant_settings(variant) for variant in config.variants}
    models = [ModelConfig.from_dict(one.model) for one in settings.values()]
    assert [problem for model in models for problem in model_problems(model, NUM_CLASSES)] == []
    for wanted in ROWS[name]:
        found = [model for model in models if wanted.items() <= model.to_dict().items()]
        assert found, wanted
    for variant, one in settings.items():
        assert one.train == config.train or (config.variants[variant].start_from and one.train.steps == 0), variant
    whole = {json.dumps(one.model_dump(mode="json", exclude={"own"}), sort_keys=True) for one in settings.values()}
    assert len(whole) == len(models)


def test_ablation_configs__what_two_studies_share_is_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"single": ("atm", "layers"), "cascade": ("layers", "decoder"), "qd": ("downsampling", "shrunk")}
    for variant, names in shared.items():
        first, second = (study(name, monkeypatch) for name in names)
        assert first.variant_settings(variant) == second.variant_settings(variant)
        assert first.seeds == second.seeds
        assert first.evaluate == second.evaluate


def test_ablation_configs__validation_while_training_predicts_as_evaluation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study("decoder", monkeypatch)
    with Plan(str(tmp_path), Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}")) as planned:
        monkeypatch.setattr(parts, "prepare", lambda flow, config: flow.step(steps.prepare, config.data, "digest"))
        ablation(planned, config)
    trained = [node for label, node in planned._nodes.items() if label.startswith("train/")]
    assert len(trained) == len(config.variants) * len(config.seeds)
    assert all(node.arguments["inference"] == config.evaluate.inference for node in trained)
    assert config.evaluate.inference.options() == {"resize": [336, 252]}
    default = config.model_copy(update={"evaluate": EvaluateConfig()})
    assert parts.validation_inference(default) is None


def test_ablation_configs__atm_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    config = study("atm", monkeypatch)
    for variant in config.variants:
        weights = config.variant_settings(variant).loss.resolved()
        assert {name: weight for name, weight in weights.items() if weight} == LOSSES[variant]


def test_ablation_configs__parts_of_shrunk_cost_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    config = study("shrunk", monkeypatch)
    gflops = {
        name: model_gflops(ModelConfig.from_dict(config.variant_settings(name).model), NUM_CLASSES, (252, 336))
        for name in config.variants
    }
    assert gflops["qd"] < gflops["qd_one_qu"] < gflops["qd_two_qu"]
    assert gflops["qd"] < 0.75 * gflops["single"]
    assert gflops["anchored"] <= 0.60 * gflops["cascade"]


def test_loss_weights_search__is_not_scored_on_val(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGVIT_DATA", "/data")
    found = load_experiment(CONFIGS.parent / "loss_weights" / "search.yaml")
    assert found.config.recipe == "search"
    assert found.config.tune.hold_out == 0.2
    assert found.config.variant_settings("full").model == study("layers", monkeypatch).variant_settings("cascade").model


def test_loss_weights_compare__the_searched_model_with_other_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = study("../loss_weights/compare", monkeypatch)
    searched = load_experiment(CONFIGS.parent / "loss_weights" / "search.yaml").config.variant_settings("full")
    ratios = {}
    for variant in config.variants:
        settings = config.variant_settings(variant)
        assert (settings.model, settings.train) == (searched.model, searched.train)
        ratios[variant] = {name: weight for name, weight in settings.loss.resolved().items() if weight}
    assert ratios["published"] == dict(PUBLISHED_WEIGHTS)
    assert ratios["dice_5"] == LOSSES["single"]
    assert ratios["found"].keys() == ratios["published"].keys()
