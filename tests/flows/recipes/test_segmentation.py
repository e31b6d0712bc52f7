"""The whole flow on a local Ray, small: six steps of a tiny backbone on a dozen scenes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "dataset": "digits",
        "samples_per_shard": 6,
        "digits": {"num_train": 12, "num_val": 6, "image_size": 96},
    },
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "weights": "random",
        "image_size": [48, 64],
        "decoder_layers": 1,
        "dropout": 0.0,
    },
    "variants": {
        "full": {"structure": "cascade", "out_layers": [1, 3]},
        "shrunk": {"structure": "shrunk", "shrink_at": 2, "localize_upsampling": True},
    },
    "train": {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup_steps": 1,
        "validate_every_steps": 2,
        "checkpoint_every_steps": 2,
    },
    "tune": {"num_trials": 2, "steps": 2, "report_every_steps": 1, "max_val_samples": 2},
    "evaluate": {"num_examples": 1, "latency_repeats": 1},
    "runtime": {"num_workers": 2, "log_every_steps": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace after one run, and the experiment's file; two training workers."""
    folder = tmp_path_factory.mktemp("flow")
    config = folder / "tiny.yaml"
    # Trials share two CPUs with their workers, so one at a time.
    experiment = EXPERIMENT | {"runtime": EXPERIMENT["runtime"] | {"trials_at_once": 1}}
    config.write_text(yaml.safe_dump(experiment))
    main(["run", str(config), "--workspace", str(folder / "workspace")])
    return folder / "workspace", str(config)


def facts(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capfd.readouterr()
    main([*arguments, "--json"])
    return json.loads(capfd.readouterr().out)


def test_run__second_time_reuses_every_step_without_ray(
    finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    workspace, config = finished
    started = time.monotonic()
    summary = facts(capfd, "run", config, "--workspace", str(workspace))
    assert time.monotonic() - started < 20
    assert not ray.is_initialized()
    tree = facts(capfd, "show", summary["run_id"], "--workspace", str(workspace))
    assert {step["state"] for step in tree["steps"]} == {"reused"}
    assert len(tree["steps"]) == 11
    runs = facts(capfd, "runs", "--workspace", str(workspace))
    assert [run["state"] for run in runs] == ["finished", "finished"]


def test_plan__changed_loss_weight_trains_again_but_does_not_prepare(
    finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, config = finished
    steps = facts(capfd, "plan", config, "--workspace", str(workspace), "--set", "loss.dice=3")
    cached = {step["label"]: step["cached"] for step in steps}
    assert cached["prepare"]
    assert cached["fetch_backbone"]
    assert not cached["tune"]
    assert not cached["train/full"]
    steps = facts(capfd, "plan", config, "--workspace", str(workspace), "--set", "runtime.log_every_steps=7")
    assert all(step["cached"] for step in steps)


def test_run__registers_both_variants_and_promotes_the_better(
    finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, _ = finished
    models = facts(capfd, "models", "tiny", "--workspace", str(workspace))
    assert sorted(model["variant"] for model in models) == ["full", "shrunk"]
    [champion] = [model for model in models if "champion" in model["aliases"]]
    assert champion["miou"] == max(model["miou"] for model in models)
    assert "candidate" in champion["aliases"]
    assert champion["promoted"] is True
    assert champion["gflops"] > 0.02


def test_run__search_trials_are_visible_and_their_best_weights_trained_with(
    finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    from pipeline.workflow.tracking import Tracking

    workspace, _ = finished
    tree = facts(capfd, "show", "latest", "--workspace", str(workspace))
    records = {step["label"]: step["record"] for step in tree["steps"]}
    trials = json.loads(Path(records["tune"]["trials_uri"]).read_text())
    assert len(trials) == 2
    assert set(trials[0]["values"]) == {"loss.class", "loss.focal", "loss.dice"}
    assert trials[0]["values"] != trials[1]["values"]
    chosen = [trial for trial in trials if trial["values"] == records["tune"]["values"]]
    assert chosen[0]["miou"] == max(trial["miou"] for trial in trials)
    tracking = Tracking.for_workspace(str(workspace))
    logged = list(tracking.runs("tags.`segvit.kind` = 'trial'"))
    assert len(logged) == 2
    assert {run.info.status for run in logged} == {"FINISHED"}


def test_run__training_metrics_reach_mlflow(finished: tuple[Path, str]) -> None:
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(str(finished[0]))
    [run] = [run for run in tracking.runs("tags.`segvit.label` = 'train/full'") if "total" in run.data.metrics]
    totals = tracking.client().get_metric_history(run.info.run_id, "total")
    assert [metric.step for metric in totals] == [1, 2, 3, 4]
    assert 0.0 <= run.data.metrics["val_miou"] <= 1.0


def test_run__report_and_prediction(finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    workspace, _ = finished
    tree = facts(capfd, "show", "latest", "--workspace", str(workspace))
    records = {step["label"]: step["record"] for step in tree["steps"]}
    page = Path(records["report"]["uri"]).read_text()
    assert records["promote"]["reason"] in page
    assert page.count("<svg") >= 4
    example = next(Path(records["evaluate/full"]["uri"]).glob("examples/*-image.jpg"))
    written = facts(
        capfd,
        "predict",
        "models:/tiny@champion",
        str(example),
        "--out",
        str(workspace / "predicted"),
        "--workspace",
        str(workspace),
    )
    assert Path(written[0]["overlay"]).is_file()
    assert sum(written[0]["classes"].values()) == pytest.approx(1.0)


def test_run__failed_data_gives_one_line_and_exit_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    experiment = EXPERIMENT | {"data": {"dataset": "camvid", "root": str(tmp_path / "data")}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(experiment))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "bad.yaml"), "--workspace", str(tmp_path / "ws")])
    printed = capfd.readouterr()
    assert ended.value.code == 1
    assert "error: " in printed.err
    assert "trainannot" in printed.err
    assert "Traceback" not in printed.err
