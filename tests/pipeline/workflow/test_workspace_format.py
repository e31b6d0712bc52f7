from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli import main
from pipeline.errors import UserError
from pipeline.workflow.workspace_format import WorkspaceFile, enter_workspace, read_workspace_file, store_name


def test_enter_workspace__notes_every_store(tmp_path: Path) -> None:
    own = store_name(str(tmp_path), f"sqlite:///{tmp_path}/mlflow.db", "segvit")
    assert own == "sqlite:///mlflow.db segvit"
    assert read_workspace_file(str(tmp_path)) == WorkspaceFile()
    enter_workspace(str(tmp_path), own)
    first = read_workspace_file(str(tmp_path))
    assert (first.stores, first.is_only_store(own)) == ((own,), True)
    enter_workspace(str(tmp_path), "http://host:5000 segvit")
    both = read_workspace_file(str(tmp_path))
    assert (both.stores, both.is_only_store(own)) == ((own, "http://host:5000 segvit"), False)


def test_enter_workspace__of_an_older_release_others_may_have_been_there(tmp_path: Path) -> None:
    (tmp_path / "prepare").mkdir()
    enter_workspace(str(tmp_path), "store")
    assert not read_workspace_file(str(tmp_path)).is_only_store("store")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2}', "workspace {0} has format 2, this release reads up to 1; upgrade segvit, or use another"),
        ("{", "{0}/workspace.json cannot be read"),
        ('{"format": "x"}', "{0}/workspace.json is not as segvit writes it; remove it"),
        ("[]", "{0}/workspace.json is not as segvit writes it; remove it"),
    ],
)
def test_workspace__of_a_later_release_is_refused_by_every_command(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "workspace.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["runs", "--workspace", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {message.format(tmp_path)}")
    with pytest.raises(UserError):
        enter_workspace(str(tmp_path), "store")
    assert json.dumps((tmp_path / "workspace.json").read_text()) == json.dumps(content)


def test_enter_workspace__that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"workspace .*/file cannot be written to \(.*\); free some space or choose"):
        enter_workspace(str(tmp_path / "file"), "store")
