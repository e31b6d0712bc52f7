from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cleaning.plan import CleanPlan, Limits, Workspace, make_plan
from pipeline.cleaning.store_view import FlowRun, StepRun, StoreView, Version
from pipeline.cleaning.workspace_files import OutputKey, WorkspaceFiles, list_workspace

DAY_S = 86400.0
NOW = 100 * DAY_S


def fingerprint(number: int) -> str:
    return f"{number:016x}" + "0" * 48


def flow(number: int, *, days: float = 0.0, alive: bool = False) -> FlowRun:
    return FlowRun(f"{number:032x}", "f", NOW - days * DAY_S, alive)


def ran(of: FlowRun, number: int, *, done: bool = True) -> StepRun:
    return StepRun(f"s{number}", of.run_id, "train", "train", fingerprint(number), done, of.ended)


def files(paths: dict[str, int], *, days: float = 50.0) -> WorkspaceFiles:
    found = WorkspaceFiles()
    for path, num_bytes in paths.items():
        found.add(path, num_bytes, NOW - days * DAY_S)
    return found


def outputs(*numbers: int) -> dict[str, int]:
    return {f"train/{number:016x}/model.safetensors": 100 for number in numbers}


def plan(
    paths: dict[str, int],
    flows: Sequence[FlowRun] = (),
    steps: Sequence[StepRun] = (),
    limits: Limits | None = None,
    *,
    days: float = 50.0,
    owns: bool = True,
    known: StoreView | None = None,
) -> CleanPlan:
    store = replace(known or StoreView(), flows=tuple(flows), steps=tuple(steps))
    found = Workspace("/w", files(paths, days=days), store, owns_all=owns, is_shared=False, owns_store=owns)
    return make_plan(found, limits or Limits(), NOW)


def gone(made: CleanPlan) -> set[str]:
    return {item.name for item in made.goes}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), {1, 2, 3, 4}),
        (Limits(keep_runs=2), {1, 2}),
        (Limits(older_than_s=15 * DAY_S), {1, 2, 3}),
        (Limits(keep_runs=3, older_than_s=15 * DAY_S), {1}),
        (Limits(keep_runs=9), set()),
        (Limits(max_bytes=250), {1, 2}),
        (Limits(max_bytes=250, keep_runs=3), {1}),
        (Limits(max_bytes=400), set()),
        (Limits(max_bytes=0), {1, 2, 3, 4}),
    ],
)
def test_make_plan__runs_go_by_number_age_and_size_the_oldest_first(limits: Limits, expected: set[int]) -> None:
    flows = [flow(4, days=10), flow(3, days=20), flow(2, days=30), flow(1, days=40)]
    steps = [ran(one, int(one.run_id, 16)) for one in flows]
    made = plan(outputs(1, 2, 3, 4), flows, steps, limits)
    assert gone(made) == {f"train/{number:016x}" for number in expected}
    assert made.freed_bytes == 100 * len(expected)


def test_make_plan__an_output_that_any_run_uses_stays() -> None:
    first, last, at_work = flow(1, days=40), flow(2, days=1), flow(3, alive=True)
    steps = [ran(first, 1), ran(last, 1), ran(first, 2), ran(at_work, 2, done=False), ran(first, 3)]
    made = plan(outputs(1, 2, 3), [at_work, last, first], steps, Limits(keep_runs=2))
    assert gone(made) == {f"train/{3:016x}"}
    # One at work stays whatever the limits say.
    assert gone(plan(outputs(1, 2, 3), [at_work, last, first], steps)) == {f"train/{1:016x}", f"train/{3:016x}"}


def test_make_plan__ray_s_state_of_finished_steps_goes_and_of_others_with_their_runs() -> None:
    old, last, at_work = flow(1, days=3), flow(2, days=1), flow(3, alive=True)
    paths = {f"ray/train-{number:016x}/checkpoint_0/state": 10 for number in (1, 2, 3, 4)}
    steps = [ran(last, 1), ran(last, 2, done=False), ran(old, 3, done=False), ran(at_work, 4)]
    made = plan(paths, [at_work, last, old], steps, Limits(keep_runs=2))
    assert gone(made) == {f"ray/train-{1:016x}", f"ray/train-{3:016x}"}


def test_make_plan__versions_go_when_asked_unless_an_alias_a_rollback_or_a_run_has_them() -> None:
    last = flow(9, days=1)

    def version(number: int, *aliases: str, of: str = "") -> Version:
        folder = frozenset({OutputKey("evaluate", f"{number:016x}")})
        return Version("m", number, aliases, f"/a/{number}", "", of, folder, NOW)

    known = StoreView(
        versions=(version(5, "champion"), version(4), version(3), version(2), version(1, of=last.run_id)),
        former_champions={"m": (4, 3, 2)},
        models={f"m-{number}": f"/a/{number}" for number in (1, 2, 3, 4, 5, 6, 7)},
        being_registered=frozenset({"m-7"}),
    )
    paths = {f"evaluate/{number:016x}/probe/images.npy": 5 for number in (1, 2, 3, 4, 5)}
    paths |= {f"mlartifacts/models/m-{number}/artifacts/model": 1000 for number in (1, 2, 3, 4, 5, 6, 7)}
    steps = [
        StepRun(f"s{number}", "gone", "evaluate", "evaluate", fingerprint(number), is_done=True, ended=NOW)
        for number in (1, 2, 3, 4, 5)
    ]
    assert gone(plan(paths, [last], steps, Limits(keep_runs=1), known=known)) == {"m-6"}
    made = plan(paths, [last], steps, Limits(keep_runs=1, versions=True, keep_champions=1), known=known)
    assert gone(made) == {"m-6", "models:/m/3", "models:/m/2", f"evaluate/{3:016x}", f"evaluate/{2:016x}"}
    assert made.freed_bytes == 3010
    assert made.losses == ("a rollback of m cannot go back to version 3, 2 any more",)


def test_make_plan__what_no_run_knows_goes_where_nobody_else_can_know_it() -> None:
    paths = {**outputs(7), "logs/0123/train.log": 3, "notes/readme.txt": 9, "mlflow.db": 50, "workspace.json": 1}
    assert gone(plan(paths)) == {f"train/{7:016x}", "0123"}
    assert gone(plan(paths, days=0.01)) == set()
    assert gone(plan(paths, owns=False)) == set()


def test_make_plan__what_killed_processes_left() -> None:
    at_work = flow(1, alive=True)
    paths = {
        f"train/{1:016x}.0a0a0a0a.partial/model.safetensors": 1,
        f"train/{2:016x}.0a0a0a0a.partial/model.safetensors": 2,
        f"prepare/{3:016x}/train-00000.tar.0a0a0a0a.partial": 4,
        "clean-0a0a0a0a.partial/model.safetensors": 8,
    }
    steps = [ran(at_work, 1, done=False)]
    made = plan(paths, [at_work], steps)
    assert gone(made) == {
        f"train/{2:016x}.0a0a0a0a.partial",
        f"prepare/{3:016x}/train-00000.tar.0a0a0a0a.partial",
        "clean-0a0a0a0a.partial",
    }
    assert gone(plan(paths, [at_work], steps, days=0.01)) == {"clean-0a0a0a0a.partial"}


def test_list_workspace__puts_every_file_in_one_group(tmp_path: Path) -> None:
    paths = {**outputs(1), "ray/tune-0000000000000002/trial-1/x": 3, "leases/train-0000000000000001/00000001-a": 0}
    paths |= {"mlartifacts/ab/artifacts/report.html": 7, "mlartifacts/models/m-1/artifacts/a/b": 11, "logs/r/a.log": 13}
    paths |= {"readme": 17, "train/notes.txt": 19}
    for path, num_bytes in paths.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * num_bytes)
    found = list_workspace(str(tmp_path))
    assert found.num_bytes == sum(paths.values())
    assert {key.path: group.num_bytes for key, group in found.outputs.items()} == {f"train/{1:016x}": 100}
    assert {key.run_name: group.num_bytes for key, group in found.ray.items()} == {f"tune-{2:016x}": 3}
    assert (found.artifacts["ab"].num_bytes, found.pages) == (7, {"ab": {"report.html": 7}})
    assert (found.models["m-1"].num_bytes, found.logs["r"].num_bytes) == (11, 13)
    assert {name: group.num_bytes for name, group in found.other.items()} == {"leases": 0, "readme": 17, "train": 19}
