"""Whose turn it is to move an alias of a registered model: Lamport's bakery over the model's tags.

MLflow sets an alias whatever it was before. So whoever looks at it, decides and moves it takes a turn. A turn that
a kill left behind lapses.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.workflow.tracking import Tracking

TURN = "promotion.turn"
POLL_S = 0.1
# What is done within a turn takes a second or two.
LAPSES_AFTER_S = 60.0


class _Turn(NamedTuple):
    """`ticket` is 0 while it is being chosen."""

    ticket: int
    key: str
    since: float


@contextmanager
def turn(tracking: Tracking, name: str) -> Iterator[None]:
    """Within the block no other process is within such a block for the same model."""
    client, key = tracking.client(), f"{TURN}.{uuid.uuid4().hex}"

    def others() -> list[_Turn]:
        tags: dict[str, str] = client.get_registered_model(name).tags
        found = [_parse(one, text) for one, text in tags.items() if one.startswith(f"{TURN}.") and one != key]
        return [one for one in found if time.time() - one.since < LAPSES_AFTER_S]

    def show(ticket: int) -> None:
        client.set_registered_model_tag(name, key, f"{ticket} {time.time():.3f}")

    show(0)
    try:
        mine = 1 + max((one.ticket for one in others()), default=0)
        show(mine)
        while any((one.ticket, one.key) < (mine, key) for one in others()):
            time.sleep(POLL_S)
        yield
    finally:
        client.delete_registered_model_tag(name, key)


def _parse(key: str, text: str) -> _Turn:
    ticket, _, since = text.partition(" ")
    return _Turn(int(ticket), key, float(since))
