"""The lease on a model's champion: who holds it decides and moves the alias, in tags of the registered model.

MLflow sets an alias whatever it was before, so whoever looks at it, decides and moves it holds this lease. A holder
whose entry has not changed for LAPSES_AFTER_S of another one's clock, or whose process is gone, is overtaken. If it
was only paused it finds out before it moves the alias or, paused in that very request, right after it, and then puts
back what the newer holder wants.

Not guaranteed: a process that is paused within that request and dies before it has looked again leaves its version as
champion, until somebody decides anew.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.registry import store
from pipeline.registry.store import CHAMPION
from pipeline.workflow import liveness
from pipeline.workflow.lease import InLine, LeaseLost, Rank, wait_in_line
from pipeline.workflow.tracking import Tracking

ENTRY = "promotion.lease"
POLL_S = 0.1
# What is done under the lease takes a second or two.
LAPSES_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class ChampionLease:
    """One's entry among the tags; it names the champion that this holder found and, later, that it made."""

    tracking: Tracking
    model: str
    key: str
    _entry: dict[str, Any] = field(default_factory=liveness.process_tags)
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise LeaseLost where a later one holds the lease or has held it."""
        newest = self._newest()
        if newest is not None and newest[0] != self._rank:
            raise LeaseLost(
                f"the champion of {self.model} is in other hands meanwhile (lease {newest[0].number}, after "
                f"{self._rank.number}); look at it with segvit models {self.model}"
            )

    def move(self, version: int) -> None:
        """Make `version` champion; raises LeaseLost, and leaves what a newer holder wants, where there is one."""
        self.check()
        self.write(champion=version)
        champion: int | None = version
        self._set(champion)
        # Until nothing else is wanted: the newest holder may change its mind while its former wish is put back.
        while (newest := self._newest()) is not None and newest[1]["champion"] != champion:
            champion = newest[1]["champion"]
            self._set(champion)
        self.check()

    def others(self) -> Sequence[InLine]:
        """All who want the lease or hold it."""
        entries = self.entries().items()
        return [
            InLine(entry["number"], key, partial(self._is_alive, key, entry))
            for key, entry in entries
            if key != self.key and not entry.get("ended")
        ]

    def show(self, number: int | None) -> None:
        """Write one's number to the entry."""
        self.write(number=number)

    def tell_wait(self, other: InLine) -> None:
        """Nothing: it is short."""

    def write(self, **changes: Any) -> None:
        """Change the entry."""
        self._entry.update(changes)
        self.tracking.client().set_registered_model_tag(self.model, f"{ENTRY}.{self.key}", json.dumps(self._entry))

    def remove(self, key: str) -> None:
        """Delete the entry of `key`."""
        self.tracking.client().delete_registered_model_tag(self.model, f"{ENTRY}.{key}")

    def entries(self) -> dict[str, dict[str, Any]]:
        """All entries by their keys."""
        tags: dict[str, str] = self.tracking.client().get_registered_model(self.model).tags
        prefix = f"{ENTRY}."
        return {name.removeprefix(prefix): json.loads(text) for name, text in tags.items() if name.startswith(prefix)}

    def clear(self) -> None:
        """Remove ended and dead entries but the newest holder's, whose number later ones must exceed."""
        newest = self._newest()
        for key, entry in self.entries().items():
            kept = key == self.key or (newest is not None and key == newest[0].key)
            if not kept and (entry.get("ended") or not self._is_alive(key, entry)):
                self.remove(key)

    def _set(self, champion: int | None) -> None:
        if champion is None:
            self.tracking.client().delete_registered_model_alias(self.model, CHAMPION)
        else:
            store.set_alias(self.tracking, self.model, CHAMPION, champion)

    @property
    def _rank(self) -> Rank:
        return Rank(self._entry["number"], self.key)

    def _newest(self) -> tuple[Rank, dict[str, Any]] | None:
        held = [(Rank(entry["number"], key), entry) for key, entry in self.entries().items() if entry.get("held")]
        return max(held, key=lambda one: one[0], default=None)

    def _is_alive(self, key: str, entry: dict[str, Any]) -> bool:
        if liveness.is_running(entry) is False:
            return False
        text, now_s = json.dumps(entry), time.monotonic()
        if self._seen.get(key, ("", 0.0))[0] != text:
            self._seen[key] = (text, now_s)
        return now_s - self._seen[key][1] < LAPSES_AFTER_S


@contextmanager
def champion_lease(tracking: Tracking, model: str) -> Iterator[ChampionLease]:
    """Wait for the lease and hold it within the block; raises LeaseLost where it was overtaken while it waited."""
    lease = ChampionLease(tracking, model, uuid.uuid4().hex)
    lease.show(None)
    try:
        last = max((entry["number"] or 0 for entry in lease.entries().values()), default=0)
        wait_in_line(lease, lease.key, above=last, poll_s=POLL_S)
        lease.write(held=True, champion=store.find_alias(tracking, model, CHAMPION))
        lease.check()
        lease.clear()
        yield lease
    finally:
        # The newest holder's entry stays: numbers only grow.
        newest = lease._newest()
        if newest is not None and newest[0].key == lease.key:
            lease.write(ended=True)
        else:
            lease.remove(lease.key)
