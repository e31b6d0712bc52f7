from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Report
from pipeline.workflow import execution
from pipeline.workflow.execution import StepRef, StepRequest, execute_step
from pipeline.workflow.graph import Graph, Plan
from pipeline.workflow.step import Step, StepContext, step
from pipeline.workflow.tracking import Tag, Tracking

ROOT = Path(__file__).parents[3]


@step(version=1)
def prepare(context: StepContext, text: str) -> Report:
    return Report(uri=context.workspace, digest=text)


@step(version=3)
def train(context: StepContext, shards: Report, steps: int = 3) -> Report:
    raise AssertionError("planning executes nothing")


def remember(tracking: Tracking, workspace: Path, made: Step[..., Any], *args: Any) -> None:
    flow = tracking.client().create_run(tracking.experiment_id(), tags={Tag.KIND: "flow"})
    request = StepRequest(
        step=made,
        label=made.name,
        arguments=made.bind(args, {}),
        depends_on=(),
        workspace=str(workspace),
        tracking=tracking,
        flow="test",
        flow_run_id=flow.info.run_id,
    )
    assert execute_step(request).record is not None


def two_branches(flow: Graph) -> None:
    shards = flow.step(prepare, "t")
    for name in ("full", "shrunk"):
        flow.step(train, shards, len(name), label=f"train/{name}")


def test_plan__cached_and_to_run(tracking: Tracking, tmp_path: Path) -> None:
    remember(tracking, tmp_path, prepare, "t")
    before = len(list(tracking.runs("")))
    with Plan(str(tmp_path), tracking) as plan:
        two_branches(plan)
    assert [(one.label, one.step, one.version, one.cached, one.depends_on) for one in plan.steps] == [
        ("prepare", "prepare", 1, True, ()),
        ("train/full", "train", 3, False, ("prepare",)),
        ("train/shrunk", "train", 3, False, ("prepare",)),
    ]
    assert plan.complete
    assert plan.steps[0].run_id is not None
    assert plan.steps[1].fingerprint not in (None, plan.steps[2].fingerprint)
    assert len(list(tracking.runs(""))) == before


def test_plan__in_a_fresh_workspace_creates_nothing_and_imports_neither_mlflow_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pipeline.workflow.graph import Plan\n"
        "from pipeline.records import Report\n"
        "from pipeline.workflow.step import step, StepContext\n"
        "from pipeline.workflow.tracking import Tracking\n"
        "@step(version=1)\n"
        "def make(context: StepContext) -> Report: ...\n"
        "with Plan('space', Tracking.for_workspace('space')) as plan:\n"
        "    plan.step(make)\n"
        "assert [(one.label, one.cached) for one in plan.steps] == [('make', False)]\n"
        "assert not {'mlflow', 'ray', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


def test_plan__tells_why_a_result_cannot_be_used(tracking: Tracking, tmp_path: Path) -> None:
    remember(tracking, tmp_path / "gone", prepare, "t")
    shutil.rmtree(tmp_path / "gone")
    with Plan(str(tmp_path), tracking) as plan:
        plan.step(prepare, "t")
    assert (plan.steps[0].cached, plan.steps[0].note) == (False, f"{tmp_path}/gone is gone")


def test_plan__ends_where_a_recipe_asks_for_what_is_not_known(tracking: Tracking, tmp_path: Path) -> None:
    remember(tracking, tmp_path, prepare, "t")
    reached = []
    with Plan(str(tmp_path), tracking) as plan:
        shards = plan.step(prepare, "t")
        reached.append(plan.result(shards).digest)
        plan.result(plan.step(train, shards))
        reached.append("beyond")
    assert reached == ["t"]
    assert not plan.complete
    assert [one.label for one in plan.steps] == ["prepare", "train"]


def taken_label(flow: Graph) -> None:
    flow.step(prepare, "a")
    flow.step(prepare, "b")


def foreign_reference(flow: Graph) -> None:
    flow.step(train, StepRef("prepare", "prepare"))


def odd_argument(flow: Graph) -> None:
    shards = flow.step(prepare, "a")
    flow.step(train, shards, [shards, len])


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (taken_label, ValueError, r"label 'prepare' is taken in this flow; give this use of prepare its own label"),
        (foreign_reference, ValueError, r"step 'train' was given a reference to 'prepare' of another flow"),
        (odd_argument, TypeError, r"step train, parameter 'steps': a value of type builtin_function"),
    ],
)
def test_step__mistakes_are_told_at_once(
    tracking: Tracking, tmp_path: Path, recipe: Callable[[Graph], None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), Plan(str(tmp_path), tracking) as plan:
        recipe(plan)


def test_step__equal_references_share_a_fingerprint_with_records(tracking: Tracking, tmp_path: Path) -> None:
    remember(tracking, tmp_path, prepare, "t")
    with Plan(str(tmp_path), tracking) as plan:
        shards = plan.step(prepare, "t")
        plan.step(train, shards)
    record = Report(uri="elsewhere", digest="t")
    assert plan.steps[1].fingerprint == train.fingerprint(train.bind((record,), {}))
    assert execution.look_up(tracking, train, str(plan.steps[1].fingerprint), {}).record is None
