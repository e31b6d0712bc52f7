"""Scoring and registering models that exist: a champion, a checkpoint folder, a file of the published format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import segvit
from flows.cli import app, main
from flows.commands.score import evaluate_settings, pixels
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.registry.models import model_folder, resolve_model
from pipeline.shards.loader import EvalLoader
from pipeline.shards.shards import read_manifest
from pipeline.workflow.tracking import Tracking
from segvit.metrics import ConfusionMatrix, segmentation_metrics
from tests.conftest import FlowRun
from tests.faults.kill_flow import NAME
from tests.flows.facts import facts

FIGURES = ("miou", "macc", "aacc", "boundary_iou", "per_class_iou", "per_class_accuracy", "num_images", "data_digest")


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {name: evaluation[name] for name in FIGURES}


def records_of(run: FlowRun, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    workspace = str(run.workspace)
    [flow] = [one for one in facts(capfd, "runs", "--workspace", workspace) if one["flow"] == NAME][:1]
    tree = facts(capfd, "show", flow["run_id"], "--workspace", workspace)
    return {step["label"]: step["record"] for step in tree["steps"]}


@pytest.mark.usefixtures("one_ray")
def test_evaluate__a_champion_has_the_figures_of_its_flow(flow_run: FlowRun, capfd: pytest.CaptureFixture[str]) -> None:
    workspace = str(flow_run.workspace)
    own = records_of(flow_run, capfd)["evaluate/full"]
    found = facts(capfd, "evaluate", f"models:/{NAME}@champion", flow_run.config, "--workspace", workspace)
    assert figures(found["evaluation"]) == figures(own)
    assert found["evaluation"]["checkpoint_digest"] == own["checkpoint_digest"]
    assert found["paper"] is None
    scores = json.loads(Path(found["evaluation"]["uri"], "images.json").read_text())
    assert [image["key"] for image in found["images"]] == [image["key"] for image in scores]


@pytest.mark.usefixtures("one_ray")
def test_evaluate__a_champion_like_another_version_is_kept_for_the_gate(
    flow_run: FlowRun, few_scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records, workspace = records_of(flow_run, capfd), ("--workspace", str(tmp_path / "own"))
    folder, shards = records["train/full"]["uri"], records["prepare"]["uri"]
    facts(capfd, "evaluate", folder, shards, *workspace)
    facts(capfd, "register", folder, "--name", "grown", *workspace)
    facts(capfd, "promote", "grown", "1", "--policy", str(few_scenes), *workspace)
    facts(capfd, "evaluate", folder, shards, "--flip", *workspace)
    facts(capfd, "register", folder, "--name", "grown", *workspace)
    found = facts(capfd, "evaluate", "models:/grown@champion", "models:/grown/2", *workspace)
    assert found["kept_with"] == "models:/grown/1"
    assert found["evaluation"]["inference"] == {"flip": True}
    decision = facts(capfd, "promote", "grown", "2", "--policy", str(few_scenes), *workspace)
    assert decision["promoted"]
    assert decision["champion_scores"]["rescored"]
    assert decision["champion_scores"]["run_id"] == found["run_id"]


@pytest.mark.usefixtures("one_ray")
def test_evaluate__windows_scales_and_flip_are_those_of_predict_and_register(
    flow_run: FlowRun, few_scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint folder and a shard set from elsewhere, in a new workspace."""
    records = records_of(flow_run, capfd)
    folder, shards = records["train/full"]["uri"], records["prepare"]["uri"]
    workspace = ("--workspace", str(tmp_path / "own"))
    options = ("--window", "48x64", "--stride", "32x48", "--scales", "0.75,1.0", "--flip")
    found = facts(capfd, "evaluate", folder, shards, *options, *workspace)
    inference: dict[str, Any] = {
        "mode": "slide",
        "crop": [48, 64],
        "stride": [32, 48],
        "scales": [0.75, 1.0],
        "flip": True,
    }
    assert found["evaluation"]["inference"] == inference
    model, _ = segvit.load_checkpoint(folder)
    confusion = ConfusionMatrix(model.num_classes)
    record = read_manifest(shards).to_record(shards)
    for sample in EvalLoader(record, split="val", rank=0, world_size=1, num_workers=0):
        confusion.update(segvit.predict(model, sample.image, **inference), sample.label)
    assert found["evaluation"]["miou"] == segmentation_metrics(confusion.matrix).miou
    written = json.loads(Path(found["evaluation"]["uri"], "confusion.json").read_text())
    assert np.array_equal(written["matrix"], confusion.matrix)

    version = facts(capfd, "register", folder, "--name", "other", *workspace)["version"]
    assert (version["name"], version["version"], version["variant"]) == ("other", 1, "full")
    assert version["evaluation"] == found["evaluation"]
    decision = facts(capfd, "promote", "other", "1", "--policy", str(few_scenes), *workspace)
    assert decision["promoted"] is True
    # Of the registered one: as it was registered, without an option.
    again = facts(capfd, "evaluate", "models:/other@champion", shards, *workspace)
    assert {name: again["evaluation"][name] for name in FIGURES} == {
        name: version["evaluation"][name] for name in FIGURES
    }
    assert again["evaluation"]["inference"] == inference


@pytest.fixture
def few_scenes(tmp_path: Path) -> Path:
    """The policy for a val split that is too small to show all digits."""
    (tmp_path / "policy.yaml").write_text("unmeasured_classes: allow\n")
    return tmp_path / "policy.yaml"


@pytest.fixture(scope="module")
def published_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, segvit.SegViT]:
    """A file as the authors write theirs, the experiment that describes it, and the model that is in it."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    options = {"embed_dim": 48, "depth": 4, "num_heads": 3}
    model: dict[str, Any] = {
        "backbone": "vit_base_patch16_384",
        "backbone_options": options,
        "image_size": [64, 64],
        "structure": "shrunk",
        "out_layers": [1, 3],
        "shrink_at": 2,
        "decoder_layers": 1,
        "decoder_width": 48,
        "class_token": False,
        "input_projection": True,
    }
    own = segvit.build_model(segvit.ModelConfig.from_dict(model), 11).eval()
    torch.save({"meta": {"iter": 3}, "state_dict": segvit.published_state_dict(own)}, folder / "shrunk.pth")
    experiment = {
        "name": "published",
        "data": {
            "dataset": "digits",
            "samples_per_shard": 4,
            "digits": {"num_train": 4, "num_val": 3, "image_size": 96},
        },
        "model": {**model, "weights": "random"},
        "variants": {"published": {}},
        "train": {
            **{"steps": 1, "batch_size": 2, "warmup_steps": 0},
            **{"validate_every_steps": 1, "checkpoint_every_steps": 1},
        },
        "tune": {"num_trials": 0},
        "evaluate": {"num_examples": 1, "latency_repeats": 1},
        "promote": {"unmeasured_classes": "allow"},
    }
    (folder / "published.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "shrunk.pth", folder / "published.yaml", own


@pytest.mark.usefixtures("one_ray")
def test_evaluate__a_file_of_the_published_format_is_scored_registered_promoted_and_served(
    published_file: tuple[Path, Path, segvit.SegViT],
    few_scenes: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    file, config, model = published_file
    workspace = ("--workspace", str(tmp_path / "own"))
    found = facts(capfd, "evaluate", str(file), str(config), *workspace)
    assert found["evaluation"]["variant"] == "published"
    assert found["evaluation"]["num_images"] == 3
    version = facts(capfd, "register", str(file), "--name", "paper", "--evaluation", found["run_id"], *workspace)
    decision = facts(capfd, "promote", "paper", "1", "--policy", str(few_scenes), *workspace)
    assert decision["champion_after"] == version["version"]["version"]
    image = np.random.default_rng(0).integers(0, 255, (1, 64, 80, 3), dtype=np.uint8)
    tracking = Tracking.for_workspace(str(tmp_path / "own"))
    folder = model_folder(tracking, resolve_model(tracking, "models:/paper@champion"), tmp_path / "served")
    served = mlflow.pyfunc.load_model(str(folder)).predict(image)
    expected = segvit.predict(model, torch.from_numpy(image[0]).permute(2, 0, 1))
    assert np.array_equal(np.asarray(served)[0], expected.numpy())

    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    arguments = ["register", str(tmp_path / "other.pth"), "--name", "paper", *workspace]
    refused = CliRunner().invoke(app, arguments).exception
    assert isinstance(refused, UserError)
    assert re.fullmatch(
        r"run \w+ \(register\) did not score .*other.pth; score it with segvit evaluate, .*", str(refused)
    )


def test_evaluate__a_file_with_code_in_it_is_refused_in_one_line(
    published_file: tuple[Path, Path, segvit.SegViT], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "was-run",)

    torch.save({"state_dict": {"a": Malicious()}}, tmp_path / "bad.pth")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path / "bad.pth"), str(published_file[1]), "--workspace", str(tmp_path / "own")])
    assert ended.value.code == 1
    said = capfd.readouterr().err
    [line] = [one for one in said.splitlines() if "import_published:" in one]
    assert "needs pickled classes, or is no torch file, and is not loaded" in line
    assert "Traceback" not in said
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{tmp}/nothing", "{config}"),
            r"nothing is no checkpoint folder, it has no model.safetensors; a model is",
        ),
        (("{tmp}/nothing.pth", "{config}"), r"^no file at .*nothing.pth; a model is models:/NAME@ALIAS, a checkpoint"),
        (
            ("{file}", "{tmp}"),
            r"^no shard set at .*DATA is an experiment file, a shard set's folder or a version that was scored on one$",
        ),
        (
            ("{file}", "{config}", "--variant", "fast"),
            r"^no variant 'fast' in published; .*--variant published$",
        ),
        (("{file}", "{config}", "--window", "12y"), r"^--window 12y must be two numbers of pixels, as 512x640"),
        (("{file}", "{config}", "--scales", "1;2"), r"^--scales 1;2 must be numbers with commas between"),
        (("{file}", "{config}", "--stride", "8"), r"crop and stride have no meaning in mode whole"),
        (("{file}", "{tmp}", "--set", "name=x"), r"^--set name=x needs an experiment file"),
    ],
)
def test_evaluate__misfits_are_told_before_ray_starts(
    arguments: tuple[str, ...], message: str, published_file: tuple[Path, Path, segvit.SegViT], tmp_path: Path
) -> None:
    places = {"tmp": str(tmp_path), "config": str(published_file[1]), "file": str(published_file[0])}
    filled = [one.format(**places) for one in arguments]
    result = CliRunner().invoke(app, ["evaluate", *filled, "--workspace", str(tmp_path / "own")])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).partition("\n")[0]
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_evaluate_settings__what_is_asked_replaces_what_the_experiment_says() -> None:
    base = EvaluateConfig.model_validate(
        {"split": "test", "inference": {"mode": "slide", "crop": [64, 64], "flip": True}}
    )
    asked = {"split": None, "resize": "128x96", "scales": "0.5,1", "flip": False, "window": None, "stride": "32"}
    asked["precision"] = "bf16"
    found = evaluate_settings(base.model_dump(mode="json"), asked)
    assert found.split == "test"
    assert found.inference.options() == {
        "mode": "slide",
        "crop": [64, 64],
        "stride": [32, 32],
        "resize": [128, 96],
        "scales": [0.5, 1.0],
        "precision": "bf16",
    }
    changed = {**asked, "stride": None, "window": "whole", "precision": "model"}
    whole = evaluate_settings(found.model_dump(mode="json"), changed)
    assert whole.inference.options() == {"resize": [128, 96], "scales": [0.5, 1.0]}
    assert pixels("--window", "512") == [512, 512]
