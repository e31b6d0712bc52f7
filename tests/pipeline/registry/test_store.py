from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import segvit
from pipeline.errors import UserError
from pipeline.records import ModelVersion
from pipeline.registry import models, store
from pipeline.registry.models import ModelReference
from pipeline.registry.store import register_model
from pipeline.workflow.tracking import Tracking

Register = Callable[..., ModelVersion]


def test_register_model__twice_gives_one_version(tracking: Tracking, trained: Any, register: Register) -> None:
    first, again = register(), register()
    assert again == first
    assert (first.version, first.variant, first.evaluation) == (1, "full", trained.evaluation)
    assert first.model_uri == f"models:/{tracking.experiment}/1"
    assert register(trained.scored(0.6)).version == 2
    tags = store.version_tags(tracking, first.name, 1)
    assert tags["segvit.shards_digest"] == "e" * 64
    assert tags["segvit.flow_run"] == "flow"
    assert tags["segvit.miou"] == "0.500000"
    assert store.get_version(tracking, first.name, 1) == first


def test_register_model__loser_of_a_race_yields_to_the_first(
    tracking: Tracking, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    real = store._versions_with

    def blind_at_first(*arguments: Any) -> list[Any]:
        looks.append(arguments)
        return [] if len(looks) in (1, 3) else real(*arguments)

    monkeypatch.setattr(store, "_versions_with", blind_at_first)
    first, second = register(), register()
    assert (len(looks), second) == (4, first)
    assert [one.version for one in models.list_models(tracking, first.name)] == [1]


def test_register_model__refuses_another_checkpoint_s_evaluation(tracking: Tracking, trained: Any) -> None:
    foreign = trained.scored(0.5, checkpoint_digest="0" * 64)
    with pytest.raises(ValueError, match=r"the evaluation is of checkpoint 00000000, not of"):
        register_model(tracking, "x", trained.checkpoint, foreign, trained.shard_set, run_id="r", flow_run_id="f")


def test_register_model__refuses_weights_that_changed(tracking: Tracking, trained: Any, tmp_path: Path) -> None:
    for file in Path(trained.checkpoint.uri).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    tampered = trained.checkpoint.model_copy(update={"uri": str(tmp_path)})
    with pytest.raises(UserError, match=r"model.safetensors changed after training; remove the folder to train again"):
        register_model(tracking, "x", tampered, trained.evaluation, trained.shard_set, run_id="r", flow_run_id="f")


def test_verify_version__tells_what_is_gone(tracking: Tracking, register: Register) -> None:
    version = register()
    assert store.verify_version(version, tracking, {}) is None
    other = version.model_copy(update={"checkpoint_digest": "0" * 64})
    assert store.verify_version(other, tracking, {}) == f"{version.model_uri} is of another checkpoint"
    weights = Path(store.version_location(tracking, version.name, 1)) / "artifacts/checkpoint/model.safetensors"
    weights.unlink()
    assert store.verify_version(version, tracking, {}) == (
        f"{version.model_uri} has lost its files (model.safetensors)"
    )
    tracking.client().delete_model_version(version.name, "1")
    assert str(store.verify_version(version, tracking, {})).startswith(f"model {version.name} has no version 1 in")


def test_register_model__a_version_without_its_files_is_registered_anew(
    tracking: Tracking, register: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    first = register()
    shutil.rmtree(store.version_location(tracking, first.name, 1))
    second = register()
    assert second.version == 2
    assert store.verify_version(second, tracking, {}) is None
    assert capsys.readouterr().out == (
        f"{first.model_uri} has lost its files (model.safetensors, config.json); registering the checkpoint again\n"
    )
    assert register() == second


def test_register_model__a_reliable_latency_replaces_an_unreliable_one(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    unreliable = trained.evaluation.model_copy(update={"latency_reliable": False, "latency_ms": 99.0})
    first = register(unreliable)
    assert store.verify_version(first, tracking, {"evaluation": unreliable}) is None
    assert store.verify_version(first, tracking, {"evaluation": trained.evaluation}) == (
        f"the latency of {first.model_uri} was timed again, reliably"
    )
    second = register()
    assert (second.version, second.evaluation) == (1, trained.evaluation)
    assert second.content_digest() != first.content_digest()
    assert register(unreliable) == second


@pytest.mark.parametrize(
    ("uri", "expected"),
    [("/a b/c", True), ("file:///a", True), ("mlflow-artifacts:/1/models", False), ("s3://bucket/x", False)],
)
def test_is_file_path(uri: str, expected: bool) -> None:
    assert store.is_file_path(uri) == expected


def test_list_models__newest_first_with_aliases(tracking: Tracking, trained: Any, register: Register) -> None:
    register()
    register(trained.scored(0.6))
    store.set_alias(tracking, tracking.experiment, "champion", 1)
    newest, oldest = models.list_models(tracking, tracking.experiment)
    assert (newest.version, newest.miou, newest.aliases, newest.promoted) == (2, 0.6, (), None)
    assert (oldest.version, oldest.miou, oldest.aliases) == (1, 0.5, ("champion",))
    assert (oldest.gflops, oldest.parameters, oldest.latency_ms) == (1.5, 5_000_000, 12.0)
    with pytest.raises(UserError, match=r"unknown model 'nobody'; choose from .*test-"):
        models.list_models(tracking, "nobody")


def test_list_models__empty_without_a_store(tmp_path: Path) -> None:
    assert models.list_models(Tracking.for_workspace(str(tmp_path / "none"))) == []
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_folder__by_version_alias_or_path(
    tracking: Tracking, trained: Any, register: Register, tmp_path: Path
) -> None:
    version = register()
    store.set_alias(tracking, version.name, "champion", 1)
    for model in (f"models:/{version.name}/1", f"models:/{version.name}@champion", trained.checkpoint.uri):
        folder = models.checkpoint_folder(tracking, model, tmp_path / "cache")
        assert (folder / "config.json").read_bytes() == (Path(trained.checkpoint.uri) / "config.json").read_bytes()
        assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/NAME/7", r"models:/.*/7 does not exist; .* has versions 1 and aliases champion"),
        ("models:/NAME@best", r"models:/.*@best does not exist"),
        ("models:/nobody@champion", r"unknown model 'nobody'; choose from"),
        ("models:/NAME", r"is no model; use models:/NAME@champion, models:/NAME/VERSION or a checkpoint folder"),
        ("FOLDER", r"is no checkpoint folder, it has no model.safetensors; a model is models:/NAME@ALIAS"),
    ],
)
def test_checkpoint_folder__tells_what_does_not_exist(
    tracking: Tracking, register: Register, tmp_path: Path, model: str, message: str
) -> None:
    store.set_alias(tracking, register().name, "champion", 1)
    named = model.replace("NAME", tracking.experiment).replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=message):
        models.checkpoint_folder(tracking, named, tmp_path / "cache")


@pytest.mark.parametrize("inference", [{}, {"mode": "slide", "scales": [1.0, 1.5], "flip": True}])
def test_registered_model__loads_without_this_source_tree_and_predicts_as_evaluated(
    tracking: Tracking, trained: Any, register: Register, tmp_path: Path, inference: dict[str, Any]
) -> None:
    version = register(trained.evaluation.model_copy(update={"inference": inference}))
    model, _ = segvit.load_checkpoint(trained.checkpoint.uri)
    images = np.load(Path(trained.evaluation.uri) / "probe/images.npy")
    expected = np.stack([segvit.predict(model, image, **inference).numpy() for image in images])
    np.save(tmp_path / "expected.npy", expected)
    assert len(np.unique(expected)) > 1
    folder = models.model_folder(tracking, ModelReference(version.name, 1), tmp_path / "cache")
    assert [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pyc")] == []
    # MLflow's own way in, from another folder, with nothing of the tree on the path.
    code = f"""
import mlflow, numpy as np
mlflow.set_tracking_uri({tracking.uri!r})
model = mlflow.pyfunc.load_model({version.model_uri!r})
probe = {trained.evaluation.uri!r} + "/probe/"
labels = model.predict(np.load(probe + "images.npy"))
assert labels.dtype == np.int64
assert np.array_equal(labels, np.load({str(tmp_path / "expected.npy")!r}))
assert model.metadata.signature.inputs.inputs[0].shape == (-1,)
sizes = np.empty(2, dtype=object)
sizes[:] = [np.load(probe + "images.npy")[0], np.load(probe + "images.npy")[1, :, :30]]
first, second = model.predict(sizes)
assert np.array_equal(first, labels[0])
assert second.shape == (32, 30)
for wrong, reason in (
    (np.zeros((1, 32, 32, 3), np.float32), "image 0 is float32 and not of integers from 0 to 255; send uint8 RGB"),
    (np.zeros((32, 32, 3), np.uint8), "image 0 has shape (32, 3), not (height, width, 3); send a batch of RGB"),
):
    try:
        model.predict(wrong)
    except mlflow.exceptions.MlflowException as error:
        assert str(error) == reason, error
    else:
        raise AssertionError(reason + ": accepted")
import segvit
print(segvit.__file__)
"""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()).is_relative_to(folder)
