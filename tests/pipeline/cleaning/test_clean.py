"""Fifty runs, cleaned: what aliases and a rollback need is left, whenever the process is killed in between."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flows.cli import main
from pipeline.cleaning.clean import carry_out, look_at
from pipeline.cleaning.plan import Limits, make_plan
from pipeline.cleaning.turn import Cleaner, cleaning
from pipeline.records import Checkpoint, Evaluation, ModelVersion, Record, ShardSet
from pipeline.registry import models, store
from pipeline.registry.promote import roll_back
from pipeline.storage.file_stamps import folder_bytes
from pipeline.workflow.execution import CacheLookup, look_up
from pipeline.workflow.moved_store import at_its_place
from pipeline.workflow.output_checksum import changed_outputs
from pipeline.workflow.run_sizes import with_sizes
from pipeline.workflow.runs import list_runs, run_tree
from pipeline.workflow.step import missing_outputs
from pipeline.workflow.step_lease import StepLine, in_line_tags
from pipeline.workflow.tracking import RECORD_FILE, RunState, Tag, Tracking
from tests.conftest import REPOSITORY
from tests.pipeline.cleaning.fifty_runs import NAME, Runs, prepare, train
from tests.pipeline.cleaning.killed_clean import POINTS

NUM_RUNS = 50
REGISTERED = (4, 14, 24, 34, 44)
PROMOTED = (4, 14, 34, 44)
RECORDS: dict[str, type[Record]] = {
    "prepare": ShardSet,
    "train": Checkpoint,
    "evaluate": Evaluation,
    "register": ModelVersion,
}


@pytest.fixture(autouse=True)
def no_ray_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine are left alone."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "no-ray"))


class Cleaned(NamedTuple):
    """A workspace of many runs."""

    runs: Runs
    versions: dict[int, ModelVersion]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Cleaned:
    folder = tmp_path_factory.mktemp("fifty")
    runs = Runs(folder / "ws", folder / "models")
    versions = {}
    for number in range(NUM_RUNS):
        version = runs.run(number, registered=number in REGISTERED, data="former" if number < 10 else "shards")
        if version is not None:
            versions[number] = version
            if number in PROMOTED:
                runs.promote(version)
    return Cleaned(runs, versions)


@pytest.fixture
def few(tmp_path: Path) -> Runs:
    runs = Runs(tmp_path / "ws", tmp_path / "models")
    for number in range(3):
        runs.run(number)
    return runs


def assert_nothing_is_half_there(tracking: Tracking) -> None:
    """What is said to be finished is whole, and every version has its files."""
    for run in tracking.runs(f"tags.`{Tag.KIND}` = 'step'"):
        if Tag.DONE in run.data.tags:
            text = tracking.read_text(run.info.run_id, RECORD_FILE)
            assert text is not None
            record = RECORDS[run.data.tags[Tag.STEP]].from_json(at_its_place(text, run.data.tags))
            assert missing_outputs(record) is None
            assert changed_outputs(json.loads(run.data.tags[Tag.OUTPUTS])) is None
    for one in models.list_models(tracking):
        assert store.lost_files(tracking, one.name, one.version) is None


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_clean__of_fifty_runs_leaves_what_aliases_and_a_rollback_need_through_every_kill(
    fifty: Cleaned, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import mlflow.pyfunc

    runs, tracking = fifty.runs, fifty.runs.tracking
    workspace = runs.workspace
    options = ["clean", "--keep-runs", "0", "--versions", "--keep-champions", "1", "--workspace", str(workspace)]
    before = files_below(workspace)
    main([*options, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert files_below(workspace) == before
    assert plan["dry_run"]
    gone = {item["name"] for item in plan["goes"] if item["kind"] == "version"}
    assert gone == {f"models:/{NAME}/{fifty.versions[number].version}" for number in (4, 14, 24)}
    assert plan["losses"] == [f"a rollback of {NAME} cannot go back to version 2, 1 any more"]

    for point in POINTS:
        command = [sys.executable, "-m", "tests.pipeline.cleaning.killed_clean", str(workspace), point]
        killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert killed.returncode == -9, (point, killed.stdout, killed.stderr)
        assert_nothing_is_half_there(tracking)
    main([*options, "--yes"])
    capsys.readouterr()
    assert_nothing_is_half_there(tracking)

    # Of outputs there are left: two sets of scores, and the one set of shards that they are of.
    champion, former = fifty.versions[44], fifty.versions[34]
    kept = {Path(champion.evaluation.uri), Path(former.evaluation.uri)}
    assert {path for path in workspace.glob("*/*") if path.parent.name == "evaluate"} == kept
    assert list((workspace / "train").iterdir()) == list((workspace / "ray").iterdir()) == []
    shards = store.shard_set_of(tracking, NAME, champion.version).uri
    assert [str(path) for path in (workspace / "prepare").iterdir()] == [shards]
    assert len(list((workspace / "mlartifacts" / "models").glob("*/artifacts/MLmodel"))) == 2
    assert not list(workspace.glob("*.partial"))
    remaining = look_at(tracking, str(workspace)).files
    assert remaining.num_bytes < 0.35 * plan["num_bytes"]
    # Again: there is nothing left to do.
    main([*options, "--json"])
    assert json.loads(capsys.readouterr().out)["goes"] == []

    for alias in ("champion", "candidate"):
        folder = models.checkpoint_folder(tracking, f"models:/{NAME}@{alias}", tmp_path)
        assert (folder / "model.safetensors").is_file()
        model = mlflow.pyfunc.load_model(
            str(models.model_folder(tracking, models.resolve_model(tracking, f"models:/{NAME}@{alias}"), tmp_path))
        )
        probe = Path(champion.evaluation.uri) / "probe"
        assert np.array_equal(model.predict(np.load(probe / "images.npy")), np.load(probe / "labels.npy"))
    assert roll_back(tracking, NAME).champion_after == former.version

    # All runs are still listed, with what became of them.
    listed = with_sizes(tracking, list_runs(tracking, 100))
    assert len(listed) == NUM_RUNS
    tree = run_tree(tracking, listed[-1].run_id)
    assert {step.label: step.cleaned is not None for step in tree.steps} == {"prepare": True, "train": True}
    assert listed[-1].num_bytes == 0
    # And a step whose outputs are gone is simply executed again.
    runs.run(0)
    assert (workspace / "train").is_dir()


def test_with_sizes__of_what_each_run_made_itself_and_is_still_there(few: Runs) -> None:
    def sizes() -> list[int | None]:
        return [run.num_bytes for run in reversed(with_sizes(few.tracking, list_runs(few.tracking)))]

    own = [folder_bytes(str(path)) for path in (few.workspace / "train").iterdir()]
    assert set(own) == {50_000}
    shards = folder_bytes(str(few.workspace / "prepare"))
    assert (shards, sizes()) == (300_000, [350_000, 50_000, 50_000])
    # As an earlier release left it: measured.
    for run in few.tracking.runs(f"tags.`{Tag.STEP}` = 'train'"):
        few.tracking.client().delete_tag(run.info.run_id, Tag.BYTES)
    assert sizes() == [350_000, 50_000, 50_000]
    carry_out(few.tracking, look_at(few.tracking, str(few.workspace)), Limits(keep_runs=1), lambda _line: None)
    assert sizes() == [300_000, 0, 50_000]
    steps = look_at(few.tracking, str(few.workspace)).store.steps
    assert sorted(step.is_done for step in steps if step.step == "train") == [False, False, True]


def test_clean__what_a_flow_at_work_has_or_finds_stays(few: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking, workspace = few.tracking, str(few.workspace)
    at_work = few.begin()
    shards = few.execute(at_work, prepare, data="shards")
    plan = make_plan(look_at(tracking, workspace), Limits())
    assert {item.kind for item in plan.goes} == {"outputs", "ray state", "page", "logs"}
    assert not any(item.name.startswith("prepare/") for item in plan.goes)

    # It finds a finished step in the very moment in which the mark of that is taken away.
    real = Cleaner._take_marks
    found: list[CacheLookup] = []
    source = str(few.models / "few-1")
    arguments = {"shard_set": shards, "source": source, "number": 1}
    fingerprint = train.fingerprint(arguments)

    def look_first(self: Cleaner, taken: str, of: list[object]) -> None:
        if taken == fingerprint:
            found.append(look_up(tracking, train, fingerprint, arguments, at_work))
        real(self, taken, of)  # type: ignore[arg-type]

    monkeypatch.setattr(Cleaner, "_take_marks", look_first)
    said: list[str] = []
    carry_out(tracking, look_at(tracking, workspace), Limits(), said.append)
    monkeypatch.undo()
    assert found[0].record is not None
    assert said == [f"train/{fingerprint[:16]} stays: run {at_work[:12]} uses it"]
    assert look_up(tracking, train, fingerprint, arguments).record == found[0].record
    tree = run_tree(tracking, few.tracking.client().get_run(str(found[0].run_id)).data.tags[Tag.PARENT])
    assert [step.cleaned for step in tree.steps] == [None, None]
    assert [path.name for path in (few.workspace / "train").iterdir()] == [fingerprint[:16]]

    # One that looks after the mark is gone does not find it.
    few.end(at_work)
    carry_out(tracking, look_at(tracking, workspace), Limits(), said.append)
    assert make_plan(look_at(tracking, workspace), Limits()).goes == ()
    late = look_up(tracking, train, fingerprint, arguments, few.begin())
    assert late.record is None


def test_turn__who_would_execute_the_step_waits(few: Runs) -> None:
    tracking = few.tracking
    fingerprint = next(
        run.data.tags[Tag.FINGERPRINT]
        for run in tracking.runs(f"tags.`{Tag.STEP}` = 'train'")
        if Tag.DONE in run.data.tags
    )
    flow = few.begin()
    own = tracking.create_run(
        "train", {Tag.PARENT: flow, Tag.LABEL: "train", Tag.FINGERPRINT: fingerprint, **in_line_tags()}
    )
    line = StepLine(tracking, own, "train", flow, fingerprint)
    with cleaning(tracking, str(few.workspace)) as cleaner:
        # It has come first: the cleaner leaves the step to it.
        with cleaner.turn("train", fingerprint) as why_not:
            assert why_not == "a run is at work on it"
        tracking.end_run(own, "FINISHED", {Tag.STATE: RunState.DONE})
        with cleaner.turn("train", fingerprint, take_marks=False) as why_not:
            assert why_not is None
            assert [one.is_alive() for one in line.others()] == [True]
        assert line.others() == []
    assert not list(tracking.runs(f"tags.`{Tag.KIND}` = 'cleaning'"))


def test_clean__a_workspace_of_two_stores_keeps_what_the_other_may_need(few: Runs, tmp_path: Path) -> None:
    other = Tracking.for_workspace(str(few.workspace), f"sqlite:///{tmp_path}/other.db")
    found = look_at(few.tracking, str(few.workspace))
    assert (found.owns_all, found.is_shared, found.owns_store) == (True, False, True)
    from pipeline.workflow.workspace_format import enter_workspace, store_name

    enter_workspace(str(few.workspace), store_name(str(few.workspace), other.uri, other.experiment))
    plan = make_plan(look_at(few.tracking, str(few.workspace)), Limits())
    assert {item.kind for item in plan.goes} == {"page", "logs"}
    assert {item.kind for item in make_plan(look_at(other, str(few.workspace)), Limits()).goes} == set()


@pytest.fixture
def remote(few: Runs, tmp_path: Path) -> Iterator[tuple[str, Tracking]]:
    import fsspec

    uri = "memory://space"
    filesystem = fsspec.filesystem("memory")
    few_tracking = Tracking.for_workspace(uri, f"sqlite:///{tmp_path}/far/mlflow.db")
    yield uri, few_tracking
    if filesystem.exists("/space"):
        filesystem.rm("/space", recursive=True)


def test_clean__a_workspace_in_an_object_store(few: Runs, remote: tuple[str, Tracking]) -> None:
    from pipeline import storage

    uri, tracking = remote
    few.workspace, few.tracking = uri, tracking  # type: ignore[assignment]
    for number in range(3):
        few.run(number)
    steps = storage.list_names(storage.join(uri, "train"))
    assert len(steps) == 3
    gone = carry_out(tracking, look_at(tracking, uri), Limits(keep_runs=1), lambda _line: None)
    assert {item.kind for item in gone} == {"outputs", "ray state", "logs"}
    assert len(storage.list_names(storage.join(uri, "train"))) == 1
    assert len(storage.list_names(storage.join(uri, "prepare"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--older-than", "3x"], "--older-than 3x must be a number with one of h, d, w, as 30d, 12h or 2w"),
        (["--max-size", "20"], "--max-size 20 must be a number with one of B, kB, KB, MB, GB, TB, as 20GB or 500MB"),
    ],
)
def test_clean__refuses_what_it_cannot_measure(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["clean", *options, "--workspace", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip() == f"error: {message}"
    with pytest.raises(SystemExit):
        main(["clean", "--workspace", str(tmp_path / "none")])
    assert capsys.readouterr().err.startswith(f"error: no workspace at {tmp_path / 'none'}; ")
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
