"""The bounds of the server behind `segvit serve`, asked as a server asks it; no socket is opened."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.registry import pyfunc_model
from pipeline.registry.model_package import save_pyfunc
from pipeline.registry.pyfunc_model import MAX_IMAGES, SegmentationModel, UnusableInputError
from pipeline.registry.scoring_app import Limits, ScoringApp
from segvit import image_files
from segvit.image_files import encode_png
from tests.pipeline.conftest import Trained
from tests.tiny_model import make_tiny_model

PICTURE = base64.b64encode(encode_png(np.full((32, 48, 3), 128, np.uint8))).decode()
JSON = b"application/json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("served")
    make_tiny_model(folder)
    save_pyfunc(folder / "model", folder / "checkpoint")
    return mlflow.pyfunc.load_model(str(folder / "model"))


def ask(
    app: ScoringApp,
    body: bytes,
    headers: dict[bytes, bytes] | None = None,
    path: str = "/invocations",
    method: str = "POST",
    pause_s: float = 0.0,
) -> tuple[int, Any]:
    """Status and parsed answer of a request that arrives in parts, each after a pause."""
    return asyncio.run(_ask(app, body, {b"content-type": JSON} if headers is None else headers, path, method, pause_s))


async def _ask(
    app: ScoringApp, body: bytes, headers: dict[bytes, bytes], path: str, method: str, pause_s: float
) -> tuple[int, Any]:
    parts = [body[start : start + 1000] for start in range(0, len(body), 1000)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers.items())}
    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    text = sent[1]["body"]
    return sent[0]["status"], json.loads(text) if text.strip() else None


def test_answer__is_that_of_the_model(model: Any) -> None:
    app = ScoringApp(model)
    status, answer = ask(app, json.dumps({"inputs": [PICTURE]}).encode())
    assert status == 200
    assert answer["predictions"] == model.predict(np.array([PICTURE]))
    assert ask(app, b"", path="/ping", method="GET") == (200, None)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the request is no JSON that is read"),
        (b"[" * 100_000, "it is nested too deep"),
        (b'{"inputs": [' + b"1," * (1 << 23) + b"1]}", "it holds about 8388610 values, more than the 8388608 allowed"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[1, 2]", 'the request is no JSON object; send {"inputs": [...]}'),
        (b'{"inputs": [[[[NaN, 1e999, 0]]]]}', "image 0 is float64 and not of integers from 0 to 255"),
        (b'{"inputs": ["%%%"]}', "image 0 is no base64 text of an image file"),
        (b'{"inputs": [[1, [2]], 3]}', "has rows of different lengths or depths"),
        (b'{"inputs": {"a": {"b": 1}}}', ""),
        (b'{"dataframe_split": {"data": 3}}', ""),
        (b'{"messages": []}', ""),
        (b"\xff\xfe", "the request is no JSON that is read"),
    ],
)
def test_request__that_cannot_be_read_is_one_error(model: Any, body: bytes, reason: str) -> None:
    status, answer = ask(ScoringApp(model), body)
    assert status == 400
    assert reason in answer["message"]
    assert "\n" not in answer["message"]
    assert "Traceback" not in answer["message"]
    assert len(answer["message"]) <= 510


def test_request__beyond_the_length_is_refused_before_it_is_read(model: Any) -> None:
    app = ScoringApp(model, Limits(body_bytes=2000))
    told = {b"content-type": JSON, b"content-length": b"5000"}
    for headers in (told, {b"content-type": JSON}, {b"content-type": JSON, b"content-length": b"-1"}):
        status, answer = ask(app, b"x" * 5000, headers)
        assert status == 413
        assert answer["error_code"] == "REQUEST_TOO_LARGE"
        assert answer["message"] == "the request is longer than the 2000 bytes allowed; send fewer images"


@pytest.mark.parametrize("kind", [b"text/csv", b"application/vnd.apache.parquet", b"", b"x" * 1000])
def test_request__of_another_content_type(model: Any, kind: bytes) -> None:
    status, answer = ask(ScoringApp(model), b"x", {b"content-type": kind})
    assert (status, answer["error_code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert answer["message"].endswith("is not read; send application/json")


def test_request__elsewhere_or_by_another_method(model: Any) -> None:
    assert ask(ScoringApp(model), b"", path="/../etc")[0] == 404
    assert ask(ScoringApp(model), b"", method="GET")[0] == 405


def test_request__that_does_not_arrive(model: Any) -> None:
    app = ScoringApp(model, Limits(body_within_s=0.05))
    status, answer = ask(app, b"x" * 5000, pause_s=0.04)
    assert status == 408
    assert answer["message"] == "the request did not arrive within the 0.05 s allowed"


class SlowModel:
    """Answers once it is told to."""

    def __init__(self, model: Any) -> None:
        self.metadata = model.metadata
        self.may_end = threading.Event()

    def predict(self, data: Any, params: Any = None) -> list[int]:
        self.may_end.wait(30)
        return [1]


def test_request__that_takes_too_long_and_those_behind_it(model: Any) -> None:
    slow: Any = SlowModel(model)
    app = ScoringApp(slow, Limits(answer_within_s=0.2, waiting=1))
    body = json.dumps({"inputs": [PICTURE]}).encode()
    headers = {b"content-type": JSON}

    async def both() -> list[tuple[int, Any]]:
        first = asyncio.create_task(_ask(app, body, headers, "/invocations", "POST", 0.0))
        await asyncio.sleep(0.1)
        second = await _ask(app, body, headers, "/invocations", "POST", 0.0)
        found = [await first, second]
        slow.may_end.set()
        return found

    (status, answer), (busy, refused) = asyncio.run(both())
    assert (status, answer["error_code"]) == (408, "REQUEST_TIMEOUT")
    assert answer["message"] == "the answer takes longer than the 0.2 s allowed; send fewer or smaller images"
    assert (busy, refused["message"]) == (429, "1 requests wait already; ask again in a while")


@pytest.fixture
def loaded(trained: Trained) -> SegmentationModel:
    loaded = SegmentationModel()
    context: Any = SimpleNamespace(artifacts={"checkpoint": trained.checkpoint.uri})
    loaded.load_context(context)
    return loaded


def predict(model: SegmentationModel, images: NDArray[Any]) -> Any:
    context: Any = None
    return model.predict(context, images)


def test_model__bounds_images_and_pixels(loaded: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnusableInputError, match=f"{MAX_IMAGES + 1} images came, more than the {MAX_IMAGES} allowed"):
        predict(loaded, np.array([PICTURE] * (MAX_IMAGES + 1)))
    monkeypatch.setenv("SEGVIT_SERVE_MAX_PIXELS", str(2 * 32 * 48))
    assert len(predict(loaded, np.array([PICTURE] * 2))) == 2
    message = "image 2 of 48x32 pixels is beyond the 3072 pixels allowed in all; scale it down, send fewer at once, or"
    with pytest.raises(UnusableInputError, match=message):
        predict(loaded, np.array([PICTURE] * 3))
    with pytest.raises(UnusableInputError, match=message):
        predict(loaded, np.zeros((3, 32, 48, 3), np.uint8))


def test_model__a_picture_is_not_decoded_before_its_size_is_known(
    loaded: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = base64.b64encode(encode_png(np.zeros((8000, 8000), np.uint8))).decode()
    monkeypatch.setattr(image_files, "decode_image", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(UnusableInputError, match="image 0 of 8000x8000 pixels is beyond the 16777216 pixels allowed"):
        predict(loaded, np.array([large]))


def test_model__ends_a_request_that_takes_too_long(loaded: SegmentationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfunc_model, "MAX_SECONDS", -1.0)
    for images in (np.array([PICTURE]), np.zeros((1, 32, 48, 3), np.uint8)):
        with pytest.raises(UnusableInputError, match=r"the images take longer than the -1 s allowed; send fewer at on"):
            predict(loaded, images)


def test_model__arrays_of_many_images_are_predicted_in_parts(
    loaded: SegmentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    whole = predict(loaded, images)
    monkeypatch.setattr(pyfunc_model, "_BATCH_PIXELS", 2 * 32 * 48)
    np.testing.assert_array_equal(predict(loaded, images), whole)
