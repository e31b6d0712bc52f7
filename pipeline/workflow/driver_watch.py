"""What a flow's driver does beside its steps: it gives signs of life, and ends when it is asked to.

It is asked by SIGTERM, or from anywhere by the tag `segvit.cancel_requested_by` on its run.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from pipeline.workflow import liveness
from pipeline.workflow.tracking import Tag, Tracking

CANCEL_POLL_S = 3.0
JOIN_TIMEOUT_S = 5.0


class FlowTerminated(KeyboardInterrupt):
    """The process was asked to end (by a signal, or by `segvit cancel`) while a flow ran."""


class DriverWatch:
    """Watches over one run of a flow, from the process that drives it."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self._tracking = tracking
        self._run_id = run_id
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="flow-heartbeat", daemon=True)
        self._terminated = False
        self._stopping = False
        self._cancelled_by: str | None = None
        self._previous_handler: Any = None

    def start(self) -> None:
        """Beat from now on, and raise FlowTerminated in the main thread when asked to end."""
        self._thread.start()
        self.handle_sigterm()

    def handle_sigterm(self) -> None:
        """Take SIGTERM; needed again after Ray's start, which installs a handler of its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.signal(signal.SIGTERM, self._terminate)
        if self._previous_handler is None:
            self._previous_handler = previous

    def check(self) -> None:
        """Raise FlowTerminated where the flow shall end, told by a signal that got lost or by no signal at all."""
        if self._terminated or self._cancelled_by is not None:
            self._stopping = True
            raise FlowTerminated

    def stop_reason(self) -> str:
        """Why the flow ends before its time; from now on no signal disturbs it."""
        self._stopping = True
        if self._terminated and self._cancelled_by is None:
            # A request to cancel comes with a signal where it can, and may have brought this one.
            with suppress(Exception):
                if self._tracking.is_reachable():
                    self._cancelled_by = self._request()
        if self._cancelled_by is not None:
            self._terminated = True
            return f"cancelled by {self._cancelled_by}"
        return "terminated" if self._terminated else "interrupted"

    @property
    def terminated(self) -> bool:
        """Whether it was asked to end, and not interrupted by a person at the keyboard."""
        return self._terminated

    def stop_beating(self) -> None:
        """No sign of life any more."""
        self._closed.set()

    def release(self) -> None:
        """Give SIGTERM back to whoever had it."""
        self._closed.set()
        if self._thread.is_alive():
            # Its signal shall not meet the handler of another. A request may hang while the server is away.
            self._thread.join(timeout=JOIN_TIMEOUT_S)
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _terminate(self, _signal: int, _frame: FrameType | None) -> None:
        # A second signal shall not stop the marking of what the first one ended.
        if not self._stopping:
            self._stopping = self._terminated = True
            raise FlowTerminated

    def _beat(self) -> None:
        beaten = time.monotonic()
        while not self._closed.wait(CANCEL_POLL_S):
            # A missed beat is no harm: ten in a row mean something.
            with suppress(Exception):
                if time.monotonic() - beaten >= liveness.HEARTBEAT_S:
                    self._tracking.client().set_tag(self._run_id, liveness.HEARTBEAT_TAG, liveness.now_text())
                    beaten = time.monotonic()
                user = self._request()
                if user is not None and self._cancelled_by is None:
                    self._cancelled_by = user
                    if self._previous_handler is not None and not self._stopping and not self._closed.is_set():
                        # Whatever the main thread waits for, this ends it.
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _request(self) -> str | None:
        tags = self._tracking.client().get_run(self._run_id).data.tags
        return str(tags[Tag.CANCEL]) if Tag.CANCEL in tags else None
