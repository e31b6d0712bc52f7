"""A flow as people see it run: in place in a terminal, line by line elsewhere."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.present.following import Changes, live_view, show_looks
from pipeline.workflow import following
from pipeline.workflow.following import Look
from pipeline.workflow.progress import Part, Progress
from pipeline.workflow.runs import RunSummary, RunTree, StepSummary
from pipeline.workflow.tracking import RunState, Tag, Tracking
from tests.flows.facts import exit_code
from tests.pipeline.workflow.test_runs import make_flow, make_step

TRIALS = (
    Part(name="trial 0001", state="running", text="step 4/8, mIoU 0.3100; class 1.9, dice 5.8"),
    Part(name="trial 0000", state="finished", text="step 8/8, mIoU 0.4100; class 1, dice 3"),
)
SEARCHING = Progress(done=1, total=4, unit="trials", seconds_left=84, note="best 0.4100 (trial 0000)", parts=TRIALS)


def step(label: str, state: str, progress: Progress | None = None, **changes: Any) -> StepSummary:
    facts: dict[str, Any] = {
        "run_id": "s",
        "label": label,
        "step": label,
        "version": 1,
        "state": state,
        "depends_on": (),
        "started": "t",
        "seconds": 13.0,
        "fingerprint": None,
        "reused_from": None,
        "error": None,
        "progress": progress,
    }
    return StepSummary(**facts | changes)


def look(state: str, steps: Sequence[StepSummary], silence: str | None = None) -> Look:
    run = RunSummary(
        run_id="97f2c7b20629aaaa",
        flow="quick",
        state=RunState(state),
        started="2026-01-02T03:04:05+00:00",
        seconds=61.0,
        error=None,
        steps={},
        workspace="/w",
        host="box",
        pid=7,
        user="ann",
    )
    return Look(RunTree(run=run, steps=tuple(steps)), silence)


def rendered(shown: Any) -> list[str]:
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(shown)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_live_view__steps_with_their_progress_and_trials() -> None:
    steps = [step("prepare", "done"), step("tune", "running", SEARCHING, depends_on=("prepare",))]
    assert rendered(live_view(look("running", steps))) == [
        "quick 97f2c7b20629  running  2026-01-02T03:04:05+00:00  1 min 1 s",
        "└── prepare  done  13.0 s",
        "    └── tune  running  13.0 s",
        "        └── ██████··················  1/4 trials  25%  ETA 1:24  best 0.4100 (trial 0000)",
        "              trial 0001  running  step 4/8, mIoU 0.3100; class 1.9, dice 5.8",
        "              trial 0000  finished  step 8/8, mIoU 0.4100; class 1, dice 3",
    ]


def test_live_view__text_of_the_store_is_no_markup() -> None:
    noted = Progress(done=1, total=2, unit="images", note="[red]loss[/nothing]")
    assert any(
        "[red]loss[/nothing]" in line for line in rendered(live_view(look("running", [step("a", "running", noted)])))
    )


def test_live_view__a_silent_store_is_told() -> None:
    assert rendered(live_view(look("running", [], "ConnectionError: reset")))[-1] == (
        "no answer from the store: ConnectionError: reset; asking again"
    )


def test_changes__a_line_for_each_and_figures_now_and_then() -> None:
    now = [0.0]
    changes = Changes(lambda: now[0])

    def lines(seconds: float, one: Look) -> list[str]:
        now[0] = seconds
        return [text.plain for text in changes.lines(one)]

    def images(done: int) -> Progress:
        return Progress(done=done, total=8, unit="images", rate=2.0, seconds_left=(8 - done) / 2)

    waiting = step("tune", "waiting", run_id=None, seconds=None)
    assert lines(0, look("running", [step("prepare", "running", images(1)), waiting])) == [
        "run 97f2c7b20629 of flow quick: running, started 2026-01-02T03:04:05+00:00 on box (process 7)",
        "[1] prepare  running",
        "prepare  1/8 images  12%  2 images/s  ETA 0:04",
    ]
    assert lines(2, look("running", [step("prepare", "running", images(4)), waiting])) == []
    assert lines(10, look("running", [step("prepare", "running", images(5)), waiting])) == [
        "prepare  5/8 images  62%  2 images/s  ETA 0:02"
    ]
    assert lines(30, look("running", [step("prepare", "running", images(5)), waiting])) == []
    tuning = step("tune", "running", SEARCHING)
    assert lines(40, look("running", [step("prepare", "done"), tuning])) == [
        "[1] prepare  done after 13.0 s",
        "[2] tune  running",
        "tune  trial 0001  running  step 4/8, mIoU 0.3100; class 1.9, dice 5.8",
        "tune  trial 0000  finished  step 8/8, mIoU 0.4100; class 1, dice 3",
        "tune  1/4 trials  25%  ETA 1:24  best 0.4100 (trial 0000)",
    ]
    stopped = SEARCHING.model_copy(
        update={"done": 2, "parts": (Part(name="trial 0001", state="stopped", text="step 4/8"), TRIALS[1])}
    )
    assert lines(41, look("running", [step("prepare", "done"), step("tune", "running", stopped)])) == [
        "tune  trial 0001  stopped  step 4/8"
    ]
    silent = look("running", [step("prepare", "done"), step("tune", "running", stopped)], "no route")
    assert lines(42, silent) == ["no answer from the store: no route; asking again"]
    failed = step("tune", "failed", error="all 4 search trials failed")
    assert lines(43, look("failed", [step("prepare", "done"), failed])) == [
        "the store answers again",
        "[2] tune  failed after 13.0 s  (all 4 search trials failed)",
    ]


def test_show_looks__in_a_terminal_counts_down_and_leaves_the_last_tree() -> None:
    clock = iter([0.0, 30.0, 40.0])
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    running = look("running", [step("tune", "running", SEARCHING)])
    ended = look("finished", [step("tune", "done")])
    tree = show_looks(console, iter([running, running, ended]), lambda: next(clock))
    assert tree == ended.tree
    text = screen.getvalue()
    assert text.index("ETA 0:54") < text.index("tune  done  13.0 s")
    # What was refreshed in place is taken away again.
    assert "\x1b[2K" in text
    assert "trial" not in text[text.rindex("quick 97f2c7b20629") :]


def test_show_looks__elsewhere_prints_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    ended = look("finished", [step("tune", "done")])
    show_looks(console, iter([look("running", [step("tune", "running", SEARCHING)]), ended]))
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().splitlines()[-3:] == [
        "[1] tune  done after 13.0 s",
        "quick 97f2c7b20629  finished  2026-01-02T03:04:05+00:00  1 min 1 s",
        "└── tune  done  13.0 s",
    ]


@pytest.mark.parametrize(
    ("status", "state", "code"), [("FINISHED", "finished", 0), ("FAILED", "failed", 1), ("KILLED", "killed", 1)]
)
def test_show_follow__exit_code_is_the_flow_s(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], status: str, state: str, code: int
) -> None:
    tracking = Tracking.for_workspace(str(tmp_path))
    flow = make_flow(tracking)
    ended = make_step(tracking, flow, "prepare", RunState.DONE)
    tracking.end_run(ended, "FINISHED", {})
    tracking.end_run(flow, status, {Tag.STATE: state, Tag.ERROR: "why"})
    assert exit_code("show", "latest", "--follow", "--workspace", str(tmp_path)) == code
    printed = capfd.readouterr()
    assert f"quick {flow[:12]}  {state}" in printed.out.splitlines()[-2]
    assert "prepare  done" in printed.out.splitlines()[-1]
    assert printed.err == ""
    assert exit_code("show", "latest", "--workspace", str(tmp_path)) == 0
    capfd.readouterr()
    assert exit_code("show", "latest", "--follow", "--json", "--workspace", str(tmp_path)) == code
    printed = capfd.readouterr()
    assert json.loads(printed.out)["run"]["state"] == state
    assert f"quick {flow[:12]}  {state}" in printed.err


def test_show_follow__ctrl_c_leaves_the_flow_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = Tracking.for_workspace(str(tmp_path))
    flow = make_flow(tracking)
    before = tracking.client().get_run(flow)

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following.follow_run, "__kwdefaults__", {"every_s": 2.0, "sleep": interrupted})
    assert exit_code("show", flow, "--follow", "--workspace", str(tmp_path)) == 130
    assert capfd.readouterr().err == "no longer followed; the flow goes on\n"
    after = tracking.client().get_run(flow)
    assert (after.info.status, after.data.tags) == ("RUNNING", before.data.tags)
