from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from flows.cli import main
from flows.present import logs as present
from pipeline.errors import UserError
from pipeline.records import Report
from pipeline.workflow import liveness
from pipeline.workflow.execution import StepRequest, execute_step
from pipeline.workflow.run_logs import RunLogs
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import RunState, Tag, Tracking


@step(version=1)
def speak(context: StepContext, text: str) -> Report:
    print(text)
    if text == "bad":
        raise ValueError("no")
    return Report(uri=context.workspace, digest=text)


class Told:
    """A flow whose steps say something, in this process."""

    def __init__(self, tracking: Tracking, workspace: Path) -> None:
        self.tracking, self.workspace = tracking, workspace
        tags = {Tag.KIND: "flow", Tag.WORKSPACE: str(workspace), Tag.FLOW: "test", **liveness.identity_tags()}
        self.run_id = tracking.create_run("test", tags)

    def say(self, label: str, text: str) -> None:
        execute_step(
            StepRequest(
                step=speak,
                label=label,
                arguments={"text": text},
                depends_on=(),
                workspace=str(self.workspace),
                tracking=self.tracking,
                flow="test",
                flow_run_id=self.run_id,
            )
        )

    def end(self) -> None:
        self.tracking.end_run(self.run_id, "FINISHED", {Tag.STATE: RunState.FINISHED})


@pytest.fixture
def told(tracking: Tracking, tmp_path: Path) -> Told:
    return Told(tracking, tmp_path / "ws")


def shown(logs: RunLogs) -> dict[str, list[str]]:
    return {label: [line[21:] for line in lines] for label, lines in logs.new_lines()}


def test_run_logs__show_what_came_since(told: Told) -> None:
    told.say("train/full", "one\ntwo")
    logs = RunLogs(told.tracking, told.run_id)
    assert shown(logs)["train/full"][1:] == ["one", "two"]
    assert shown(logs) == {}
    told.say("train/small", "bad")
    assert logs.is_running()
    failed = shown(logs)["train/small"]
    assert failed[1] == "bad"
    assert failed[-1] == "ValueError: no"
    told.end()
    assert not logs.is_running()
    with pytest.raises(UserError, match=r"has no step 'train'; choose from train/full, train/small"):
        RunLogs(told.tracking, told.run_id, "train")


def test_run_logs__of_a_cleaned_workspace_and_of_what_was_reused(told: Told) -> None:
    told.say("a", "hello")
    again = Told(told.tracking, told.workspace)
    again.say("b", "hello")
    logs = RunLogs(told.tracking, again.run_id)
    assert shown(logs) == {}
    note = f"reused from another run; see segvit logs {told.run_id[:12]} --step a"
    assert list(logs.notes()) == [("b", note)]
    shutil.rmtree(told.workspace)
    assert shown(RunLogs(told.tracking, told.run_id, "a"))["a"][1:] == ["hello"]


def test_print_logs__follows_until_the_run_has_ended(
    told: Told, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told.say("a", "first")
    polls = 0

    def work_on(_seconds: float) -> None:
        nonlocal polls
        polls += 1
        if polls == 1:
            told.say("b", "second")
        else:
            told.end()

    monkeypatch.setattr("time.sleep", work_on)
    present.print_logs(RunLogs(told.tracking, told.run_id), follow=True)
    lines = [re.sub(r"\d{4}-\S+ \S+  ", "", line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if " | " in line and " begins in " not in line] == ["a | first", "b | second"]
    assert polls == 2


def test_logs__of_the_latest_run_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracking = Tracking.for_workspace(str(tmp_path / "ws"))
    told = Told(tracking, tmp_path / "ws")
    told.say("a", "hello")
    told.end()
    capsys.readouterr()
    main(["logs", "latest", "--step", "a", "--workspace", str(tmp_path / "ws")])
    assert capsys.readouterr().out.splitlines()[-1].endswith("  hello")
    with pytest.raises(SystemExit):
        main(["logs", "nobody", "--workspace", str(tmp_path / "ws")])
    assert capsys.readouterr().err.startswith("error: no run 'nobody' in sqlite:///")


def test_recording__of_threads_loses_no_line(told: Told) -> None:
    def many(context: Any) -> None:
        threads = [
            threading.Thread(target=lambda n=n: [print(f"{n} {i}\n", end="") for i in range(200)]) for n in "abc"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    from pipeline.workflow.step_log import log_uri, read_log, recording

    uri = log_uri(str(told.workspace), "run", "x")
    with recording(uri):
        many(None)
    assert sorted(line[21:] for line in read_log(uri).splitlines()) == sorted(
        f"{n} {i}" for n in "abc" for i in range(200)
    )
