"""A workspace that was moved: told by every command, and mended by a link at the old place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from pipeline.errors import UserError
from pipeline.records import Report
from pipeline.registry import models, store
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


def test_for_workspace__moved_it_is_refused_and_with_a_link_it_is_as_before(
    trained: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old space", tmp_path / "new"
    tracking = Tracking.for_workspace(str(old))
    done = execute(write, tracking, old)
    version = store.register_model(
        tracking,
        "m",
        trained.checkpoint,
        trained.evaluation,
        trained.shard_set,
        run_id=str(done.run_id),
        flow_run_id="flow",
    )
    store.set_alias(tracking, "m", "champion", version.version)
    assert Tracking.for_workspace(str(old)) == tracking

    shutil.copytree(old, new)
    with pytest.raises(UserError, match=rf"^{new} is a copy of {old}, .*; use {old}, or remove that and run ln -s"):
        Tracking.for_workspace(str(new))
    shutil.rmtree(old)
    link = f"ln -s {new} '{old}'"
    moved = f"{new} was moved from {old}, and its records and models name the files there; move it back, or run {link}"
    for uri in (None, f"sqlite:///{new}/mlflow.db"):
        with pytest.raises(UserError) as raised:
            Tracking.for_workspace(str(new), uri)
        assert str(raised.value) == moved
    with pytest.raises(SystemExit) as ended:
        main(["models", "--workspace", str(new)])
    assert ended.value.code == 1
    assert capfd.readouterr().err.strip() == f"error: {moved}"
    assert not old.exists()

    old.symlink_to(new)
    there = Tracking.for_workspace(str(new))
    assert there.uri == f"sqlite:///{new}/mlflow.db"
    assert store.verify_version(version, there, {}) is None
    folder = models.checkpoint_folder(there, "models:/m@champion", tmp_path / "unused")
    assert (folder / "model.safetensors").resolve().is_relative_to(new)
    found = look_up(there, write, write.fingerprint({}), {})
    assert (found.record, found.run_id) == (done.record, done.run_id)


def test_for_workspace__what_is_no_store_of_ours_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").mkdir()
    for content in (b"", b"no database"):
        (tmp_path / "mlflow.db").write_bytes(content)
        assert Tracking.for_workspace(str(tmp_path)).uri == f"sqlite:///{tmp_path}/mlflow.db"
