"""`segvit clean` in a process that kills itself at a chosen instant: python -m ... WORKSPACE POINT COUNT."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient

from flows.cli import main

# Where a kill strikes: what is called, and whether before or after that is done.
POINTS: dict[str, tuple[Any, str, bool]] = {
    "version gone, model not": (MlflowClient, "delete_model_version", True),
    "mark gone, outputs not": (MlflowClient, "delete_tag", True),
    "outputs out of the way": (os, "replace", True),
    "outputs half removed": (shutil, "rmtree", False),
    "before MLflow's gc": (subprocess, "run", False),
}


def strike(point: str, count: int) -> None:
    """Have the process killed at the `count`th time."""
    owner, name, after = POINTS[point]
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        # Ours alone: MLflow renames and removes files, too.
        if name in ("replace", "rmtree") and not any("clean-" in str(argument) for argument in arguments):
            return real(*arguments, **options)
        calls += 1
        if calls == count and not after:
            if name == "rmtree":
                folder = str(arguments[0])
                os.unlink(next(os.path.join(at, files[0]) for at, _, files in os.walk(folder) if files))
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, struck)


if __name__ == "__main__":
    strike(sys.argv[2], int(sys.argv[3]))
    main(["clean", "--keep-runs", "0", "--versions", "--keep-champions", "1", "--yes", "--workspace", sys.argv[1]])
