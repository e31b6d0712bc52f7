from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workflow.tracking import MetricLog, Param, Tag, Tracking, flatten

ROOT = Path(__file__).parents[3]


def make_run(tracking: Tracking) -> str:
    return str(tracking.client().create_run(tracking.experiment_id()).info.run_id)


def test_for_workspace__default_is_a_sqlite_file_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    tracking = Tracking.for_workspace("space")
    assert tracking.uri == f"sqlite:///{tmp_path}/space/mlflow.db"
    assert tracking.artifact_location == f"{tmp_path}/space/mlartifacts"
    assert Tracking.for_workspace("space", "sqlite:///other.db").uri == f"sqlite:///{tmp_path}/other.db"
    assert Tracking.for_workspace("memory://w", "http://host:5000/").uri == "http://host:5000"


def test_for_workspace__refuses_what_could_not_be_shared() -> None:
    with pytest.raises(UserError, match=r"workspace memory://w is remote .* give the address of a tracking server"):
        Tracking.for_workspace("memory://w")
    with pytest.raises(UserError, match=r"'mlruns' has no scheme; use sqlite:///FILE or http://HOST:PORT"):
        Tracking.for_workspace("space", "mlruns")


def test_find_experiment__creates_nothing(tmp_path: Path) -> None:
    tracking = Tracking.for_workspace(str(tmp_path / "space"))
    assert not tracking.exists()
    assert tracking.find_experiment() is None
    assert list(tracking.runs("")) == []
    assert list(tmp_path.iterdir()) == []


def test_client__server_that_does_not_answer_costs_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(
        UserError, match=rf"the tracking server http://127.0.0.1:{port} does not answer \(Connection refused\)"
    ):
        Tracking(f"http://127.0.0.1:{port}").client()
    assert time.monotonic() - begun < 6


def test_client__first_use_of_a_store_prints_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pipeline.workflow.tracking import Tracking\n"
        "tracking = Tracking.for_workspace(sys.argv[1])\n"
        "run = tracking.client().create_run(tracking.experiment_id()).info.run_id\n"
        "tracking.client().log_text(run, 'x', 'a.txt')\n"
        "assert tracking.read_text(run, 'a.txt') == 'x'\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "space")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ended.stdout, ended.stderr) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def test_log_params__flattened_in_batches_with_legal_keys(tracking: Tracking) -> None:
    run_id = make_run(tracking)
    many = {f"p{index}": index for index in range(150)}
    tracking.log_params(
        run_id, {"train": {"steps": 3, "range": (1, 2)}, "odd key%": "x" * 7000, "many": many, "none": {}}
    )
    params = tracking.client().get_run(run_id).data.params
    assert params["train.steps"] == "3"
    assert params["train.range"] == "[1, 2]"
    assert len(params["odd key_"]) == 6000
    assert params["many.p149"] == "149"
    assert params["none"] == "{}"
    assert len(params) == 154


def test_flatten__leaves_with_dotted_keys() -> None:
    assert flatten({"a": {"b": None, "c": {"d": "x"}}}) == [Param("a.b", "null"), Param("a.c.d", "x")]


def test_metrics__by_row_and_by_history(tracking: Tracking) -> None:
    run_id = make_run(tracking)
    tracking.log_history(run_id, [{"step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 601)])
    MetricLog(tracking, run_id).metrics({"loss": 0.5}, step=601)
    history = tracking.client().get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history[:2]] == [(1, 1.0), (2, 0.5)]
    assert len(history) == 601


def test_metric_log__a_store_that_fails_costs_the_row_only(
    tracking: Tracking, caplog: pytest.LogCaptureFixture
) -> None:
    tracking.experiment_id()
    MetricLog(tracking, "no such run").metrics({"loss": 1.0}, step=4)
    assert "metrics of step 4 were not logged" in caplog.text


def test_read_text__none_where_there_is_none(tracking: Tracking) -> None:
    assert tracking.read_text(make_run(tracking), "record.json") is None


def test_client__a_patient_one_waits_for_the_server_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        tracking = Tracking(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert not tracking.is_reachable()
        threading.Timer(1.0, listener.listen).start()
        tracking.patient()._require_answer()
        assert tracking.is_reachable()
    assert tracking.patient().patience_s == 360


def test_create_run__the_twin_of_a_lost_answer_is_deleted(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tracking, "is_server", True)
    twin = tracking.create_run("flow", {Tag.TOKEN: "t"})
    other = tracking.create_run("flow", {Tag.TOKEN: "u"})
    run_id = tracking.create_run("flow", {Tag.TOKEN: "t"})
    assert {run.info.run_id for run in tracking.runs("")} == {run_id, other}
    assert tracking.client().get_run(twin).info.lifecycle_stage == "deleted"


@pytest.mark.parametrize("there", [True, False])
def test_read_text__a_server_that_is_away_is_no_missing_artifact(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    def fail(**_: object) -> str:
        raise ConnectionError("gone")

    run_id = make_run(tracking)
    if there:
        tracking.client().log_text(run_id, "{}", "record.json")
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail)
    if there:
        with pytest.raises(ConnectionError):
            tracking.read_text(run_id, "record.json", f"mlflow-artifacts:/{run_id}")
    else:
        assert tracking.read_text(run_id, "record.json", f"mlflow-artifacts:/{run_id}") is None


def test_for_workspace__a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match=r"workspace s3://\*\*\*@host/ws holds a password") as refused:
        Tracking.for_workspace("s3://key:hidden@host/ws", "http://127.0.0.1:1")
    assert "hidden" not in str(refused.value)
