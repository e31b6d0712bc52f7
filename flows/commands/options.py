"""What all commands share: their options, and output either for people or as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Experiment file; see flows/configs.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a setting; may be given often.")
]
Workspace = Annotated[
    str,
    typer.Option(envvar="SEGVIT_WORKSPACE", metavar="DIR", help="Where steps keep their outputs: a folder or a URI."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="MLFLOW_TRACKING_URI", metavar="URI", help="MLflow store; default: a file in the workspace."),
]
JobServerAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's job server, as http://127.0.0.1:8265; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON on standard output, all else on error.")]

WORKSPACE = ".segvit"
PLAIN_WIDTH = 160


@contextmanager
def facts_output(as_json: bool) -> Iterator[tuple[Console, Any]]:
    """A console for people and a function that takes the facts; only one of them reaches standard output.

    With JSON, whatever else is printed, by child processes too, goes to standard error.
    """
    if not as_json:
        # Not a terminal: no 80 columns that cut tables.
        yield Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH), lambda _facts: None
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    collected: list[Any] = []
    try:
        yield Console(file=sys.stderr), collected.append
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
    for facts in collected:
        print(json.dumps(facts, indent=2, allow_nan=False))
