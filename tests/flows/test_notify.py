"""The hook at the end of a flow: what it is told, and that nothing else depends on it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from flows import notify as module
from flows.notify import message, notifying, send
from pipeline.config import RuntimeConfig
from pipeline.errors import UserError
from pipeline.records import Evaluation, ModelVersion, PromotionDecision, Record
from pipeline.workflow.flow import FlowFailed, FlowTerminated, StepFailure
from pipeline.workflow.tracking import RunState
from tests.flows.facts import exit_code

CONFIG = str(Path(__file__).parents[2] / "flows" / "configs" / "quickstart.yaml")
FACTS = {"flow": "quick", "state": "finished"}
KEEP = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"


def records() -> dict[str, Record]:
    own = Evaluation(
        variant="full",
        checkpoint_digest="c",
        data_digest="d",
        split="val",
        num_images=2,
        miou=0.75,
        macc=0.6,
        aacc=0.7,
        boundary_iou=None,
        class_names=("a",),
        per_class_iou=(0.5,),
        per_class_accuracy=(0.6,),
        gflops=1.0,
        parameters=2,
        latency_ms=3.0,
        cost_size=(32, 32),
        uri="x",
    )
    version = ModelVersion(
        name="quick",
        version=4,
        variant="full",
        model_uri="models:/quick/4",
        checkpoint_digest="c",
        evaluation=own,
        run_id="r",
    )
    decision = PromotionDecision(
        name="quick", version=4, promoted=True, reason="it is best", checks=(), champion_before=3, champion_after=4
    )
    other = own.model_copy(update={"miou": 0.8})
    return {
        "evaluate/full": own,
        "evaluate/full/flipped": other,
        "register/full": version,
        "promote": decision,
    }


class Server(BaseHTTPRequestHandler):
    """Notes what is posted; answers /moved with a redirect, /broken with an error, /slow when it is let."""

    got: ClassVar[list[tuple[str, str | None, Any]]] = []
    let: ClassVar[threading.Event] = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        Server.got.append((self.path, self.headers["Authorization"], body))
        if self.path == "/slow":
            Server.let.wait(30)
        self.send_response({"/moved": 302, "/broken": 500}.get(self.path, 204))
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        Server.got.append((self.path, "followed", None))

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Server, "got", [])
    monkeypatch.setattr(Server, "let", threading.Event())
    listening = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    Server.let.set()
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_message__of_a_flow_that_finished() -> None:
    assert message("quick", "97f2c7b20629aaaa", RunState.FINISHED, None, 3012.4, records()) == {
        "flow": "quick",
        "run_id": "97f2c7b20629aaaa",
        "state": "finished",
        "error": None,
        "seconds": 3012.4,
        "miou": {"full": 0.75},
        "versions": {"full": 4},
        "search_miou": None,
        "promoted": True,
        "champion": 4,
        "decision": "it is best",
        "text": "quick 97f2c7b20629 finished after 50 min 12 s: full mIoU 0.7500, version 4 promoted",
    }


def test_message__of_one_that_failed_tells_the_cause_in_a_line() -> None:
    failed = FlowFailed("quick", (StepFailure("train/full", "the loss is not finite", None, None, None),))
    told = message("quick", "97f2c7b20629", RunState.FAILED, failed, 5, {})
    assert told["error"] == "train/full: the loss is not finite"
    assert told["text"] == f"quick 97f2c7b20629 failed after 5.0 s: {told['error']}"
    assert (told["miou"], told["promoted"]) == ({}, None)


def test_send__url_gets_json(server: str) -> None:
    warnings: list[str] = []
    send(f"{server}/hook?token=s3cret", FACTS, warnings.append)
    assert Server.got == [("/hook?token=s3cret", None, FACTS)]
    assert warnings == []


@pytest.mark.parametrize(
    ("path", "timeout_s", "warning"),
    [
        ("/moved", 60, "it answered 302; give the address that it redirects to"),
        ("/broken", 60, "it answered 500"),
        ("/slow", 0.5, "no answer within 0.5 s"),
    ],
)
def test_send__url_that_fails_is_one_line_without_its_secret(
    server: str, path: str, timeout_s: float, warning: str
) -> None:
    warnings: list[str] = []
    send(f"{server.replace('//', '//user:s3cret@')}{path}", FACTS, warnings.append, timeout_s)
    assert warnings == [f"warning: the hook {server}/*** was not told of the flow's end: {warning}"]
    # No redirect is followed.
    assert [got[:2] for got in Server.got] == [(path, "Basic dXNlcjpzM2NyZXQ=")]


def test_send__url_that_nobody_listens_at(server: str) -> None:
    warnings: list[str] = []
    send("http://127.0.0.1:9/s3cret", FACTS, warnings.append)
    assert warnings == [
        "warning: the hook http://127.0.0.1:9/*** was not told of the flow's end: it cannot be reached "
        "(Connection refused)"
    ]


def test_send__command_gets_json_on_standard_input_without_a_shell(tmp_path: Path) -> None:
    warnings: list[str] = []
    # What a shell would make of it is a file of another name.
    kept = tmp_path / "kept; $(touch broken) *"
    send((sys.executable, "-c", KEEP, str(kept)), FACTS, warnings.append)
    assert json.loads(kept.read_bytes()) == FACTS
    assert warnings == []
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize(
    ("code", "timeout_s", "warning"),
    [
        ("import sys; sys.exit(3)", 60, "it ended with code 3"),
        ("import time; time.sleep(600)", 0.4, "it took more than 0.4 s and was ended"),
    ],
)
def test_send__command_that_fails_is_one_line(code: str, timeout_s: float, warning: str) -> None:
    warnings: list[str] = []
    send((sys.executable, "-c", code, "s3cret"), FACTS, warnings.append, timeout_s)
    assert warnings == [f"warning: the hook {sys.executable} *** was not told of the flow's end: {warning}"]


def test_send__command_that_is_not_there() -> None:
    warnings: list[str] = []
    send(("/no/such/program",), FACTS, warnings.append)
    [line] = warnings
    assert line == "warning: the hook /no/such/program was not told of the flow's end: No such file or directory"


class Flow:
    """Stands for a Flow that has ended."""

    name, run_id = "quick", "97f2c7b20629aaaa"

    def wait(self) -> dict[str, Record]:
        return records()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any], float]]:
    calls: list[tuple[Any, dict[str, Any], float]] = []
    monkeypatch.setattr(
        module, "send", lambda notify, content, warn, timeout_s: calls.append((notify, content, timeout_s))
    )
    return calls


@pytest.mark.parametrize(
    ("ended", "state", "error", "timeout_s"),
    [
        (None, "finished", None, 10.0),
        (UserError("no room"), "failed", "no room", 10.0),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero", 10.0),
        (FlowTerminated("cancelled by ann"), "killed", "cancelled by ann", 0.0),
        (KeyboardInterrupt("interrupted"), "killed", "interrupted", 0.0),
    ],
)
def test_notifying__every_end_and_the_error_goes_on(
    sent: list[Any], ended: BaseException | None, state: str, error: str | None, timeout_s: float
) -> None:
    flow: Any = Flow()

    def run() -> None:
        with notifying(("tell",), flow, pytest.fail):
            if ended is not None:
                raise ended

    if ended is None:
        run()
    else:
        with pytest.raises(type(ended)) as caught:
            run()
        assert caught.value is ended
    [(notify, content, within_s)] = sent
    assert (notify, content["state"], content["error"], within_s) == (("tell",), state, error, timeout_s)
    assert content["miou"] == ({"full": 0.75} if ended is None else {})


def test_notifying__a_url_has_two_seconds_of_a_process_that_ends(sent: list[Any]) -> None:
    flow: Any = Flow()
    with pytest.raises(KeyboardInterrupt), notifying("https://host/hook", flow, pytest.fail):
        raise KeyboardInterrupt
    assert [within_s for _, _, within_s in sent] == [2.0]


def test_send__command_that_is_not_waited_for_gets_it_all_the_same(tmp_path: Path) -> None:
    kept, ready = tmp_path / "kept", tmp_path / "ready"
    os.mkfifo(ready)
    # It waits for the test before it reads, and the test for it afterwards.
    code = f"open({str(ready)!r}).read(); {KEEP}; open({str(ready)!r}, 'w').write('done')"
    send((sys.executable, "-c", code, str(kept)), FACTS, pytest.fail, module.NO_WAIT)
    ready.write_text("go")
    assert ready.read_text() == "done"
    assert json.loads(kept.read_bytes()) == FACTS


def test_notifying__nobody_where_none_is_named_or_no_run_began(sent: list[Any]) -> None:
    flow: Any = Flow()
    with notifying(None, flow, pytest.fail):
        pass
    begun: Any = SimpleNamespace(name="quick", run_id="")
    with pytest.raises(UserError), notifying(("tell",), begun, pytest.fail):
        raise UserError("no store")
    assert sent == []


@pytest.mark.parametrize(
    ("given", "used", "shown"),
    [
        ("https://hooks.example/T0/s3cret", "https://hooks.example/T0/s3cret", "https://hooks.example/***"),
        (
            "http://ann:s3cret@[::1]:8080/x?key=s3cret#s3cret",
            "http://ann:s3cret@[::1]:8080/x?key=s3cret#s3cret",
            "http://[::1]:8080/***",
        ),
        (["tell", "--key", "s3cret"], ("tell", "--key", "s3cret"), ["tell", "***"]),
        (["tell"], ("tell",), ["tell"]),
        (None, None, None),
    ],
)
def test_config__is_written_nowhere_as_it_is(given: Any, used: Any, shown: Any) -> None:
    config = RuntimeConfig(notify=given)
    assert config.notify == used
    assert config.model_dump(mode="json")["notify"] == shown
    assert "s3cret" not in repr(config) + config.model_dump_json() + str(config.model_dump())
    # A worker reads what was written.
    assert RuntimeConfig.model_validate(config.model_dump(mode="json")).model_dump(mode="json")["notify"] == shown


@pytest.mark.parametrize(
    "given", ["ftp://host/s3cret", "https://", "tell s3cret", "http://host:s3cret/", "file:///s3cret", [], [""], [3], 7]
)
def test_config__what_is_neither_url_nor_command(given: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        RuntimeConfig(notify=given)
    [problem] = caught.value.errors()
    assert problem["loc"] == ("notify",)
    assert "list of words" in problem["msg"]
    assert "s3cret" not in problem["msg"]


def test_plan__mistakes_are_told_before_anything_starts_without_the_value(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = ("--workspace", str(tmp_path / "ws"))
    assert exit_code("plan", CONFIG, "--set", "runtime.notify=ftp://host/s3cret", *workspace) == 1
    said = capfd.readouterr().err
    assert "runtime.notify: it is neither a URL, https://HOST/PATH, nor a command" in said
    assert "s3cret" not in said
    assert exit_code("plan", CONFIG, "--set", "runtime.notify=[no-such-program, s3cret]", *workspace) == 1
    said = capfd.readouterr().err
    assert "runtime.notify: there is no program no-such-program; correct the first word" in said
    assert "s3cret" not in said


def test_plan__a_hook_changes_no_fingerprint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def planned(*overrides: str) -> Any:
        assert exit_code("plan", CONFIG, *overrides, "--workspace", str(tmp_path / "ws"), "--json") == 0
        return json.loads(capfd.readouterr().out)

    assert planned("--set", "runtime.notify=https://host/hook") == planned()


def test_notifying__a_mistake_of_its_own_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("evaluations")

    monkeypatch.setattr(module, "facts", broken)
    flow: Any = Flow()
    warnings: list[str] = []
    with notifying(("tell",), flow, warnings.append):
        pass
    assert warnings == ["warning: nobody was told of the flow's end: KeyError: 'evaluations'"]
