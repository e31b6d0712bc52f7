"""How logs of steps look in a terminal: plain lines, each after its step's label where there are several."""

from __future__ import annotations

import time

from pipeline.workflow.run_logs import RunLogs

POLL_S = 1.0


def print_logs(logs: RunLogs, *, follow: bool) -> None:
    """Print what there is; with `follow` also what comes, until the run has ended."""
    while True:
        # Asked before the look: what was printed until the end is then there.
        at_work = follow and logs.is_running()
        for label, lines in logs.new_lines():
            for line in lines:
                print(line if logs.is_single else f"{label} | {line}")
        if not at_work:
            break
        time.sleep(POLL_S)
    for label, note in logs.notes():
        print(f"{label}: {note}")
