"""Turns: one at a time, in the order of tickets, and a turn that was left behind lapses."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.registry import alias_turn
from pipeline.registry.alias_turn import TURN, turn
from pipeline.workflow.tracking import Tracking


def test_turn__one_at_a_time_and_nothing_is_left(tracking: Tracking) -> None:
    tracking.client().create_registered_model("turns")
    inside, most, lock = 0, 0, threading.Lock()

    def enter(_number: int) -> None:
        nonlocal inside, most
        with turn(tracking, "turns"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(enter, range(12)))) == 12
    assert (inside, most) == (0, 1)
    assert not [key for key in tracking.client().get_registered_model("turns").tags if key.startswith(TURN)]


def test_turn__of_a_dead_process_lapses(tracking: Tracking) -> None:
    client = tracking.client()
    client.create_registered_model("lapsed")
    client.set_registered_model_tag("lapsed", f"{TURN}.dead", f"1 {time.time() - alias_turn.LAPSES_AFTER_S + 1:.3f}")
    started = time.monotonic()
    with turn(tracking, "lapsed"):
        # It was waited for as long as it might have been alive.
        assert 0.5 < time.monotonic() - started < 30
