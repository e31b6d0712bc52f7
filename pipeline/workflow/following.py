"""A run of a flow watched from anywhere that reaches its store, until it ends; looking changes nothing of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.causes import one_line
from pipeline.errors import UserError
from pipeline.workflow.runs import RunTree, find_run, mark_abandoned, tree_of
from pipeline.workflow.tracking import RunState, Tracking

LOOK_EVERY_S = 2.0


class Look(NamedTuple):
    """What one look at the run has shown.

    Attributes:
        tree: the run with its steps; where the store did not answer, as it was before.
        silence: why the store does not answer, or None.
    """

    tree: RunTree
    silence: str | None = None


def follow_run(
    tracking: Tracking, run_id: str, *, every_s: float = LOOK_EVERY_S, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Look]:
    """Look at the run that `find_run` finds every few seconds; the last look is at the run that has ended.

    A store that stops to answer is asked again for as long as the caller goes on.

    Raises:
        UserError: there is no such run, or the store does not answer the first time.
    """
    mark_abandoned(tracking)
    run = find_run(tracking, run_id)
    look = Look(tree_of(tracking, run))
    yield look
    while look.silence is not None or look.tree.run.state == RunState.RUNNING:
        sleep(every_s)
        look = _look_again(tracking, look)
        yield look


def _look_again(tracking: Tracking, last: Look) -> Look:
    try:
        if not tracking.is_reachable():
            raise UserError(f"the tracking server {tracking.uri} does not answer")
        mark_abandoned(tracking)
        return Look(tree_of(tracking, tracking.client().get_run(last.tree.run.run_id)))
    except Exception as error:
        return Look(last.tree, one_line(error))
