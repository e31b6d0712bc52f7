"""What `segvit serve` does around MLflow's server; tests/flows/test_prediction_docs.py runs it."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

import segvit
from flows.cli import main
from pipeline.errors import UserError
from pipeline.registry.serve import check_address, curl_line, scoring_server, served_folder, server_url
from pipeline.workflow.tracking import Tracking


def test_check_address__a_port_in_use_and_addresses_of_others_are_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use; end what listens there or give"):
            check_address("127.0.0.1", port)
    assert check_address("127.0.0.1", port)
    assert not check_address("0.0.0.0", port)
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(UserError, match=f"nothing can listen at {host} port {port} \\(.+\\); give another --host"):
            check_address(host, port)


def test_serve__other_addresses_than_loopback_are_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "/none", "--host", "0.0.0.0", "--port", "59871"])
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "warning: 0.0.0.0 is open to other machines, and the server asks for no password"
    assert said[1].startswith("error: /none is no checkpoint folder")
    assert len(said) == 2


def test_server_url__is_of_this_machine() -> None:
    assert server_url("127.0.0.1", 5001) == "http://127.0.0.1:5001"
    assert server_url("0.0.0.0", 5001) == "http://127.0.0.1:5001"
    assert server_url("::", 5001) == "http://[::1]:5001"
    words = shlex.split(curl_line("http://127.0.0.1:5001"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:5001/invocations"]
    assert len(curl_line("http://127.0.0.1:5001")) < 300


def test_served_folder__a_checkpoint_folder_is_packed(tracking: Tracking, trained: Any, tmp_path: Path) -> None:
    folder = served_folder(tracking, trained.checkpoint.uri, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    found = mlflow.pyfunc.load_model(str(folder)).predict(images)
    model, _ = segvit.load_checkpoint(trained.checkpoint.uri)
    expected = segvit.predict_batch(model.cpu(), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert np.array_equal(found, expected.numpy())


def test_scoring_server__one_that_cannot_start_is_told(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(UserError, match=r"the server ended with code [1-9]\d* before it answered; see its output above"),
        scoring_server(tmp_path / "empty", "127.0.0.1", port, tmp_path),
    ):
        pass
