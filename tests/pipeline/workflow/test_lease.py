"""Numbers that only grow, and one at a time as long as nobody is taken for dead."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.workflow.lease import InLine, Lease, LeaseLost, last_number, take_lease, wait_in_line


def test_lease__the_last_one_holds_and_former_marks_go(tmp_path: Path) -> None:
    uri = str(tmp_path / "lease")
    assert last_number(uri) == 0
    first = take_lease(uri, "the table")
    first.check()
    second = take_lease(uri, "the table", key="b" * 32, above=6)
    second.check()
    assert (first.rank.number, second.rank.number, last_number(uri)) == (1, 7, 7)
    message = r"the table was taken over by another process \(lease 7 of bbbbbbbb, after 1\); this one stops"
    with pytest.raises(LeaseLost, match=message):
        first.check()
    assert storage.list_names(uri) == [f"00000007-{'b' * 32}"]


@pytest.mark.parametrize("folder", ["{tmp}/lease", "memory://bucket/lease"])
def test_lease__holds_in_a_process_that_is_given_it(tmp_path: Path, folder: str) -> None:
    held = take_lease(folder.format(tmp=tmp_path), "the table")
    given: Lease = pickle.loads(pickle.dumps(held))
    given.check()
    take_lease(held.uri, "the table")
    with pytest.raises(LeaseLost):
        given.check()


def test_take_lease__paused_after_it_looked_it_overtakes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, publish = str(tmp_path / "lease"), storage.publish_bytes
    newer: list[Lease] = []

    def pause(mark: str, data: bytes) -> None:
        monkeypatch.setattr("pipeline.storage.publish_bytes", publish)
        newer.extend(take_lease(uri, "the table") for _ in range(2))
        publish(mark, data)

    monkeypatch.setattr("pipeline.storage.publish_bytes", pause)
    with pytest.raises(LeaseLost):
        take_lease(uri, "the table")
    newer[1].check()


def _take_and_write(uri: str, file: str) -> int:
    try:
        lease = take_lease(uri, "the table")
        lease.check()
        storage.publish_bytes(file, str(lease.rank.number).encode())
    except LeaseLost:
        return 0
    return lease.rank.number


def test_take_lease__of_many_processes_at_once_one_holds_it_in_the_end(tmp_path: Path) -> None:
    uri = str(tmp_path / "lease")
    with multiprocessing.get_context("fork").Pool(8) as pool:
        numbers = pool.starmap(_take_and_write, [(uri, str(tmp_path / "file"))] * 64)
    assert last_number(uri) >= max(numbers) > 0
    assert len(storage.list_names(uri)) >= 1
    final = take_lease(uri, "the table")
    final.check()
    assert final.rank.number > max(numbers)


WRITER = """
import sys, time
from pipeline import storage
from pipeline.workflow.lease import take_lease
lease = take_lease(sys.argv[1], "the table")
print("writing", flush=True)
while True:
    lease.check()
    storage.publish_bytes(sys.argv[2], b"former")
"""


def test_lease__a_process_that_was_paused_ends_and_overwrites_nothing_but_what_it_was_writing(tmp_path: Path) -> None:
    uri, file = str(tmp_path / "lease"), tmp_path / "file"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, uri, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGSTOP)
    lease = take_lease(uri, "the table")
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert errors.splitlines()[-1].startswith("pipeline.workflow.lease.LeaseLost: the table was taken over by another")
    storage.publish_bytes(str(file), b"newer")
    lease.check()
    assert file.read_bytes() == b"newer"


class Memory:
    """A line in one process; `alive` tells of each key whether it is."""

    def __init__(self, shown: dict[str, int | None], key: str, alive: Callable[[str], bool]) -> None:
        self.shown, self.key, self.alive, self.waited_for = shown, key, alive, ""

    def others(self) -> Sequence[InLine]:
        found = [(key, number) for key, number in list(self.shown.items()) if key != self.key]
        return [InLine(number, key, partial(self.alive, key)) for key, number in found]

    def show(self, number: int | None) -> None:
        self.shown[self.key] = number

    def tell_wait(self, other: InLine) -> None:
        self.waited_for = other.key


def test_wait_in_line__one_at_a_time() -> None:
    shown: dict[str, int | None] = {}
    inside, most, lock = 0, 0, threading.Lock()

    def enter(key: str) -> None:
        nonlocal inside, most
        line = Memory(shown, key, lambda _key: True)
        line.show(None)
        wait_in_line(line, key, above=0, poll_s=0.001)
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.002)
        with lock:
            inside -= 1
        del shown[key]

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(enter, (f"{index:02d}" for index in range(40))))) == 40
    assert (inside, most) == (0, 1)


def test_wait_in_line__not_for_the_dead_and_always_above() -> None:
    line = Memory({"dead": 3, "choosing and dead": None}, "me", lambda _key: False)
    line.show(None)
    assert wait_in_line(line, "me", above=7, poll_s=0.001) == 8
    assert (line.shown["me"], line.waited_for) == (8, "")


def test_wait_in_line__for_one_that_is_still_choosing() -> None:
    shown: dict[str, int | None] = {"other": None}

    def alive(key: str) -> bool:
        # It chooses a later number at its second look.
        shown[key] = None if line.waited_for == "" else 9
        return True

    line = Memory(shown, "me", alive)
    line.show(None)
    assert wait_in_line(line, "me", above=0, poll_s=0.001) == 1
    assert line.waited_for == "other"
