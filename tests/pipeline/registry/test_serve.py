"""A registered model behind `mlflow models serve`, started once on loopback from a folder outside of this tree."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import segvit
from pipeline import storage
from pipeline.evaluation.image_sources import list_images
from pipeline.evaluation.predict import Prediction, Segmenter, plan_predictions, predict_images
from pipeline.registry.store import register_model
from pipeline.workflow.tracking import Tracking

PALETTE = [[10, 20, 30], [200, 0, 0], [0, 0, 200]]
INFERENCE = {"scales": [1.0, 1.5], "flip": True}
START_TIMEOUT_S = 120


class Server(NamedTuple):
    """A running scoring server and the checkpoint it was registered from, with its way to predict."""

    url: str
    checkpoint: Path

    def ask(self, body: bytes | dict[str, Any], content_type: str = "application/json") -> tuple[int, Any]:
        """Status and parsed answer of one request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/invocations", data, {"Content-Type": content_type})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def server(store_uri: str, trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model, metadata = varied_model(), {"class_names": ["sky", "road", "pole"], "palette": PALETTE}
    segvit.save_checkpoint(folder / "checkpoint", model, metadata)
    digest = storage.file_digest(str(folder / "checkpoint/model.safetensors"))
    tracking = Tracking(store_uri, f"test-{uuid.uuid4().hex[:12]}", str(folder / "mlartifacts"))
    version = register_model(
        tracking,
        tracking.experiment,
        trained.checkpoint.model_copy(update={"uri": str(folder / "checkpoint"), "digest": digest}),
        trained.scored(0.5, checkpoint_digest=digest, inference=INFERENCE),
        trained.shard_set,
        run_id=tracking.client().create_run(tracking.experiment_id()).info.run_id,
        flow_run_id="flow",
    )
    segvit.save_checkpoint(folder / "evaluated", model, metadata | {"inference": INFERENCE})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"MLFLOW_TRACKING_URI": tracking.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    (folder / "elsewhere").mkdir()
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", version.model_uri),
                *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            ],
            cwd=folder / "elsewhere",
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", process, log)
        yield Server(f"http://127.0.0.1:{port}", folder / "evaluated")
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.terminate()
        for member in psutil.wait_procs(family, timeout=10)[1]:
            member.kill()


def varied_model() -> segvit.SegViT:
    """Random weights that give several classes on photographs and on noise."""
    torch.manual_seed(5)
    config = segvit.ModelConfig(
        backbone="vit_tiny_patch16_224", image_size=(32, 32), out_layers=(1, 3), decoder_layers=1
    )
    model = segvit.build_model(config, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no server: {log.read_text()[-3000:]}") from error
            time.sleep(0.2)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def label_map(answer: str) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(base64.b64decode(answer))) as picture:
        assert (picture.format, picture.mode) == ("PNG", "P")
        return np.array(picture).astype(np.int64)


def predicted(server: Server, image: Path, target: Path) -> NDArray[np.int64]:
    """What `segvit predict` writes for an image file."""
    plan = plan_predictions(list_images([str(image)]), target, overwrite=True)
    [written] = predict_images(Segmenter(server.checkpoint), plan.tasks)
    assert isinstance(written, Prediction)
    with Image.open(written.labels) as picture:
        return np.array(picture).astype(np.int64)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """A PNG, a smaller JPEG, and a JPEG that its EXIF orientation turns by 90 degrees."""
    rng = np.random.default_rng(3)
    noise = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 56), (33, 47))]
    paths = [tmp_path / name for name in ("wide.png", "small.jpg", "turned.jpg")]
    noise[0].save(paths[0])
    noise[1].save(paths[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise[0].save(paths[2], exif=exif)
    return paths


def test_serve__files_of_any_size_give_the_maps_that_predict_writes(
    server: Server, photos: list[Path], tmp_path: Path
) -> None:
    expected = [predicted(server, photo, tmp_path / "out") for photo in photos]
    assert [one.shape for one in expected] == [(40, 56), (33, 47), (56, 40)]
    assert len(np.unique(np.concatenate([one.ravel() for one in expected]))) > 1
    texts = [encoded(photo.read_bytes()) for photo in photos]
    wrapped = base64.encodebytes(photos[0].read_bytes()).decode()
    assert "\n" in wrapped.strip()
    for body in (
        {"inputs": texts},
        {"instances": texts},
        {"inputs": [wrapped, *texts[1:]]},
        {"dataframe_split": {"columns": ["image"], "data": [[text] for text in texts]}},
        {"dataframe_records": [{"image": text} for text in texts]},
    ):
        status, answer = server.ask(body)
        assert status == 200, answer
        maps = [label_map(text) for text in answer["predictions"]]
        for found, wanted in zip(maps, expected, strict=True):
            assert np.array_equal(found, wanted)


def test_serve__parquet_holds_files_as_they_are(server: Server, photos: list[Path], tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"image": [photo.read_bytes() for photo in photos]}), table)
    status, answer = server.ask(table.getvalue(), "application/vnd.apache.parquet")
    assert status == 200, answer
    for text, photo in zip(answer["predictions"], photos, strict=True):
        assert np.array_equal(label_map(text), predicted(server, photo, tmp_path / "out"))


def test_serve__arrays_give_nested_lists(server: Server, photos: list[Path], tmp_path: Path) -> None:
    with Image.open(photos[0]) as wide:
        pixels = np.asarray(wide)
    expected = predicted(server, photos[0], tmp_path / "out")
    status, answer = server.ask({"inputs": [pixels.tolist(), pixels.tolist()]})
    assert status == 200
    assert np.array_equal(np.array(answer["predictions"]), np.stack([expected, expected]))
    status, answer = server.ask({"inputs": [pixels.tolist(), pixels[:, :30].tolist()]})
    assert status == 200
    assert np.array_equal(np.array(answer["predictions"][0]), expected)
    assert np.array(answer["predictions"][1]).shape == (40, 30)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"inputs": []}, "of type <class 'list'> was found"),
        ({"inputs": "aGVsbG8="}, "one image came without its batch; put it into a list"),
        ({"inputs": ["not base64!"]}, "image 0 is no base64 text of an image file"),
        (
            {"inputs": ["aGVsbG8="]},
            "image 0 cannot be decoded (unknown format); send a JPEG, PNG, TIFF, WebP or BMP file",
        ),
        ({"inputs": ["", "aGVsbG8="]}, "image 0 cannot be decoded"),
        ({"inputs": [[[[1, 2], [3, 4]]]]}, "image 0 has shape (1, 2, 2), not (height, width, 3); send a batch of RGB"),
        ({"inputs": [[[[1, 2, 300]]]]}, "image 0 is int64 and not of integers from 0 to 255; send uint8 RGB"),
        ({"inputs": [[[[0.5, 0.5, 0.5]]]]}, "image 0 is float64 and not of integers from 0 to 255"),
        ({"inputs": [[[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]]]}, "image 0 has rows of different lengths"),
        ({"inputs": [[[[1, 2, 3]]], "aGVsbG8="]}, "image 0 is no base64 text as others are; send all images in one"),
        ({"dataframe_records": [{"image": None}]}, ""),
        ({"inputs": {"image": ["aGVsbG8="]}}, "un-named"),
        ({"pictures": []}, "must be a JSON dictionary with exactly one of the input fields"),
    ],
)
def test_serve__bad_requests_get_400_and_the_reason(server: Server, body: dict[str, Any], reason: str) -> None:
    status, answer = server.ask(body)
    assert status == 400
    assert reason in answer["message"]
    assert "Traceback" not in json.dumps(answer)
    assert "pyfunc_model" not in json.dumps(answer)


def test_serve__a_reason_does_not_repeat_the_request(server: Server, photos: list[Path]) -> None:
    damaged = encoded(photos[0].read_bytes()[:3000])
    status, answer = server.ask({"inputs": [encoded(photos[1].read_bytes()), damaged]})
    assert status == 400
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert answer["message"].startswith("image 1 cannot be decoded (")
    assert len(answer["message"]) < 200


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_serve__a_real_image_gives_the_map_of_segvit_predict(server: Server, form: str, tmp_path: Path) -> None:
    data = os.environ.get("SEGVIT_DATA")
    if not data:
        pytest.skip("SEGVIT_DATA names no folder of data sets; it should hold camvid/")
    image = tmp_path / f"street.{form}"
    with Image.open(sorted(Path(data, "camvid", "val").iterdir())[0]) as street:
        street.convert("RGB").save(image, quality=90)
    expected = predicted(server, image, tmp_path / "out")
    assert min(expected.shape) >= 300
    assert len(np.unique(expected)) > 1
    status, answer = server.ask({"inputs": [encoded(image.read_bytes())]})
    assert status == 200
    [text] = answer["predictions"]
    assert np.array_equal(label_map(text), expected)
