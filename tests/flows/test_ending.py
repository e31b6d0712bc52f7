from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

HANGING = """
import signal, subprocess, sys, time
from flows import ending

ending.END_WITHIN_S = 0.5
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
with ending.ending_in_time():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    while True:
        time.sleep(1)
"""
TAKEN_DOWN = """
import os, signal, time
from flows import ending

ending.END_WITHIN_S = 1.0

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(600)

slow = Slow()
signal.signal(signal.SIGTERM, lambda *_: None)
with ending.ending_in_time():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
"""
PATIENT = """
import os, signal, time
from flows import ending

ending.END_WITHIN_S = 0.5
signal.signal(signal.SIGUSR1, lambda *_: None)
with ending.ending_in_time():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1)
assert signal.set_wakeup_fd(-1) == -1
print("done")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_in_time__ends_what_hangs_and_its_children(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert time.monotonic() - begun >= 0.5
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ending_in_time__ends_an_interpreter_that_hangs_in_its_own_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", TAKEN_DOWN])
    assert process.wait(timeout=60) == -signal.SIGALRM


def test_ending_in_time__leaves_alone_who_was_not_asked_to_end() -> None:
    ended = subprocess.run([sys.executable, "-c", PATIENT], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")
