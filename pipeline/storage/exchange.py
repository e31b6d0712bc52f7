"""Two paths exchange their names in one instant: what POSIX lacks, and Linux and macOS each have under another name."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux, linux/fs.h
_RENAME_SWAP = 2  # macOS, sys/stdio.h
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EOPNOTSUPP)


def exchange_names(one: Path, other: Path) -> bool:
    """Let each of two existing paths name what the other did; False where one is missing, or system or disk cannot.

    Raises OSError for anything else.
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (*_UNSUPPORTED, errno.ENOENT):
        return False
    raise OSError(number, os.strerror(number), str(other))


@functools.cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap and (lambda one, other: int(swap(one, other, ctypes.c_uint(_RENAME_SWAP))))
    rename = getattr(library, "renameat2", None)
    return rename and (
        lambda one, other: int(rename(_AT_FDCWD, one, _AT_FDCWD, other, ctypes.c_uint(_RENAME_EXCHANGE)))
    )
