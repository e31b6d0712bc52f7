from __future__ import annotations

from pathlib import Path

import pytest

from flows.jobs.environment import asked_environment, notes_on_variables, tracking_store, without_password
from pipeline.config.file import expand_variables, variables_in


@pytest.mark.parametrize(
    ("own", "is_sent"),
    [
        ("http://mlflow.example:5000", True),
        ("https://10.0.0.7", True),
        ("postgresql://user:pw@db.example/mlflow", True),
        ("databricks://profile", True),
        ("http://127.0.0.1:5000", False),
        ("http://[::1]:5000", False),
        ("http://localhost:5000", False),
        ("http://user:pw@localhost:5000", False),
        ("sqlite:///mlflow.db", False),
        ("file:///tmp/mlruns", False),
        ("./mlruns", False),
    ],
)
def test_tracking_store__the_callers_is_sent_where_others_reach_it(
    own: str, is_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    uri, note = tracking_store(None)
    assert uri == (own if is_sent else None)
    assert (note is None) == is_sent
    if note is not None:
        assert "is reached from this machine only and is not sent" in note
        assert "pw" not in note
    assert tracking_store("http://127.0.0.1:5000") == ("http://127.0.0.1:5000", None)


def test_without_password__keeps_the_rest() -> None:
    assert without_password("http://user:pw@host:5000/path") == "http://host:5000/path"
    assert without_password("sqlite:///a@b.db") == "sqlite:///a@b.db"


def test_asked_environment__given_wins_over_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "1")
    monkeypatch.setenv("TWO", "2")
    assert asked_environment(["ONE=9", "THREE="], ["ONE", "TWO"]) == {"ONE": "9", "TWO": "2", "THREE": ""}


def test_notes__variables_that_stay_here_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SEGVIT_WEIGHTS", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("PROBE_DATA", str(tmp_path))
    tree = {"data": {"root": "${PROBE_DATA}/x"}, "list": [{"a": "${OTHER}"}, 3]}
    assert variables_in(tree) == {"PROBE_DATA", "OTHER"}
    [note] = notes_on_variables(variables_in(tree), {})
    assert note.startswith("set here and not sent: PROBE_DATA, MLFLOW_TRACKING_TOKEN; ")
    assert notes_on_variables(variables_in(tree), {"PROBE_DATA": "/mnt", "MLFLOW_TRACKING_TOKEN": "x"}) == []
    assert expand_variables(tree, {"OTHER": "4"}) == {"data": {"root": "${PROBE_DATA}/x"}, "list": [{"a": "4"}, 3]}
