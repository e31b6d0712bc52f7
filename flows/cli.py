"""The command line: thin verbs over experiment files, runs and models."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import typer

from flows.commands.clean import clean
from flows.commands.cluster import cluster
from flows.commands.data import check, data, flops, init
from flows.commands.experiment import plan, run
from flows.commands.inference import export, predict, serve
from flows.commands.jobs import jobs, submit
from flows.commands.logs import logs
from flows.commands.model import compare, models, promote, rollback
from flows.commands.runs import cancel, runs, show
from flows.commands.score import evaluate, register
from flows.commands.search import search
from flows.ending import ending_in_time
from pipeline.causes import one_line
from pipeline.errors import UserError
from pipeline.masking import masked

INTERRUPTED = 130
# Objects between two looks for garbage: what a command makes first are its libraries' modules, which stay. Python's 700
# would spend a fifth of their loading on looking through them.
OBJECTS_BETWEEN_COLLECTIONS = 50_000
COMMANDS: tuple[Callable[..., None], ...] = (
    check,
    init,
    run,
    plan,
    submit,
    jobs,
    runs,
    show,
    logs,
    cancel,
    clean,
    search,
    evaluate,
    register,
    models,
    promote,
    rollback,
    compare,
    predict,
    export,
    serve,
    data,
    flops,
)

app = typer.Typer(
    name="segvit",
    help="Train, tune and ship plain-ViT segmentation models, on a laptop or on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for _command in COMMANDS:
    app.command()(_command)
app.add_typer(cluster)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: mistakes give one message and exit code 1, usage errors 2, Ctrl-C and SIGTERM in a flow 130."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *gc.get_threshold()[1:])
    with ending_in_time():
        try:
            app(args=list(arguments) if arguments is not None else None)
        except SystemExit as ended:
            # Typer ends the process after success, too, and says nothing of an interrupt.
            if ended.code == INTERRUPTED:
                cause = getattr(ended.__context__, "__cause__", None)
                _end_interrupted(str(cause or ""))
            if ended.code:
                raise
        except UserError as error:
            print(f"error: {masked(str(error))}", file=sys.stderr)
            sys.exit(1)
        except OSError as error:
            # The file system's or the network's own word, told with the file.
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt as stop:
            _end_interrupted(str(stop))


def _end_interrupted(cause: str) -> NoReturn:
    """Say so and end; without taking the interpreter down where Ray would crash in that."""
    print(cause or "interrupted", file=sys.stderr)
    ray_session = sys.modules.get("pipeline.workflow.ray_session")
    if ray_session is not None and ray_session.is_broken_off:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
