"""docs/prediction.md, done: every command and program of it, with a small model in the registry."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from flows.cli import main
from pipeline.registry.store import register_model
from pipeline.workflow.tracking import Tracking
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "prediction.md").read_text()


def lines(*starts: str) -> list[str]:
    """The lines of the page's shell blocks that start so."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", TEXT, flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith(starts)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with photos, an archive, and a champion in its workspace; the current one."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name in ("photos/a.png", "photos/day/b.png", "photos/day/c.jpg", "d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / name)
    with zipfile.ZipFile(folder / "more.zip", "w") as packed:
        packed.write(folder / "d.png", "more/d.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("SEGVIT_WORKSPACE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        tracking = Tracking.for_workspace(".segvit")
        run_id = tracking.client().create_run(tracking.experiment_id()).info.run_id
        checkpoint, evaluation, shard_set = make_tiny_model(folder / "tiny")
        register_model(
            tracking, "street", checkpoint, evaluation, shard_set, run_id=run_id, flow_run_id=uuid.uuid4().hex
        )
        tracking.client().set_registered_model_alias("street", "champion", "1")
        yield folder


def test_page__has_no_command_of_another_kind() -> None:
    starts = ("segvit predict ", "segvit export ", "segvit serve ", "printf ", "curl ", "python ")
    assert [line for line in lines("") if not line.startswith(starts)] == []
    assert [len(lines(start)) for start in starts] == [3, 2, 1, 1, 1, 1]


def test_predict__writes_what_the_page_says(place: Path) -> None:
    for line in lines("segvit predict "):
        main(shlex.split(line)[1:])
    found = {file.relative_to(place / "predicted").as_posix() for file in (place / "predicted").rglob("*.png")}
    assert found == {f"{name}.{kind}.png" for name in ("a", "day/b", "day/c") for kind in ("labels", "overlay")}
    found = {file.relative_to(place / "labels").as_posix() for file in (place / "labels").rglob("*.png")}
    assert found == {"a.labels.png", "day/b.labels.png", "more/d.labels.png"}
    assert (place / "predicted.json").is_file()
    assert (place / "areas.parquet").is_file()


def test_export__files_run_as_the_page_says(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for line in lines("segvit export "):
        main(shlex.split(line)[1:])
        assert "100.000% of labels equal" in capfd.readouterr().out
    found = {entry.key: entry.value for entry in onnx.load(str(place / "street.onnx")).metadata_props}
    assert found["model_version"] == '"models:/street/1"'
    programs = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S)
    shapes = []
    for program in programs:
        names: dict[str, Any] = {}
        exec(program, names)
        assert names["class_names"] == ["sky", "road", "pole"]
        shapes.append(tuple(names["labels"].shape))
    assert shapes == [(1, 32, 32), (1, 64, 96)]


def test_serve__answers_the_pages_and_its_own_curl_line_and_ends_when_asked(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    [line] = lines("segvit serve ")
    command = [sys.executable, "-m", "flows.cli", *shlex.split(line.replace("5001", port))[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = place / "serve.log"
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
    assert server.stdout is not None
    try:
        said = server.stdout.readline()
        assert said.startswith(f"models:/street@champion answers at http://127.0.0.1:{port}; "), log.read_text()
        own_line = server.stdout.readline()
        done = subprocess.run(["bash", "-c", own_line], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.startswith('{"predictions": ["iVBOR')
        for one in lines("printf ", "curl ", "python "):
            subprocess.run(["bash", "-ec", one.replace("5001", port)], env=environment, timeout=60, check=True)
        with (
            Image.open(place / "a.labels.png") as answered,
            Image.open(place / "predicted" / "a.labels.png") as written,
        ):
            assert np.array_equal(np.asarray(answered), np.asarray(written))
        with pytest.raises(SystemExit):
            main(["serve", "models:/street@champion", "--port", port])
    finally:
        server.send_signal(signal.SIGTERM)
        ended = server.wait(timeout=15)
    assert ended == 0
    assert log.read_text().splitlines()[-1] == "stopped"
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(port)))
