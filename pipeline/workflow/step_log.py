"""What a step prints, kept beside its run: in the workspace while it works, and with its MLflow run when it has ended.

The file is WORKSPACE/logs/RUN/LABEL.log. On a disk every process of the step (its own, and those of training workers
that reach the workspace) appends whole lines to it as they are printed, so that a kill costs none; an object store
cannot append, so there each process has a file of its own, which is written anew every FLUSH_EVERY_S. What libraries
print past Python's own streams is in Ray's logs only.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from pipeline import storage
from pipeline.masking import masked

if TYPE_CHECKING:
    from pipeline.workflow.tracking import Tracking

LOGS_FOLDER = "logs"
LOG_SUFFIX = ".log"
ROTATED_SUFFIX = ".log.1"
LOG_ARTIFACT = "step.log"
# Of one file; there are two at most, this one and the one before it.
MAX_LOG_BYTES = 8 << 20
FLUSH_EVERY_S = 10.0

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_current: str | None = None


def log_folder(workspace: str, flow_run_id: str) -> str:
    """Where the logs of a run's steps lie."""
    return storage.join(workspace, LOGS_FOLDER, flow_run_id)


def log_uri(workspace: str, flow_run_id: str, label: str) -> str:
    """The log of one step."""
    return storage.join(log_folder(workspace, flow_run_id), log_name(label) + LOG_SUFFIX)


def log_name(label: str) -> str:
    """How the files of a step's log begin."""
    return label.replace("/", "-")


def current_log() -> str | None:
    """The log that this process writes to now, for the processes that it starts to join."""
    return _current


@contextmanager
def recording(uri: str | None, heading: str = "") -> Iterator[None]:
    """Keep what is printed and logged within the block in the log at `uri`, too, after a `heading`; None: nothing.

    A log that cannot be written is no reason for a step to fail: what does not fit is dropped.
    """
    global _current
    if uri is None:
        yield
        return
    sink = _open_sink(uri)
    if heading:
        with suppress(OSError):
            sink.line(heading)
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    out, err = (_Tee(stream, sink) for stream in streams.values())
    handlers = [
        (handler, handler.stream)
        for handler in _stream_handlers()
        if any(handler.stream is stream for stream in streams.values())
    ]
    former, _current = _current, uri
    try:
        with contextlib.redirect_stdout(cast("TextIO", out)), contextlib.redirect_stderr(cast("TextIO", err)):
            for handler, stream in handlers:
                handler.setStream(out if stream is streams["stdout"] else err)
            yield
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)
        _current = former
        out.end()
        err.end()
        sink.close()


def append_text(uri: str, text: str) -> None:
    """Add lines to a log; raises OSError where that cannot be."""
    sink = _open_sink(uri)
    for line in text.splitlines():
        sink.line(line)
    sink.close()


def keep_with_run(tracking: Tracking, run_id: str, uri: str) -> None:
    """Put the log of a step to its MLflow run; where that cannot be, it stays in the workspace alone."""
    with suppress(Exception):
        text = read_log(uri)
        if text:
            tracking.client().log_text(run_id, text, LOG_ARTIFACT)


def read_log(uri: str) -> str:
    """All that is kept of a step's log; "" where there is none."""
    folder, _, name = uri.rpartition("/")
    stem = name.removesuffix(LOG_SUFFIX)
    own = (f"{stem}{ROTATED_SUFFIX}", f"{stem}{LOG_SUFFIX}")
    others = [
        other for other in storage.list_names(folder) if other.startswith(f"{stem}@") and other.endswith(LOG_SUFFIX)
    ]
    parts = []
    for one in (*own, *others):
        with suppress(FileNotFoundError):
            parts.append(storage.read_bytes(storage.join(folder, one)).decode(errors="replace"))
    return "".join(parts)


class _Sink(ABC):
    """Takes lines, from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def line(self, text: str) -> None:
        """Keep one line, with the time; raises OSError where that cannot be."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
        # Of what was drawn over itself, the last state; and nothing that would steer a terminal.
        shown = masked(_CONTROL.sub("", text.rstrip("\r\n").rpartition("\r")[2]))
        with self.lock:
            self.write(f"{stamp}  {shown}\n".encode(errors="replace"))

    @abstractmethod
    def write(self, line: bytes) -> None:
        """Keep the bytes of one line."""

    @abstractmethod
    def close(self) -> None:
        """Nothing comes any more."""


class _FileSink(_Sink):
    """Appends to a local file, as other processes may; a full one gets another name, and a new one is begun."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._rotated = path.with_name(path.name.removesuffix(LOG_SUFFIX) + ROTATED_SUFFIX)
        self._file: io.FileIO | None = None

    def write(self, line: bytes) -> None:
        file = self._open()
        file.write(line)
        about = os.fstat(file.fileno())
        if about.st_size > MAX_LOG_BYTES:
            with suppress(FileNotFoundError):
                if self._path.stat().st_ino == about.st_ino:
                    os.replace(self._path, self._rotated)
            self.close()
            note = f"the log went on after {MAX_LOG_BYTES >> 20} MiB; what is older is in {self._rotated.name}\n"
            self._open().write(note.encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> io.FileIO:
        if self._file is not None:
            # Another process may have begun a new one.
            with suppress(FileNotFoundError):
                if self._path.stat().st_ino == os.fstat(self._file.fileno()).st_ino:
                    return self._file
            self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.FileIO(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), "a")
        return self._file


class _ObjectSink(_Sink):
    """The latest lines of this process, in an object of its own that is written anew from time to time."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = f"{uri.removesuffix(LOG_SUFFIX)}@{socket.gethostname()}-{os.getpid()}{LOG_SUFFIX}"
        self._text = bytearray()
        with suppress(OSError):
            # An earlier step of this process may have had the same name, started again.
            self._text += storage.read_bytes(self._uri)
        self._changed = False
        self._closed = threading.Event()
        threading.Thread(target=self._flush_often, name="step-log", daemon=True).start()

    def write(self, line: bytes) -> None:
        self._text += line
        if len(self._text) > MAX_LOG_BYTES:
            del self._text[: self._text.index(b"\n", len(self._text) - MAX_LOG_BYTES // 2) + 1]
            self._text[:0] = f"lines before these were dropped: the log had {MAX_LOG_BYTES >> 20} MiB\n".encode()
        self._changed = True

    def close(self) -> None:
        self._closed.set()
        self._flush()

    def _flush_often(self) -> None:
        while not self._closed.wait(FLUSH_EVERY_S):
            self._flush()

    def _flush(self) -> None:
        with self.lock:
            text, changed, self._changed = bytes(self._text), self._changed, False
        if changed:
            with suppress(Exception):
                storage.publish_bytes(self._uri, text)


def _open_sink(uri: str) -> _Sink:
    return _FileSink(storage.local_path(uri)) if storage.is_local(uri) else _ObjectSink(uri)


class _Tee:
    """A stream whose lines go to a log, too; in all else it is the stream."""

    def __init__(self, stream: TextIO, sink: _Sink) -> None:
        self._stream, self._sink = stream, sink
        self._begun = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Write to the stream, and whole lines to the log."""
        self._stream.write(text)
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._keep(line)
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        """Write one after the other."""
        for text in texts:
            self.write(text)

    def end(self) -> None:
        """Keep what has no end of line."""
        if self._begun:
            self._keep(self._begun)
        self._begun = ""

    def _keep(self, line: str) -> None:
        # A full disk is told by what fills it.
        with suppress(OSError):
            self._sink.line(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Those of all loggers: each holds the stream that was the standard one when it was made."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
