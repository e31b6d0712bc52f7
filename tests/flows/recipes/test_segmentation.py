"""The whole flow on a local Ray, small: a tiny backbone on a dozen scenes, and what is to be seen afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from pipeline.workflow.step_log import LOG_ARTIFACT, log_uri, read_log
from pipeline.workflow.tracking import Tracking
from tests.conftest import FlowRun
from tests.faults.kill_flow import EXPERIMENT, NAME, STEPS
from tests.flows.facts import facts


def test_run__second_time_reuses_every_step_without_ray(flow_run: FlowRun, capfd: pytest.CaptureFixture[str]) -> None:
    import ray

    workspace, config, _ = flow_run
    started = time.monotonic()
    summary = facts(capfd, "run", config, "--workspace", str(workspace))
    assert time.monotonic() - started < 20
    assert not ray.is_initialized()
    tree = facts(capfd, "show", summary["run_id"], "--workspace", str(workspace))
    assert {step["state"] for step in tree["steps"]} == {"reused"}
    assert len(tree["steps"]) == len(STEPS)
    runs = facts(capfd, "runs", "--workspace", str(workspace))
    assert {run["state"] for run in runs} == {"finished"}


def test_plan__more_steps_go_on_from_the_training_that_is_there(
    flow_run: FlowRun, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, config, _ = flow_run
    done = EXPERIMENT["train"]["steps"]
    longer = ("--set", f"train.steps={done + 2}", "--set", f"train.continue_after={done}")
    steps = {step["label"]: step for step in facts(capfd, "plan", config, "--workspace", str(workspace), *longer)}
    assert steps[f"train/full/first-{done}"]["cached"]
    assert not steps["train/full"]["cached"]
    assert f"train/full/first-{done}" in steps["train/full"]["depends_on"]
    # Another training than one of as many steps in one go.
    in_one_go = facts(capfd, "plan", config, "--workspace", str(workspace), "--set", f"train.steps={done + 2}")
    prints = {step["label"]: step["fingerprint"] for step in in_one_go}
    assert prints["train/full"] != steps["train/full"]["fingerprint"]


def test_plan__changed_loss_weight_trains_again_but_does_not_prepare(
    flow_run: FlowRun, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, config, _ = flow_run
    steps = facts(capfd, "plan", config, "--workspace", str(workspace), "--set", "loss.dice=3")
    cached = {step["label"]: step["cached"] for step in steps}
    assert cached["prepare"]
    assert cached["fetch_backbone"]
    assert not cached["tune"]
    assert not cached["train/full"]
    steps = facts(capfd, "plan", config, "--workspace", str(workspace), "--set", "runtime.log_every_steps=7")
    assert all(step["cached"] for step in steps)
    # What changes no result throws nothing away but the page that shows the settings.
    raised = [
        *("train.keep_checkpoints=5", "train.checkpoint_every_steps=3", "tune.max_failed_fraction=0.9"),
        *("tune.trial_retries=3", "evaluate.latency_repeats=3", "data.max_quarantined_fraction=0.5"),
    ]
    overrides = [word for one in raised for word in ("--set", one)]
    steps = facts(capfd, "plan", config, "--workspace", str(workspace), *overrides)
    assert [step["label"] for step in steps if not step["cached"]] == ["report"]
    steps = facts(capfd, "plan", config, "--workspace", str(workspace), "--set", "tune.num_trials=3")
    [tune] = [step for step in steps if step["label"] == "tune"]
    assert (tune["cached"], tune["note"]) == (False, "it made 2 trials, 3 are asked for now")


def test_run__registers_and_promotes(flow_run: FlowRun, capfd: pytest.CaptureFixture[str]) -> None:
    workspace = flow_run.workspace
    models = facts(capfd, "models", NAME, "--workspace", str(workspace))
    [champion] = models
    assert champion["variant"] == "full"
    assert set(champion["aliases"]) == {"candidate", "champion"}
    assert champion["promoted"] is True
    assert champion["gflops"] > 0.02


def test_run__search_trials_are_visible_and_their_best_weights_trained_with(
    flow_run: FlowRun, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipeline.workflow.tracking import Tracking

    workspace = flow_run.workspace
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


def test_run__training_metrics_reach_mlflow(flow_run: FlowRun) -> None:
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(str(flow_run.workspace))
    [run] = [run for run in tracking.runs("tags.`segvit.label` = 'train/full'") if "total" in run.data.metrics]
    totals = tracking.client().get_metric_history(run.info.run_id, "total")
    assert [metric.step for metric in totals] == list(range(1, EXPERIMENT["train"]["steps"] + 1))
    assert 0.0 <= run.data.metrics["val_miou"] <= 1.0


def test_run__what_trials_and_training_workers_print_is_in_their_step_s_log(flow_run: FlowRun) -> None:
    tracking = Tracking.for_workspace(str(flow_run.workspace))
    [trained] = [run for run in tracking.runs("tags.`segvit.label` = 'train/full'") if "segvit.done" in run.data.tags]
    flow = trained.data.tags["mlflow.parentRunId"]
    for label, last in (("tune", "trial 0001  finished at step 4/4  mIoU"), ("train/full", "full  step 6/6  val mIoU")):
        text = read_log(log_uri(str(flow_run.workspace), flow, label))
        assert f"  {last}" in text
    assert tracking.read_text(trained.info.run_id, LOG_ARTIFACT) == text


def test_run__report_and_prediction(flow_run: FlowRun, capfd: pytest.CaptureFixture[str]) -> None:
    workspace = flow_run.workspace
    tree = facts(capfd, "show", "latest", "--workspace", str(workspace))
    records = {step["label"]: step["record"] for step in tree["steps"]}
    page = Path(records["report"]["uri"]).read_text()
    assert records["promote"]["reason"] in page
    assert page.count("<svg") >= 4
    example = next(Path(records["evaluate/full"]["uri"]).glob("examples/*-image.jpg"))
    written = facts(
        capfd,
        "predict",
        f"models:/{NAME}@champion",
        str(example),
        "--out",
        str(workspace / "predicted"),
        "--workspace",
        str(workspace),
    )
    (predicted,) = written["predicted"]
    assert Path(predicted["overlay"]).is_file()
    assert sum(predicted["classes"].values()) == pytest.approx(1.0)


def test_run__a_variant_starts_from_the_champion_and_another_from_that(
    flow_run: FlowRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = str(flow_run.workspace)
    tree: dict[str, Any] = yaml.safe_load(Path(flow_run.config).read_text())
    shrunk = {"structure": "anchored", "shrink_at": 2}
    tree["recipe"] = "train"
    tree["variants"] |= {
        "smaller": {**shrunk, "start_from": "small", "keep_unlike": 0.0, "train": {"steps": 0}},
        "small": {**shrunk, "start_from": f"models:/{NAME}@champion", "train": {"steps": 2}},
    }
    config = tmp_path / "start.yaml"
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    steps = {step["label"]: step for step in facts(capfd, "plan", str(config), "--workspace", workspace)}
    assert steps["train/full"]["cached"]
    fetched = f"fetch_model/{NAME}-1"
    assert steps["train/small"]["depends_on"][-1] == fetched
    assert steps["train/smaller"]["depends_on"][-1] == "train/small"
    main(["run", str(config), "--workspace", workspace])
    said = capfd.readouterr().out
    assert f"small  starts from models:/{NAME}/1 (step" in said
    assert "smaller  starts from small (step 2): backbone and decoder taken" in said
    tree = facts(capfd, "show", "latest", "--workspace", workspace)
    records = {step["label"]: step["record"] for step in tree["steps"]}
    assert records[fetched]["digest"] == records["train/full"]["digest"]
    assert records["train/small"]["started_from"] == f"models:/{NAME}/1"
    assert records["train/small"]["step"] == 2
    page = Path(records["report"]["uri"]).read_text()
    row = page[page.index("started from") :]
    assert row.index("pretrained backbone") < row.index(">small<") < row.index(f"models:/{NAME}/1")
    # Nothing new: the alias still names that version.
    again = facts(capfd, "plan", str(config), "--workspace", workspace)
    assert all(step["cached"] for step in again)
    main_error = [
        "plan",
        str(config),
        "--workspace",
        workspace,
        "--set",
        f"variants.small.start_from=models:/{NAME}@best",
    ]
    with pytest.raises(SystemExit) as refused:
        main(main_error)
    assert refused.value.code == 1
    problem = capfd.readouterr().err
    assert (
        f"variants.small.start_from: models:/{NAME}@best does not exist; {NAME} has versions 1 and aliases" in problem
    )


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
