"""Leases: the right to write what only one may, with a number that only grows, so that who was overtaken finds out.

A lease is taken in two parts. `wait_in_line` is Lamport's bakery over whatever all of them see: it needs no
compare-and-swap, which neither MLflow nor an object store offers, and lets one in at a time for as long as nobody is
taken for dead who is not. Someone may be: a process that is paused, cut off, or whose server is away looks dead. So
each holder also leaves a mark that bears its number, above all numbers before it, and looks whether there is a higher
one before each write that matters.

What is guaranteed: a mark is never overwritten (its name holds number and holder) and the highest is never removed, so
numbers only grow and whoever was overtaken learns it, by LeaseLost, at its next check, whatever the clocks say and
whether or not the tracking server answers. What is not: storage and MLflow compare nothing when they write, so a
holder that is paused between its check and that one write still does the write when it wakes. Steps bear that, since
what they write is whole files and folders and no reader sees a mixture; aliases are put right by who wrote them
(`pipeline.registry.champion_lease`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pipeline import storage
from pipeline.errors import UserError


class LeaseLost(UserError):  # noqa: N818 - reads as what happened
    """Another process holds the lease now; this one must not write any more."""


class Rank(NamedTuple):
    """A holder's number, and what tells it from others that chose the same one; higher ones came later."""

    number: int
    key: str


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write something, for any process that is given it; `check` costs one small listing.

    Attributes:
        what: names it in messages.
        uri: folder of the marks, beside what it protects, within reach of all who write that.
        rank: of this holder.
    """

    what: str
    uri: str
    rank: Rank

    def check(self) -> None:
        """Raise LeaseLost where a later holder has left its mark."""
        newest = max(_marks(self.uri), default=self.rank)
        if newest > self.rank:
            raise LeaseLost(
                f"{self.what} was taken over by another process (lease {newest.number} of {newest.key[:8]}, after "
                f"{self.rank.number}); this one stops and leaves it alone"
            )


def take_lease(uri: str, what: str, *, key: str | None = None, above: int = 0) -> Lease:
    """Become the holder at once, overtaking whoever was; the marks of former holders go.

    Args:
        uri: folder of the marks.
        what: names it in messages.
        key: tells this holder from others; default a random one.
        above: the number will be higher than this, and than all before.

    Raises:
        LeaseLost: somebody else took it in this very moment.
    """
    former = _marks(uri)
    rank = Rank(1 + max([above, *(one.number for one in former)]), key or uuid.uuid4().hex)
    storage.publish_bytes(storage.join(uri, _mark_name(rank)), b"")
    lease = Lease(what, uri, rank)
    lease.check()
    storage.remove_files(uri, [_mark_name(one) for one in former if one < rank])
    return lease


def last_number(uri: str) -> int:
    """The number of the newest holder; 0 where there was none."""
    return max((one.number for one in _marks(uri)), default=0)


class InLine(NamedTuple):
    """Somebody else who wants the same thing; `number` is None while it is being chosen."""

    number: int | None
    key: str
    is_alive: Callable[[], bool]


class Line(Protocol):
    """Where those who want the same thing see one another."""

    def others(self) -> Sequence[InLine]:
        """Everybody but oneself."""

    def show(self, number: int | None) -> None:
        """Let all others see one's number; None while it is being chosen."""

    def tell_wait(self, other: InLine) -> None:
        """Called once, where somebody has to be waited for."""


def wait_in_line(line: Line, key: str, *, above: int, poll_s: float) -> int:
    """Wait until nobody alive is before this one; returns its number, which is higher than `above`.

    The choice of a number must have been shown (`show(None)`) before, so that nobody passes who has not seen it.
    """
    mine = 1 + max([above, *(other.number or 0 for other in line.others())])
    line.show(mine)
    told = False
    while True:
        ahead = [one for one in line.others() if (one.number or 0, one.key) < (mine, key) and one.is_alive()]
        if not ahead:
            return mine
        if not told:
            line.tell_wait(ahead[0])
        told = True
        time.sleep(poll_s)


def _mark_name(rank: Rank) -> str:
    return f"{rank.number:08d}-{rank.key}"


def _marks(uri: str) -> list[Rank]:
    found = []
    for name in storage.list_names(uri):
        number, _, key = name.partition("-")
        if number.isdigit() and key and not key.endswith(storage.PARTIAL):
            found.append(Rank(int(number), key))
    return found
