"""A workspace that was moved: its store follows it, a copy of it is told from it."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from pipeline.errors import UserError
from pipeline.records import ModelVersion, Report
from pipeline.registry import models, store
from pipeline.registry.artifact_check import reproduces
from pipeline.registry.models import ModelReference
from pipeline.workflow import liveness
from pipeline.workflow.execution import Outcome, StepRequest, execute_step, look_up
from pipeline.workflow.step import Step, StepContext, step
from pipeline.workflow.tracking import Tag, Tracking


@step(version=1)
def write(context: StepContext) -> Report:
    target = Path(context.output_uri("report.txt"))
    target.parent.mkdir(parents=True)
    target.write_text("report")
    return Report(uri=str(target), digest="d")


@step(version=1)
def write_more(context: StepContext) -> Report:
    return write(context)


def execute(made: Step[..., Any], tracking: Tracking, workspace: Path) -> Outcome:
    tags = {Tag.KIND: "flow", **liveness.identity_tags()}
    flow = tracking.client().create_run(tracking.experiment_id(), tags=tags)
    return execute_step(
        StepRequest(
            step=made,
            label=made.name,
            arguments={},
            depends_on=(),
            workspace=str(workspace),
            tracking=tracking,
            flow="test",
            flow_run_id=flow.info.run_id,
        )
    )


@pytest.fixture
def moved(trained: Any, tmp_path: Path) -> tuple[Path, Path, Outcome, ModelVersion]:
    """A workspace with a finished step and a champion, and where it is to be moved to."""
    old, new = tmp_path / "old space", tmp_path / "new"
    tracking = Tracking.for_workspace(str(old))
    done = execute(write, tracking, old)
    evaluation = Path(old / "evaluate" / "0123456789abcdef")
    shutil.copytree(trained.evaluation.uri, evaluation)
    version = store.register_model(
        tracking,
        "m",
        trained.checkpoint,
        trained.evaluation.model_copy(update={"uri": str(evaluation)}),
        trained.shard_set,
        run_id=str(done.run_id),
        flow_run_id="flow",
    )
    store.set_alias(tracking, "m", "champion", version.version)
    end_flows(tracking)
    return old, new, done, version


def end_flows(tracking: Tracking) -> None:
    for run in tracking.runs("attributes.status = 'RUNNING'"):
        tracking.client().set_terminated(run.info.run_id, "FINISHED")


def test_for_workspace__moved_everything_is_found_where_it_is(
    moved: tuple[Path, Path, Outcome, ModelVersion], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, done, version = moved
    old.rename(new)
    there = Tracking.for_workspace(str(new))
    assert there == Tracking(f"sqlite:///{new}/mlflow.db", "segvit", str(new / "mlartifacts"))
    assert f"{new} was moved from {old}; " in caplog.text
    assert store.verify_version(version, there, {}) is None
    folder = models.checkpoint_folder(there, "models:/m@champion", tmp_path / "unused")
    assert (folder / "model.safetensors").is_relative_to(new)
    evaluation = store.get_version(there, "m", version.version).evaluation
    assert Path(evaluation.uri) == new / "evaluate" / "0123456789abcdef"
    assert reproduces(models.model_folder(there, ModelReference("m", 1), tmp_path), evaluation).passed
    found = look_up(there, write, write.fingerprint({}), {})
    assert isinstance(found.record, Report)
    assert isinstance(done.record, Report)
    assert (found.record.uri, found.run_id) == (str(new / Path(done.record.uri).relative_to(old)), done.run_id)
    with closing(sqlite3.connect(new / "mlflow.db")) as connection:
        left = connection.execute("SELECT key FROM tags WHERE instr(value, ?)", (str(old),)).fetchall()
    assert left == [("segvit.moved_from",)]

    # What is written now names the new place, and a second move takes both along.
    execute(write_more, there, new)
    end_flows(there)
    third = tmp_path / "third"
    new.rename(third)
    last = Tracking.for_workspace(str(third))
    for one in (write, write_more):
        record = look_up(last, one, one.fingerprint({}), {}).record
        assert isinstance(record, Report)
        assert Path(record.uri).is_relative_to(third)
    # And back again: as if nothing had been.
    third.rename(old)
    record = look_up(Tracking.for_workspace(str(old)), write, write.fingerprint({}), {}).record
    assert record == done.record


def test_for_workspace__a_copy_is_refused_and_what_was_begun_anew_at_the_old_place_is_none(
    moved: tuple[Path, Path, Outcome, ModelVersion], capfd: pytest.CaptureFixture[str]
) -> None:
    old, new, _, _ = moved
    shutil.copytree(old, new)
    message = f"{new} is a copy of {old}, and its records and models name the files there; use {old}, or remove that"
    with pytest.raises(SystemExit) as ended:
        main(["models", "--workspace", str(new)])
    assert ended.value.code == 1
    assert capfd.readouterr().err.strip().startswith(f"error: {message}")
    shutil.rmtree(old)
    Tracking.for_workspace(str(old)).experiment_id()
    assert models.list_models(Tracking.for_workspace(str(new)))[0].aliases == ("champion",)


def test_for_workspace__while_a_flow_is_at_work_nothing_moves(moved: tuple[Path, Path, Outcome, ModelVersion]) -> None:
    old, new, _, _ = moved
    tracking = Tracking.for_workspace(str(old))
    tags = {Tag.KIND: "flow", **liveness.identity_tags()}
    running = tracking.client().create_run(tracking.experiment_id(), tags=tags).info.run_id
    old.rename(new)
    with pytest.raises(UserError, match=rf"; run {running[:12]} is at work there: end it or wait for it, then try"):
        Tracking.for_workspace(str(new))
    with closing(sqlite3.connect(new / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE tags SET value = '1.0' WHERE key = ?", (liveness.STARTED_TAG,))
    assert Tracking.for_workspace(str(new)).uri == f"sqlite:///{new}/mlflow.db"


def test_for_workspace__with_a_link_at_the_old_place_nothing_is_changed(
    moved: tuple[Path, Path, Outcome, ModelVersion],
) -> None:
    old, new, done, _ = moved
    old.rename(new)
    old.symlink_to(new)
    there = Tracking.for_workspace(str(new))
    assert look_up(there, write, write.fingerprint({}), {}).record == done.record


def test_for_workspace__what_is_no_store_of_ours_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").mkdir()
    for content in (b"", b"no database"):
        (tmp_path / "mlflow.db").write_bytes(content)
        assert Tracking.for_workspace(str(tmp_path)).uri == f"sqlite:///{tmp_path}/mlflow.db"
