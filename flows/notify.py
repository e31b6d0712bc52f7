"""The hook at the end of a flow: a command or a URL gets how it ended, as JSON. Whether it works changes nothing else.

A driver that is killed outright (SIGKILL, a power cut) tells nobody; `segvit runs` marks its run as abandoned.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from flows.present.results import facts
from flows.present.runs import duration
from pipeline.causes import one_line
from pipeline.config.notify import Notify, hidden
from pipeline.errors import UserError
from pipeline.records import PromotionDecision, Record, SearchResult
from pipeline.workflow.flow import Flow, FlowFailed
from pipeline.workflow.tracking import RunState

TIMEOUT_S = 10.0
# A process that was asked to end has eight seconds in all (flows.ending), and Ray takes most of them: a command lives
# on by itself then.
INTERRUPTED_TIMEOUT_S = 2.0
NO_WAIT = 0.0
STANDARD_ERROR = 2


class HookFailed(Exception):  # noqa: N818 - reads as what happened
    """Why nobody was told, without the hook's secrets."""


@contextmanager
def notifying(notify: Notify | None, flow: Flow, warn: Callable[[str], None]) -> Iterator[None]:
    """Tell `notify` how the flow within the block ended; one that has not begun tells nothing.

    `warn` gets a line where the hook fails.
    """
    begun = time.monotonic()

    def tell(state: RunState, error: BaseException | None = None, timeout_s: float = TIMEOUT_S) -> None:
        if notify is None or not flow.run_id:
            return
        try:
            records = flow.wait() if state == RunState.FINISHED else {}
            content = message(flow.name, flow.run_id, state, error, time.monotonic() - begun, records)
            send(notify, content, warn, timeout_s)
        except Exception as mistake:
            warn(f"warning: nobody was told of the flow's end: {one_line(mistake)}")

    try:
        yield
    except KeyboardInterrupt as stop:
        tell(RunState.KILLED, stop, NO_WAIT if isinstance(notify, tuple) else INTERRUPTED_TIMEOUT_S)
        raise
    except Exception as error:
        tell(RunState.FAILED, error)
        raise
    tell(RunState.FINISHED)


def message(
    flow: str, run_id: str, state: RunState, error: BaseException | None, seconds: float, records: Mapping[str, Record]
) -> dict[str, Any]:
    """What the hook gets: flow, run, state, cause in a line, seconds, key figures, and all that in a line as `text`."""
    figures = key_figures(records)
    cause = _cause(error) if error is not None else None
    words = [f"{flow} {run_id[:12]} {state.value} after {duration(seconds)}"]
    words += [cause] if cause else []
    words += [f"{variant} mIoU {miou:.4f}" for variant, miou in figures["miou"].items()]
    if figures["promoted"] is not None:
        words.append(f"version {figures['champion']} promoted" if figures["promoted"] else "none promoted")
    return {
        "flow": flow,
        "run_id": run_id,
        "state": state.value,
        "error": cause,
        "seconds": round(seconds, 1),
        **figures,
        # Chat services show this field of what is posted to them.
        "text": ": ".join([words[0], ", ".join(words[1:])]) if words[1:] else words[0],
    }


def _cause(error: BaseException) -> str:
    if isinstance(error, FlowFailed):
        # Without the flow's name, which stands before it.
        return one_line(UserError("; ".join(f"{one.label}: {one.cause}" for one in error.failures)))
    return str(error) if isinstance(error, KeyboardInterrupt) and str(error) else one_line(error)


def key_figures(records: Mapping[str, Record]) -> dict[str, Any]:
    """mIoU and version by variant, the best of a search, whether one was promoted and why (not)."""
    found = facts(records)
    decision = next((one for one in records.values() if isinstance(one, PromotionDecision)), None)
    search = next((one for one in records.values() if isinstance(one, SearchResult)), None)
    return {
        "miou": {name: one["miou"] for name, one in found["evaluations"].items()},
        "versions": found["versions"],
        "search_miou": search.miou if search else None,
        "promoted": decision.promoted if decision else None,
        "champion": decision.champion_after if decision else None,
        "decision": decision.reason if decision else None,
    }


def send(notify: Notify, content: Mapping[str, Any], warn: Callable[[str], None], timeout_s: float = TIMEOUT_S) -> None:
    """Give the hook its JSON; what goes wrong, or takes too long, is a line to `warn`.

    With `NO_WAIT` a command is started and left alone.
    """
    body = json.dumps(content).encode()
    reasons: list[str] = []
    deliver = _run_command if isinstance(notify, tuple) else _post

    def work() -> None:
        try:
            deliver(notify, body, timeout_s)  # type: ignore[arg-type]
        except Exception as error:
            reasons.append(str(error) if isinstance(error, HookFailed) else type(error).__name__)

    # A server may send its answer byte by byte, each in time.
    thread = threading.Thread(target=work, name="notify", daemon=True)
    thread.start()
    try:
        thread.join(timeout_s + 1)
        if thread.is_alive():
            reasons.append(f"no end after {timeout_s:g} s")
    except KeyboardInterrupt:
        reasons.append("interrupted")
    if reasons:
        shown = hidden(notify)
        name = shown if isinstance(shown, str) else " ".join(shown)
        warn(f"warning: the hook {name} was not told of the flow's end: {reasons[0]}")


def _run_command(words: tuple[str, ...], body: bytes, timeout_s: float) -> None:
    try:
        # To standard error, for the output is the command line's own; a group of its own, so that what it starts ends
        # with it.
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=STANDARD_ERROR, start_new_session=True)
    except OSError as error:
        raise HookFailed(error.strerror or type(error).__name__) from error
    if timeout_s == NO_WAIT:
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            # The pipe has room for it, whether it is read or not.
            pipe.write(body)
        return
    try:
        process.communicate(body, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise HookFailed(f"it took more than {timeout_s:g} s and was ended") from error
    if process.returncode:
        raise HookFailed(f"it ended with code {process.returncode}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        """Nowhere: what was meant for one address is for no other."""
        return


def _post(url: str, body: bytes, timeout_s: float) -> None:
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    if parts.username is not None:
        # urllib would take name and password for a part of the host.
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s):
            pass
    except urllib.error.HTTPError as error:
        moved = "; give the address that it redirects to" if 300 <= error.code < 400 else ""
        raise HookFailed(f"it answered {error.code}{moved}") from error
    except urllib.error.URLError as error:
        reason = error.reason
        told = getattr(reason, "strerror", None) if isinstance(reason, OSError) else None
        raise HookFailed(f"it cannot be reached ({told or type(reason).__name__})") from error
    except TimeoutError as error:
        raise HookFailed(f"no answer within {timeout_s:g} s") from error
