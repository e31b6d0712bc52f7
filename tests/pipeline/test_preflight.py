"""Every misfit is refused before anything starts: value, rule and remedy, all in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import ExperimentConfig
from pipeline.config.file import parse_config
from pipeline.errors import UserError
from pipeline.preflight import Machine, find_problems
from segvit.checkpoint import save_checkpoint
from segvit.config import ModelConfig
from segvit.model import build_model

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "data": {"dataset": "digits", "digits": {"num_train": 6, "num_val": 3, "image_size": 96}},
    "model": {"backbone": "vit_tiny_patch16_224", "weights": "random", "image_size": [48, 64], "decoder_layers": 1},
    "variants": {
        "full": {"structure": "cascade", "out_layers": [1, 3]},
        "shrunk": {"structure": "shrunk", "shrink_at": 2},
    },
    "train": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "validate_every_steps": 2, "checkpoint_every_steps": 2},
    "tune": {"num_trials": 2, "steps": 2, "report_every_steps": 1},
}


def experiment(*overrides: tuple[str, Any]) -> ExperimentConfig:
    """The small experiment with other values at dotted paths; a path's own dots are written as slashes."""
    import copy

    tree = copy.deepcopy(EXPERIMENT)
    for path, value in overrides:
        *above, last = path.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last.replace("/", ".")] = value
    return parse_config(tree)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGVIT_WEIGHTS", raising=False)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: cls(num_cpus=4, num_gpus=0)))


def test_find_problems__none_where_all_fits(tmp_path: Path) -> None:
    assert find_problems(experiment(), str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


MISFITS: list[tuple[str, Any, str | None]] = [
    ("variants.full.out_layers", [1, 12], r"variants.full: out_layers .*12.* blocks are 0 to 11"),
    ("variants.full.out_layers", [3, 1], r"variants.full: .*ascending"),
    ("variants.full.out_layers", [], r"variants.full: out_layers"),
    (
        "model.backbone",
        "vit_tiny_patch16_242",
        r"unknown backbone 'vit_tiny_patch16_242'; did you mean .*vit_tiny_patch16_224",
    ),
    ("model.backbone", "resnet50", r"resnet50"),
    ("model.decoder_heads", 5, r"decoder_width 96 .* decoder_heads 5"),
    ("model.decoder_width", 100, r"decoder_width 100 .* decoder_heads 3"),
    ("variants.shrunk.shrink_at", 12, r"variants.shrunk: shrink_at 12 .* from 1 to 11"),
    ("variants.shrunk.shrink_at", 0, r"variants.shrunk: shrink_at .*0"),
    ("train.freeze_blocks", 13, r"freeze_blocks 13|cannot freeze 13 blocks"),
    ("model.image_size", [50, 64], r"50 is not a multiple of .*16; use 48 or 64"),
    ("model.image_size", [48], r"image_size"),
    ("model.decoder_leyers", 2, r"decoder_leyers.*decoder_layers"),
    ("variants.full.structure", "cascaded", r"variants.full: unknown structure 'cascaded'; .*cascade"),
    ("variants.full.shrink_at", 2, r"variants.full: .*shrink_at.*cascade"),
    ("variants.full.shrink_queries", "medium", r"variants.full: .*shrink_queries"),
    (
        "variants.small",
        {"start_from": "full", "backbone": "vit_small_patch16_224"},
        r"variants.small.start_from full: its backbone is vit_tiny_patch16_224, not vit_small_patch16_224; start from",
    ),
    (
        "variants.small",
        {"start_from": "full", "distill": {}, "train": {"steps": 0}},
        r"variants.small.start_from full: structure cascade restores no features that could be fitted; use anchored",
    ),
    ("model.dropout", 1.0, r"dropout must be in \[0, 1\), got 1.0"),
    ("model.preset", "ade20k_vit_bas", r"unknown preset 'ade20k_vit_bas'; did you mean ade20k_vit_base"),
    ("model.backbone_options", {"depht": 4}, r"unknown backbone option depht"),
    ("model.backbone_options", {"embed_dim": 100}, r"backbone_options|num_heads|heads"),
    ("evaluate.split", "test", r"evaluate.split 'test' is no split of digits; choose from train, val"),
    ("promote.protected_classes", ["10"], r"promote.protected_classes.*'10'.*choose from .*background"),
    ("tune.space", {"loss/dise": {"log_uniform": [1, 2]}}, r"tune.space.loss/dise"),
    ("tune.space", {"train.steps": {"int_uniform": [10, 90]}}, r"tune.space.train.steps: .*a trial is tune.steps long"),
    ("tune.space", {"loss.dise": {"log_uniform": [1, 2]}}, r"tune.space.loss.dise: .*did you mean loss.dice"),
    (
        "tune.space",
        {"train.learning_rat": {"log_uniform": [1, 2]}},
        r"tune.space.train.learning_rat: .*train.learning_rate",
    ),
    (
        "tune.space",
        {"train.batch_size": {"choice": [4, 0]}},
        r"tune.space.train.batch_size: train.batch_size: .*greater",
    ),
    (
        "tune.space",
        {"model.decoder_heads": {"choice": [3, 5]}},
        r"tune.space.model.decoder_heads: with 5: .*decoder_heads 5",
    ),
    ("tune.report_every_steps", 9, r"tune.report_every_steps 9 exceeds tune.steps 2"),
    ("loss.dise", 2.0, r"unknown loss term 'dise'; .*dice"),
    ("variants.full.loss", {"focal": 0.0}, r"variants.full: .*loss"),
    ("train.schedule", "polly", r"train.schedule: unknown schedule 'polly'; .*poly"),
    ("train.schedule", {"name": "poly", "powr": 1.0}, r"train.schedule: .*powr"),
    ("runtime.num_workers", 4, None),
    ("runtime.use_gpu", True, r"runtime.use_gpu is true, and this machine has no GPU"),
    ("runtime.cpus_per_worker", 5, r"runtime.num_workers 1 x runtime.cpus_per_worker 5 exceed the 4 CPUs"),
    ("data.dataset", "cats", r"data: unknown dataset 'cats'"),
    ("model.weights", "/none.safetensors", r"model.weights: no weights file at /none.safetensors"),
    (
        "model.source_grid",
        [18, 32],
        r"model.source_grid \[18, 32\] is that of a weights file, and there is none; leave",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), MISFITS)
def test_find_problems__one_misfit(path: str, value: Any, message: str | None, tmp_path: Path) -> None:
    import re

    problems = find_problems(experiment((path, value)), str(tmp_path))
    if message is None:
        assert problems == []
    else:
        assert [one for one in problems if re.search(message, one)], problems
    assert not any("Traceback" in one or "\n" in one for one in problems)


def test_find_problems__folders_and_files_to_start_from(tmp_path: Path) -> None:
    settings = experiment().variant_settings("full").model
    save_checkpoint(tmp_path / "champion", build_model(ModelConfig.from_dict(settings), 3), {})
    workspace = str(tmp_path / "ws")
    assert find_problems(experiment(("model.start_from", f"{tmp_path}/champion")), workspace) == []
    larger = ("variants.full.backbone", "vit_small_patch16_224")
    for start, message in (
        (f"{tmp_path}/champion", "its backbone is vit_tiny_patch16_224, not vit_small_patch16_224; start from"),
        (f"{tmp_path}/nowhere", f"{tmp_path}/nowhere is no checkpoint folder, it has no model.safetensors"),
        (f"{tmp_path}/none.pth", f"no file at {tmp_path}/none.pth"),
        (f"{tmp_path}/champion/model.safetensors", f"one of the files of a checkpoint; name its folder, {tmp_path}"),
    ):
        problems = find_problems(experiment(("variants.full.start_from", start), larger), workspace)
        assert len(problems) == 1
        assert problems[0].startswith(f"variants.full.start_from {start}: ")
        assert message in problems[0]


def test_find_problems__linear_head_has_no_masks_to_compare(tmp_path: Path) -> None:
    linear = {"structure": "linear", "out_layers": [3]}
    problems = find_problems(experiment(("variants.full", linear)), str(tmp_path))
    assert len(problems) == 3
    for problem, term in zip(problems, ("class", "focal", "dice"), strict=True):
        assert problem.startswith(f"variants.full: structure linear: loss term {term} compares ")
        assert "such as cross_entropy" in problem
    fits = experiment(("variants.full", {**linear, "loss": {"cross_entropy": 1.0}}), ("tune.num_trials", 0))
    assert find_problems(fits, str(tmp_path)) == []


def test_find_problems__all_at_once_and_one_that_all_variants_share_once(tmp_path: Path) -> None:
    config = experiment(
        ("variants.full.out_layers", [1, 12]),
        ("train.freeze_blocks", 13),
        ("evaluate.split", "test"),
        ("promote.protected_classes", ["ten"]),
        ("tune.space", {"loss.dise": {"log_uniform": [1, 2]}}),
        ("runtime.use_gpu", True),
    )
    problems = find_problems(config, str(tmp_path))
    found = ("12", "freeze_blocks 13", "'test'", "'ten'", "loss.dise", "no GPU")
    assert all(any(one in problem for problem in problems) for one in found), problems
    shared = find_problems(experiment(("model.dropout", 1.5)), str(tmp_path))
    assert shared == ["dropout must be in [0, 1), got 1.5"]


def test_find_problems__weights_of_another_backbone(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"blocks.0.norm1.weight": torch.zeros(7)}, file)
    [problem] = find_problems(experiment(("model.weights", str(file))), str(tmp_path))
    assert problem.startswith(f"model.weights {file}: ")


def test_find_problems__weights_variable_of_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGVIT_WEIGHTS", "/none.safetensors")
    assert find_problems(experiment(), str(tmp_path)) == []
    [problem] = find_problems(experiment(("model.weights", "auto")), str(tmp_path))
    assert problem.startswith("SEGVIT_WEIGHTS: no weights file at /none.safetensors")


def test_find_problems__disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(1, 1, 1_000_000))
    [problem] = find_problems(experiment(), str(tmp_path / "ws"))
    assert "has 0.0 GB free, shards and checkpoints need about 0." in problem


def test_find_problems__elsewhere_only_configuration_and_models_count() -> None:
    config = experiment(("data.dataset", "camvid"), ("data.root", "/none"), ("runtime.use_gpu", True))
    assert find_problems(config, None) == []
    assert all("freeze_blocks 13" in one for one in find_problems(experiment(("train.freeze_blocks", 13)), None))


def test_find_problems__a_cluster_may_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: None))
    assert find_problems(experiment(("runtime.use_gpu", True)), str(tmp_path)) == []


def test_variant_settings__unknown_preset_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"variants.full: preset none: unknown preset 'none'"):
        experiment(("variants.full.preset", "none")).variant_settings("full")
