"""The HTTP server behind `segvit serve`: MLflow's requests and answers, each bounded in size, depth and time.

`mlflow models serve` reads a request of any length, answers some of them with a traceback and others with a page. Here
whatever is wrong is one JSON object, {"error_code": ..., "message": ...}, and status 4xx; what is not the caller's
fault is 5xx, and says nothing of this machine. Knows nothing of `segvit`: the model brings its own.

    python -m pipeline.registry.scoring_app FOLDER --host 127.0.0.1 --port 5001
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.version import VERSION

from pipeline.storage.json_text import parse_json

MAX_BODY_BYTES = 1 << 27  # 100 MB of image files in base64
MAX_WAITING = 8  # requests at once; they are predicted one after the other
BODY_WITHIN_S = 30.0
ANSWER_WITHIN_S = 60.0
_JSON = "application/json"
# Without types of its own.
_SCORING: Any = scoring_server
_CODES = {
    400: "INVALID_PARAMETER_VALUE",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "TOO_MANY_REQUESTS",
    500: "INTERNAL_ERROR",
}

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Limits(NamedTuple):
    """What one request may take."""

    body_bytes: int = MAX_BODY_BYTES
    waiting: int = MAX_WAITING
    body_within_s: float = BODY_WITHIN_S
    answer_within_s: float = ANSWER_WITHIN_S


class RefusedRequestError(Exception):
    """A request that is answered with `status` and `reason`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class ScoringApp:
    """An ASGI application that answers for `model`."""

    def __init__(self, model: PyFuncModel, limits: Limits | None = None) -> None:
        self.model = model
        self.limits = limits or Limits()
        metadata: Any = model.metadata
        self.schema = metadata.get_input_schema()
        self._at_work = threading.Lock()
        self._waiting = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the server's start and end."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            try:
                status, text = 200, await self._answer(scope, receive)
            except RefusedRequestError as refused:
                status, text = refused.status, _error(refused.status, refused.reason)
            headers = [(b"content-type", _JSON.encode()), (b"x-content-type-options", b"nosniff")]
            if status != 200:
                # What is left of the body is not read.
                headers.append((b"connection", b"close"))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})

    async def _answer(self, scope: Message, receive: Receive) -> str:
        path, method = scope["path"], scope["method"]
        if path in ("/ping", "/health", "/version"):
            return "\n" if path != "/version" else VERSION
        if path != "/invocations":
            raise RefusedRequestError(404, f"no page at {path[:100]!r}; post images to /invocations")
        if method != "POST":
            raise RefusedRequestError(405, f"{method[:20]} is not answered at /invocations; use POST")
        headers = {name.lower(): value for name, value in scope["headers"]}
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind != _JSON:
            raise RefusedRequestError(415, f"content type {kind[:100]!r} is not read; send {_JSON}")
        if self._waiting >= self.limits.waiting:
            raise RefusedRequestError(429, f"{self.limits.waiting} requests wait already; ask again in a while")
        self._waiting += 1
        try:
            body = await self._body(headers, receive)
            task = asyncio.create_task(asyncio.to_thread(self._predict, body))
            return await asyncio.wait_for(task, self.limits.answer_within_s)
        except TimeoutError:
            seconds = f"{self.limits.answer_within_s:g}"
            reason = f"the answer takes longer than the {seconds} s allowed; send fewer or smaller images"
            raise RefusedRequestError(408, reason) from None
        finally:
            self._waiting -= 1

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit, parts, size = self.limits.body_bytes, list[bytes](), 0
        too_large = RefusedRequestError(413, f"the request is longer than the {limit} bytes allowed; send fewer images")
        told = headers.get(b"content-length", b"")
        if told.isdigit() and int(told[:20]) > limit:
            raise too_large
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.body_within_s
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except TimeoutError:
                seconds = f"{self.limits.body_within_s:g}"
                raise RefusedRequestError(408, f"the request did not arrive within the {seconds} s allowed") from None
            if message["type"] == "http.disconnect":
                raise RefusedRequestError(400, "the connection ended before the request did")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)

    def _predict(self, body: bytes) -> str:
        """The answer's text; raises RefusedRequestError. Runs on a thread, and one at a time."""
        if not self._at_work.acquire(timeout=self.limits.answer_within_s):
            raise RefusedRequestError(429, "an earlier request is still at work; ask again in a while")
        try:
            return self._predict_alone(body)
        finally:
            self._at_work.release()

    def _predict_alone(self, body: bytes) -> str:
        try:
            content = parse_json(body)
        except ValueError as error:
            raise RefusedRequestError(400, f"the request is no JSON that is read: {_first_line(error)}") from error
        if not isinstance(content, dict):
            raise RefusedRequestError(400, 'the request is no JSON object; send {"inputs": [...]}')
        try:
            answer = _SCORING.invocations(content, _JSON, self.model, self.schema)
        except MlflowException as error:
            failed: Any = error
            status = failed.get_http_status_code()
            # The message of MLflow's own repeats the request, and may hold a traceback.
            raise RefusedRequestError(status if status < 500 else 400, _reason(failed.serialize_as_json())) from error
        # It parses what the caller sent, and falls over some of it.
        except Exception as error:
            print(f"{type(error).__name__}: {_first_line(error)}", file=sys.stderr, flush=True)
            raise RefusedRequestError(
                400, 'the request cannot be read; send {"inputs": [...]} with base64 texts of image files'
            ) from error
        if answer.status != 200:
            raise RefusedRequestError(answer.status, _first_line(answer.response))
        return str(answer.response)


def _reason(answer: str) -> str:
    told = str(json.loads(answer).get("message", ""))
    return _first_line(told.rpartition("\nError: ")[2] if "\nError: " in told else told)


def _first_line(told: object) -> str:
    line = str(told).strip().partition("\n")[0]
    return line if len(line) <= 500 else f"{line[:500]}..."


def _error(status: int, reason: str) -> str:
    return json.dumps({"error_code": _CODES.get(status, "BAD_REQUEST"), "message": reason})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def main() -> None:
    """Serve the MLflow model in a folder until the process is ended."""
    import uvicorn

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5001)
    options = parser.parse_args()
    app = ScoringApp(_SCORING.load_model_with_mlflow_config(options.folder))
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        server_header=False,
        limit_concurrency=8 * MAX_WAITING,
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=1 << 16,
    )


if __name__ == "__main__":
    main()
