"""`segvit clean` in a process that kills itself at a chosen instant: python -m ... WORKSPACE POINT."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from flows.cli import main

# Where a kill strikes: what is called, whether before or after that is done, and at which call.
POINTS: dict[str, tuple[Any, str, bool, int]] = {
    "version gone, model not": (MlflowClient, "delete_model_version", True, 1),
    "model gone, files not": (MlflowClient, "delete_logged_model", True, 1),
    "mark gone, outputs not": (MlflowClient, "delete_tag", True, 4),
    "outputs out of the way": (os, "replace", True, 3),
    "outputs half removed": (shutil, "rmtree", False, 5),
    "before MLflow's gc": (subprocess, "run", False, 1),
}


def strike(point: str) -> None:
    """Have the process killed there."""
    owner, name, after, count = POINTS[point]
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
                next(path for path in Path(str(arguments[0])).rglob("*") if path.is_file()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, struck)


if __name__ == "__main__":
    strike(sys.argv[2])
    main(["clean", "--keep-runs", "0", "--versions", "--keep-champions", "1", "--yes", "--workspace", sys.argv[1]])
