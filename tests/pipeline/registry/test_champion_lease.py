"""Who moves the champion: one at a time, in line; who was overtaken finds out and leaves what the newer one made."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from pipeline.config import PromotionPolicy
from pipeline.records import Check, ModelVersion
from pipeline.registry import champion_lease as module
from pipeline.registry import decisions, promote, store
from pipeline.registry.champion_lease import ENTRY, ChampionLease, champion_lease
from pipeline.workflow import liveness
from pipeline.workflow.lease import LeaseLost
from pipeline.workflow.tracking import Tracking


def entries(tracking: Tracking, name: str) -> list[dict[str, Any]]:
    tags = tracking.client().get_registered_model(name).tags
    return [json.loads(text) for key, text in tags.items() if key.startswith(ENTRY)]


def test_champion_lease__one_at_a_time_and_only_the_last_number_is_left(tracking: Tracking) -> None:
    tracking.client().create_registered_model("lease")
    inside, most, lock = 0, 0, threading.Lock()

    def enter(_number: int) -> None:
        nonlocal inside, most
        with champion_lease(tracking, "lease"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(enter, range(6)))) == 6
    assert (inside, most) == (0, 1)
    (before,) = entries(tracking, "lease")
    with champion_lease(tracking, "lease"):
        pass
    (left,) = entries(tracking, "lease")
    assert (left["ended"], left["number"]) == (True, before["number"] + 1)


def test_champion_lease__of_a_process_that_is_gone_is_not_waited_for(tracking: Tracking) -> None:
    tracking.client().create_registered_model("gone")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = liveness.process_tags() | {liveness.PID_TAG: str(process.pid)}
    entry = json.dumps({**dead, "number": 1, "held": True, "champion": None})
    tracking.client().set_registered_model_tag("gone", f"{ENTRY}.dead", entry)
    started = time.monotonic()
    with champion_lease(tracking, "gone") as lease:
        assert time.monotonic() - started < module.LAPSES_AFTER_S / 2
        assert [entry["number"] for entry in lease.entries().values()] == [2]


def test_champion_lease__of_another_machine_lapses_by_one_s_own_clock(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAPSES_AFTER_S", 1.0)
    tracking.client().create_registered_model("far")
    entry = json.dumps({liveness.HOST_TAG: "elsewhere", "number": 1, "held": True, "champion": None})
    tracking.client().set_registered_model_tag("far", f"{ENTRY}.far", entry)
    started = time.monotonic()
    with champion_lease(tracking, "far"):
        assert 1.0 <= time.monotonic() - started < 30


def scored(register: Any, trained: Any, miou: float) -> ModelVersion:
    version: ModelVersion = register(trained.evaluation.model_copy(update={"miou": miou}))
    return version


@pytest.fixture
def stalled(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lets a lease lapse after a second, and no promotion load an artifact; set: whoever stalls goes on."""
    monkeypatch.setattr(module, "LAPSES_AFTER_S", 1.0)
    monkeypatch.setattr(
        promote, "_loaded_check", lambda *_: Check(name="artifact", passed=True, detail="not looked at")
    )
    return threading.Event()


@pytest.mark.parametrize("where", ["before the check", "in the request"])
def test_promote_version__stalled_meanwhile_decides_anew(
    tracking: Tracking,
    register: Any,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
    stalled: threading.Event,
    where: str,
) -> None:
    first, second, third = (scored(register, trained, miou) for miou in (0.50, 0.60, 0.70))
    promote.promote_version(tracking, first, PromotionPolicy())
    entered, set_alias, move = threading.Event(), store.set_alias, ChampionLease.move

    def stall(version: int) -> None:
        if version == second.version and not entered.is_set():
            entered.set()
            assert stalled.wait(60)

    def stalling_alias(tracking: Tracking, name: str, alias: str, version: int) -> None:
        stall(version)
        set_alias(tracking, name, alias, version)

    def stalling_move(lease: ChampionLease, version: int) -> None:
        stall(version)
        move(lease, version)

    if where == "in the request":
        monkeypatch.setattr(store, "set_alias", stalling_alias)
    else:
        monkeypatch.setattr(ChampionLease, "move", stalling_move)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(promote.promote_version, tracking, second, PromotionPolicy())
        assert entered.wait(60)
        quick = promote.promote_version(tracking, third, PromotionPolicy())
        stalled.set()
        refused = late.result()
    assert (quick.promoted, refused.promoted) == (True, False)
    assert (refused.champion_before, refused.champion_after) == (third.version, third.version)
    assert store.find_alias(tracking, first.name, "champion") == third.version
    assert decisions.champions(tracking, first.name, third.version) == [first.version, third.version]


def test_champion_lease__overtaken_twice_puts_back_what_the_newest_wants(
    tracking: Tracking, register: Any, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAPSES_AFTER_S", 0.0)
    one, two, three = (scored(register, trained, miou) for miou in (0.50, 0.60, 0.70))
    set_alias = store.set_alias

    def overtaken(tracking: Tracking, name: str, alias: str, version: int) -> None:
        monkeypatch.setattr(store, "set_alias", set_alias)
        for newer in (two, three):
            with champion_lease(tracking, name) as lease:
                lease.move(newer.version)
        set_alias(tracking, name, alias, version)

    with champion_lease(tracking, one.name) as lease:
        monkeypatch.setattr(store, "set_alias", overtaken)
        with pytest.raises(LeaseLost, match=f"the champion of {one.name} is in other hands meanwhile"):
            lease.move(one.version)
    assert store.find_alias(tracking, one.name, "champion") == three.version


def test_champion_lease__newest_holder_changes_its_mind_while_its_former_wish_is_put_back(
    tracking: Tracking, register: Any, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAPSES_AFTER_S", 0.0)
    one, two, three = (scored(register, trained, miou) for miou in (0.50, 0.60, 0.70))
    store.set_alias(tracking, one.name, "champion", two.version)
    set_alias = store.set_alias
    with ExitStack() as stack:
        newer: list[ChampionLease] = []

        def overtaken(tracking: Tracking, name: str, alias: str, version: int) -> None:
            if not newer:
                newer.append(stack.enter_context(champion_lease(tracking, name)))
            elif version == two.version:
                # What the newer one wanted when it was asked; it moves the alias before that is put back.
                monkeypatch.setattr(store, "set_alias", set_alias)
                newer[0].move(three.version)
            set_alias(tracking, name, alias, version)

        with champion_lease(tracking, one.name) as lease:
            monkeypatch.setattr(store, "set_alias", overtaken)
            with pytest.raises(LeaseLost):
                lease.move(one.version)
        assert store.find_alias(tracking, one.name, "champion") == three.version
        newer[0].check()
