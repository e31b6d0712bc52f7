"""How a process that was spawned as one rank of several ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave_group() -> NoReturn:
    """Leave the process group and end well, without taking the interpreter down.

    A thread of gloo's that asks for the interpreter meanwhile would end the process by SIGABRT, as it did once in a
    run of the tests on a busy machine.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
