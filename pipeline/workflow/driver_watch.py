"""What a flow's driver does beside its steps: it gives signs of life, and ends when it is asked to.

It is asked by SIGTERM or SIGINT (Ctrl-C), or from anywhere by the tag `segvit.cancel_requested_by` on its run. Whatever
the main thread does then is broken off by an exception, but for the moments in which a run is created or marked: there
the request is noted, and heeded when the moment is over. A request that some library has swallowed is made again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any

from pipeline.workflow import liveness
from pipeline.workflow.tracking import Tag, Tracking

CANCEL_POLL_S = 3.0
TICK_S = 0.5
# Whoever is asked once more while it still breaks off might leave something locked.
ASK_AGAIN_S = 2.0
JOIN_TIMEOUT_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class FlowTerminated(KeyboardInterrupt):
    """The process was asked to end (by a signal, or by `segvit cancel`) while a flow ran."""


class DriverWatch:
    """Watches over one run of a flow, from the process that drives it.

    Args:
        tracking: the store that holds the run.
        quiet: the code of functions in whose own lines no request is heeded, those that begin and end the flow: an
            exception there would leave a run unmarked.
    """

    def __init__(self, tracking: Tracking, quiet: tuple[CodeType, ...] = ()) -> None:
        self._tracking = tracking
        self._quiet = quiet
        self._run_id = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="flow-heartbeat", daemon=True)
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._signal: int | None = None
        self._asked = 0.0
        self._cancelled_by: str | None = None
        self.interruptible = False

    def take_signals(self) -> None:
        """Note the signals that ask to end; needed again after Ray's start, which installs a handler of its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            current = signal.getsignal(number)
            # Some shells start what runs in the background deaf to Ctrl-C, and rightly so.
            if current in (None, signal.SIG_IGN, self._ask):
                continue
            self._previous_handlers.setdefault(number, current)
            signal.signal(number, self._ask)

    def start(self, run_id: str) -> None:
        """Beat for the run from now on, and break off what the main thread does when asked to end."""
        self._run_id = run_id
        self._thread.start()
        self.interruptible = True

    def check(self) -> None:
        """Raise KeyboardInterrupt, or FlowTerminated, where the process was asked to end."""
        if self._signal is not None or self._cancelled_by is not None:
            raise self._interruption()

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """A moment in which a request is only noted; it is heeded at its end."""
        before, self.interruptible = self.interruptible, False
        try:
            yield
        finally:
            self.interruptible = before
        self.check()

    def terminate(self) -> None:
        """As if SIGTERM had come: it met the handler of another."""
        self._signal = self._signal or signal.SIGTERM
        raise self._interruption()

    def stop_reason(self) -> str:
        """Why the flow ends before its time."""
        if self._signal == signal.SIGTERM and self._cancelled_by is None:
            # A request to cancel comes with a signal where it can, and may have brought this one.
            with suppress(Exception):
                if self._tracking.is_reachable():
                    self._cancelled_by = self._request()
        if self._cancelled_by is not None:
            return f"cancelled by {self._cancelled_by}"
        return "terminated" if self.terminated else "interrupted"

    @property
    def terminated(self) -> bool:
        """Whether it was asked to end, and not interrupted by a person at the keyboard."""
        return self._signal == signal.SIGTERM or self._cancelled_by is not None

    def stop_beating(self) -> None:
        """No sign of life any more."""
        self._closed.set()

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        self._closed.set()
        if self._thread.is_alive():
            # Its signal shall not meet the handler of another. A request may hang while the server is away.
            self._thread.join(timeout=JOIN_TIMEOUT_S)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _interruption(self) -> KeyboardInterrupt:
        self._asked = time.monotonic()
        return FlowTerminated("terminated") if self.terminated else KeyboardInterrupt("interrupted")

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if self.interruptible and not (frame is not None and frame.f_code in self._quiet):
            raise self._interruption()

    def _beat(self) -> None:
        beaten = polled = time.monotonic()
        beats = 0
        while not self._closed.wait(min(TICK_S, CANCEL_POLL_S)):
            now = time.monotonic()
            # A missed beat is no harm: ten in a row mean something.
            with suppress(Exception):
                if now - polled >= CANCEL_POLL_S:
                    polled = now
                    user = self._request()
                    self._cancelled_by = self._cancelled_by or user
                if now - beaten >= liveness.HEARTBEAT_S:
                    beats += 1
                    self._tracking.client().set_tag(self._run_id, liveness.HEARTBEAT_TAG, liveness.heartbeat(beats))
                    beaten = now
            self._ask_again()

    def _ask_again(self) -> None:
        asked = self._signal is not None or self._cancelled_by is not None
        if not asked or not self.interruptible or time.monotonic() - self._asked < ASK_AGAIN_S:
            return
        if self._previous_handlers and not self._closed.is_set():
            # Whatever the main thread waits for, this ends it.
            signal.pthread_kill(threading.main_thread().ident or 0, self._signal or signal.SIGTERM)

    def _request(self) -> str | None:
        tags = self._tracking.client().get_run(self._run_id).data.tags
        return str(tags[Tag.CANCEL]) if Tag.CANCEL in tags else None
