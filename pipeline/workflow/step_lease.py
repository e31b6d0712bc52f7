"""Who executes a fingerprint: the line is the running step runs in the tracking store, the lease lies in the workspace.

So those who would execute the same thing wait for one another across clusters that share a store, and those who write
to the same folder, whatever their store, find out when they were overtaken. Waiting ends with the process that
executes the step or, where that is on another machine, with the flow's driver: a step never waits for a process that
is gone, and two steps never for one another, since whoever is first in line is executing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.workflow import liveness
from pipeline.workflow.lease import InLine, Lease, last_number, take_lease, wait_in_line
from pipeline.workflow.tracking import Tag, Tracking

if TYPE_CHECKING:
    from mlflow.entities import Run

# Ray ends what a dead driver left running; what lives on longer than this is not waited for.
ORPHAN_GRACE_S = 60.0
POLL_S = 1.0
CHOOSING = "choosing"
LEASE_FOLDER = "leases"


@dataclass(frozen=True, slots=True)
class StepLine:
    """The line of those who want to execute a fingerprint, as seen by the step run `run_id`."""

    tracking: Tracking
    run_id: str
    label: str
    flow_run_id: str
    fingerprint: str
    _orphans: dict[str, float] = field(default_factory=dict)

    def others(self) -> Sequence[InLine]:
        """All other running step runs of the fingerprint."""
        wanted = f"tags.`{Tag.FINGERPRINT}` = '{self.fingerprint}' and attributes.status = 'RUNNING'"
        others = []
        for run in list(self.tracking.runs(wanted)):
            if run.info.run_id == self.run_id:
                continue
            if (run.data.tags.get(Tag.PARENT), run.data.tags.get(Tag.LABEL)) == (self.flow_run_id, self.label):
                # A label has one run in its flow: the server made this one, too, but its answer was lost on the way.
                self.tracking.client().delete_run(run.info.run_id)
                continue
            number = run.data.tags.get(Tag.TICKET, CHOOSING)
            shown = int(number) if number.isdigit() else None
            others.append(InLine(shown, str(run.info.run_id), partial(self._is_alive, run)))
        return others

    def show(self, number: int | None) -> None:
        """Write it on the step's run."""
        self.tracking.set_tags(self.run_id, {Tag.TICKET: CHOOSING if number is None else str(number)})

    def tell_wait(self, other: InLine) -> None:
        """Print who is waited for."""
        print(f"{self.label}: the same step runs in {other.key[:8]}; waiting", flush=True)

    def _is_alive(self, other: Run) -> bool:
        lives_here = liveness.is_running(other.data.tags)
        if lives_here is False:
            return False
        flow_run_id = other.data.tags[Tag.PARENT]
        if flow_run_id == self.flow_run_id:
            return True
        flow = self.tracking.client().get_run(flow_run_id)
        if flow.info.status == "RUNNING" and liveness.why_dead(flow.data.tags) is None:
            return True
        # Its process may be at work for some moments still; on another machine nobody can tell.
        since = self._orphans.setdefault(other.info.run_id, time.monotonic())
        return lives_here is True and time.monotonic() - since < ORPHAN_GRACE_S


def in_line_tags() -> dict[str, str]:
    """Tags of a step run whose process is this one and has not chosen its number yet."""
    return {Tag.TICKET: CHOOSING, **liveness.process_tags()}


def take_step_lease(line: StepLine, workspace: str, step: str) -> Lease:
    """Wait in `line`, then take the lease on what the step writes in `workspace`."""
    # Numbers grow above those of the workspace, too: it may have outlived a store, and runs end.
    uri = storage.join(workspace, LEASE_FOLDER, f"{step}-{line.fingerprint[:16]}")
    number = wait_in_line(line, line.run_id, above=last_number(uri), poll_s=POLL_S)
    return take_lease(uri, f"step {line.label}", key=line.run_id, above=number - 1)
