"""Every preset from an experiment file: planned on a miniature of ADE20K's tree, and three trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from flows.cli import main
from pipeline.config import RuntimeConfig
from pipeline.config.file import parse_config
from pipeline.records import BackboneRecord
from pipeline.shards.prepare import prepare_shards
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from segvit.presets import PRESETS
from tests.pipeline.datasets.test_ade20k import make_ade20k

TRAIN: dict[str, Any] = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "validate_every_steps": 2}
SMALL = {"backbone_options": {"embed_dim": 48, "num_heads": 3}, "image_size": [32, 48], "decoder_layers": 1}


def experiment(root: Path, preset: str, **model: Any) -> dict[str, Any]:
    return {
        "name": "preset",
        "data": {
            "dataset": "ade20k",
            "root": str(root),
            "on_bad_sample": "quarantine",
            "max_quarantined_fraction": 0.5,
        },
        "model": {"preset": preset, "weights": "random", **model},
        "variants": {"full": {}},
        "train": TRAIN | {"checkpoint_every_steps": 2},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ade20k(tmp_path_factory.mktemp("ade20k"))


def test_presets__there_are_54() -> None:
    assert len(PRESETS) == 55


def test_plan__every_preset_fits(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their checkpoints would take half a terabyte.
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1 << 50))
    tree = experiment(root, "ade20k_vit_base")
    tree["model"] = {"weights": "random"}
    tree["variants"] = {name: {"preset": name} for name in PRESETS}
    config = tmp_path / "presets.yaml"
    config.write_text(yaml.safe_dump(tree))
    main(["plan", str(config), "--workspace", str(tmp_path / "ws"), "--json"])
    labels = [step["label"] for step in json.loads(capfd.readouterr().out)]
    assert {label for label in labels if label.startswith("train/")} == {f"train/{name}" for name in PRESETS}
    backbones = {preset.model.backbone for preset in PRESETS.values()}
    assert sum(label.startswith("fetch_backbone/") for label in labels) == len(backbones)


@pytest.mark.parametrize("preset", ["ade20k_vit_base", "ade20k_vit_large_shrunk", "ablation_linear_cross_entropy"])
def test_train__two_steps_of_a_narrow_one(preset: str, root: Path, tmp_path: Path) -> None:
    config = parse_config(experiment(root, preset, **SMALL))
    settings = config.variant_settings("full")
    backbone = settings.model["backbone"]
    job = TrainJob(
        variant="full",
        settings=settings,
        shard_set=prepare_shards(config.data, str(tmp_path / "shards"), progress=lambda _line: None),
        backbone=BackboneRecord(backbone=backbone, uri=None, digest="random", source="random", message=""),
        runtime=RuntimeConfig(log_every_steps=1),
        save_checkpoints=False,
    )
    lines: list[str] = []
    state = run_training(
        job, DistributedContext(0, 1, torch.device("cpu")), lambda _metrics, _folder: None, log=lines.append
    )
    assert state.step == 2
    assert 0.0 <= state.best_miou <= 1.0
    terms = {"cross_entropy"} if "cross_entropy" in preset else {"class", "focal", "dice"}
    assert all(term in lines[0] for term in terms)
    assert [row["step"] for row in state.history if "total" in row] == [1, 2]
