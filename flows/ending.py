"""The last resort of a command that was asked to end: whatever it hangs in, it ends within ten seconds."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

END_WITHIN_S = 8.5
# When the interpreter is being taken down, no thread of it runs any more; the system's own alarm does.
ALARM_AFTER_S = 1.2


@contextmanager
def ending_in_time() -> Iterator[None]:
    """Within the block a SIGTERM or SIGINT that some handler took must have ended the process `END_WITHIN_S` later.

    Else its children are killed and it ends with 128 + the signal's number; a run that it could not mark by then is
    marked by whoever looks next. Python tells of a signal here even where the main thread cannot run its handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end,), name="ending-in-time", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write_end)


def _watch(read_end: int) -> None:
    with open(read_end, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                signal.setitimer(signal.ITIMER_REAL, END_WITHIN_S + ALARM_AFTER_S)
                _end_after(END_WITHIN_S, 128 + number[0])


def _end_after(seconds: float, code: int) -> None:
    import psutil  # before the time is up: a busy machine may take a second for it

    time.sleep(seconds)
    # Threads still run, so the alarm is not what must end this process: the children are killed first.
    signal.setitimer(signal.ITIMER_REAL, ALARM_AFTER_S)
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(code)
