"""Secrets never reach what people and MLflow get to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import main
from pipeline.causes import one_line
from pipeline.config.file import load_config
from pipeline.errors import UserError
from pipeline.masking import masked
from pipeline.workflow.flow import Flow
from pipeline.workflow.tracking import Tracking


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at http://me:hunter2@host:5000/x?", "at http://***@host:5000/x?"),
        ("postgresql+psycopg2://u:p%40ss@db/mlflow failed", "postgresql+psycopg2://***@db/mlflow failed"),
        ("https://h/a.zip?sig=abc&sv=1&X-Amz-Signature=12ab", "https://h/a.zip?sig=***&sv=1&X-Amz-Signature=***"),
        ("s3://bucket/a?access_key=AKIA&x=1", "s3://bucket/a?access_key=***&x=1"),
        ("sqlite:////w/mlflow.db", "sqlite:////w/mlflow.db"),
        ("http://host:5000/a@b:c", "http://host:5000/a@b:c"),
        ("models:/m@champion", "models:/m@champion"),
    ],
)
def test_masked__passwords_and_keys_in_addresses(text: str, expected: str) -> None:
    assert masked(text) == expected


def test_masked__values_of_variables_that_are_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "eyJhbGciOiJ")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("MY_PASSWORD", "word")
    text = "asked with eyJhbGciOiJ and wJalrXUtnFEMI, by /home/me/key.json, a word"
    assert masked(text) == "asked with *** and ***, by /home/me/key.json, a word"


def test_one_line__is_what_the_log_and_the_tags_of_a_run_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    error = OSError("http://me:hunter2@host said no to 0123456789abcdef")
    assert one_line(error) == "OSError: http://***@host said no to ***"


def test_command__an_error_does_not_repeat_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["runs", "--tracking-uri", "http://me:hunter2@127.0.0.1:9"])
    said = capsys.readouterr().err
    assert said.startswith("error: the tracking server http://***@127.0.0.1:9 does not answer")
    assert "hunter2" not in said


def test_config__a_password_in_the_root_is_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data: {dataset: folder, root: 'https://me:hunter2@host/data.zip'}\n")
    with pytest.raises(UserError, match=r"data.root: 'https://\*\*\*@host/data.zip': root holds a password") as caught:
        load_config(tmp_path / "x.yaml")
    assert "hunter2" not in str(caught.value)


def test_run__parameters_and_configuration_hold_no_secret(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_TOKEN", "0123456789abcdef")
    config: dict[str, Any] = {"data": {"root": "https://host/a.zip?token=0123456789abcdef"}}
    flow = Flow(str(tmp_path / "workspace"), tracking, "secret", config)
    with flow:
        pass
    flow.wait()
    assert flow.run_id is not None
    run = tracking.client().get_run(flow.run_id)
    text = tracking.read_text(flow.run_id, "config.yaml")
    assert yaml.safe_load(text or "") == {"data": {"root": "https://host/a.zip?token=***"}}
    assert run.data.params["data.root"] == "https://host/a.zip?token=***"
    assert "0123456789abcdef" not in str(run.to_dictionary())
