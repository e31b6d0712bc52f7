"""Who executes a fingerprint: Lamport's bakery over the tracking store.

Whoever wants to execute a fingerprint shows it on a running step run, takes a ticket above all it sees, and goes
when no earlier ticket is left. So claims span clusters that share a store, and need no process of their own. They
only save work: outputs are published by rename, so even two executions at once would do no harm.

A claim lapses with the process that executes the step, or, where that is on another machine, with the flow's driver.
So a step never waits for a process that is gone, and two steps never for one another: whoever has the earliest
ticket is executing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.workflow import liveness
from pipeline.workflow.tracking import Tag, Tracking

if TYPE_CHECKING:
    from mlflow.entities import Run

POLL_S = 1.0
# Ray ends what a dead driver left running; what lives on longer than this is not waited for.
ORPHAN_GRACE_S = 60.0
CHOOSING = "choosing"


@dataclass(frozen=True, slots=True)
class Claim:
    """A running step run that wants to execute a fingerprint."""

    run_id: str
    label: str
    flow_run_id: str
    fingerprint: str


def claim_tags() -> dict[str, str]:
    """Tags of a step run whose process is this one and has not taken its ticket yet."""
    return {Tag.TICKET: CHOOSING, **liveness.process_tags()}


def take_turn(tracking: Tracking, claim: Claim) -> None:
    """Take a ticket and wait until no earlier claim on the same fingerprint is alive."""
    tickets = [_ticket(other) for other in _others(tracking, claim)]
    mine = 1 + max((ticket for ticket in tickets if ticket is not None), default=0)
    tracking.set_tags(claim.run_id, {Tag.TICKET: str(mine)})
    orphans: dict[str, float] = {}
    told = False
    while True:
        earlier = [
            other
            for other in _others(tracking, claim)
            if (_ticket(other) or 0, other.info.run_id) < (mine, claim.run_id)
            and _is_alive(tracking, claim, other, orphans)
        ]
        if not earlier:
            return
        if not told:
            print(f"{claim.label}: the same step runs in {earlier[0].info.run_id[:8]}; waiting", flush=True)
        told = True
        time.sleep(POLL_S)


def _others(tracking: Tracking, claim: Claim) -> Sequence[Run]:
    wanted = f"tags.`{Tag.FINGERPRINT}` = '{claim.fingerprint}' and attributes.status = 'RUNNING'"
    others = []
    for run in list(tracking.runs(wanted)):
        if run.info.run_id == claim.run_id:
            continue
        if (run.data.tags.get(Tag.PARENT), run.data.tags.get(Tag.LABEL)) == (claim.flow_run_id, claim.label):
            # A label has one run in its flow: the server made this one, too, but its answer was lost on the way.
            tracking.client().delete_run(run.info.run_id)
        else:
            others.append(run)
    return others


def _ticket(run: Run) -> int | None:
    ticket = run.data.tags.get(Tag.TICKET, CHOOSING)
    return int(ticket) if ticket.isdigit() else None


def _is_alive(tracking: Tracking, claim: Claim, other: Run, orphans: dict[str, float]) -> bool:
    lives_here = liveness.is_running(other.data.tags)
    if lives_here is False:
        return False
    flow_run_id = other.data.tags[Tag.PARENT]
    if flow_run_id == claim.flow_run_id:
        return True
    flow = tracking.client().get_run(flow_run_id)
    if flow.info.status == "RUNNING" and liveness.why_dead(flow.data.tags) is None:
        return True
    # Its process may be at work for some moments still; on another machine nobody can tell.
    since = orphans.setdefault(other.info.run_id, time.monotonic())
    return lives_here is True and time.monotonic() - since < ORPHAN_GRACE_S
