from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.records import Check, ModelVersion
from pipeline.registry import decisions, models, promote, store
from pipeline.registry.promote import promote_best, promote_version, roll_back, verify_decision
from pipeline.workflow.tracking import Tracking

Register = Callable[..., ModelVersion]


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the loading of the artifact, which has tests of its own."""
    monkeypatch.setattr(promote, "reproduces", lambda *_: Check(name="artifact", passed=True, detail="trusted"))


@pytest.mark.usefixtures("trusting")
def test_promote_version__moves_the_alias_and_records(tracking: Tracking, trained: Any, register: Register) -> None:
    first, better, worse = (register(trained.scored(miou)) for miou in (0.5, 0.6, 0.3))
    decisions = [promote_version(tracking, one, PromotionPolicy(), decided_by="ann") for one in (first, better, worse)]
    assert [(one.promoted, one.champion_before, one.champion_after) for one in decisions] == [
        (True, None, 1),
        (True, 1, 2),
        (False, 2, 2),
    ]
    assert store.find_alias(tracking, first.name, "champion") == 2
    tags = store.version_tags(tracking, first.name, 3)
    assert (tags["promotion.promoted"], tags["promotion.by"], tags["promotion.against"]) == (
        "false",
        "ann",
        "version 2",
    )
    assert tags["promotion.at"].endswith("+00:00")
    assert tags["promotion.reason"] == "refused: mIoU 0.3000, the champion's 0.6000, tolerance 0.0000"
    promote_version(tracking, worse, PromotionPolicy(min_miou=0.9), decided_by="bob")
    tags = store.version_tags(tracking, first.name, 3)
    history = [json.loads(tags[key]) for key in sorted(tags) if key.startswith("promotion.history.")]
    assert [one["promotion.by"] for one in history] == ["ann", "bob"]
    assert [len(one["checks"]) for one in history] == [3, 3]
    listed = models.list_models(tracking, first.name)
    assert [(one.version, one.promoted, one.aliases) for one in listed] == [
        (3, False, ()),
        (2, True, ("champion",)),
        (1, True, ()),
    ]


@pytest.mark.usefixtures("trusting")
def test_promote_version__champion_already_is_kept(tracking: Tracking, register: Register) -> None:
    version = register()
    first = promote_version(tracking, version, PromotionPolicy())
    again = promote_version(tracking, version, PromotionPolicy(min_miou=0.9))
    assert again == first.model_copy(update={"reason": f"version 1 is the champion already; kept ({first.reason})"})
    keys = [key for key in store.version_tags(tracking, version.name, 1) if "history" in key]
    assert len(keys) == 1


def test_promote_version__champion_set_by_hand_is_kept(tracking: Tracking, register: Register) -> None:
    version = register()
    store.set_alias(tracking, version.name, "champion", 1)
    decision = promote_version(tracking, version, PromotionPolicy())
    assert (decision.promoted, decision.reason) == (False, "version 1 is the champion already; kept")
    assert (decision.champion_before, decision.champion_after) == (1, 1)


@pytest.mark.usefixtures("trusting")
def test_promote_version__killed_before_the_alias_moved_is_mended(
    tracking: Tracking, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    version = register()
    with monkeypatch.context() as patched:
        patched.setattr(store, "set_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            promote_version(tracking, version, PromotionPolicy())
    assert store.find_alias(tracking, version.name, "champion") is None
    assert promote_version(tracking, version, PromotionPolicy()).champion_after == 1
    assert store.find_alias(tracking, version.name, "champion") == 1


@pytest.mark.usefixtures("trusting")
def test_verify_decision__holds_while_the_champion_stays(tracking: Tracking, trained: Any, register: Register) -> None:
    decision = promote_version(tracking, register(), PromotionPolicy())
    assert verify_decision(decision, tracking, {}) is None
    promote_version(tracking, register(trained.scored(0.6)), PromotionPolicy())
    assert verify_decision(decision, tracking, {}) == f"the champion of {decision.name} is now version 2"


def test_promote_version__artifact_that_predicts_otherwise_is_refused(
    tracking: Tracking, trained: Any, register: Register, tmp_path: Path
) -> None:
    probe = tmp_path / "probe"
    probe.mkdir()
    labels = np.load(Path(trained.evaluation.uri) / "probe/labels.npy")
    labels[0] = (labels[0] + 1) % 3
    np.save(probe / "labels.npy", labels)
    np.save(probe / "images.npy", np.load(Path(trained.evaluation.uri) / "probe/images.npy"))
    version = register(trained.scored(0.5, uri=str(tmp_path)))
    decision = promote_version(tracking, version, PromotionPolicy())
    assert not decision.promoted
    assert decision.reason.startswith("refused: the registered artifact predicts as evaluated in ")
    assert decision.reason.endswith(" of pixels, at least 99.50%")
    assert store.find_alias(tracking, version.name, "champion") is None


@pytest.mark.usefixtures("trusting")
def test_promote_version__dry_run_decides_and_writes_nothing(
    tracking: Tracking, trained: Any, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def failing(folder: Path, *_: Any) -> Check:
        loaded.append(folder)
        return Check(name="artifact", passed=False, detail="the registered artifact does not load: boom")

    promote_version(tracking, register(), PromotionPolicy())
    better = register(trained.scored(0.6))
    before = (store.version_tags(tracking, better.name, 2), moves(tracking, better.name))
    monkeypatch.setattr(promote, "reproduces", failing)
    decision = promote_version(tracking, better, PromotionPolicy(), dry_run=True)
    assert decision.reason == "refused: the registered artifact does not load: boom"
    assert len(loaded) == 1
    assert (store.version_tags(tracking, better.name, 2), moves(tracking, better.name)) == before
    assert store.find_alias(tracking, better.name, "champion") == 1


@pytest.mark.usefixtures("trusting")
def test_promote_version__records_who_when_against_what_and_the_policy(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    policy = PromotionPolicy(min_miou=0.4, protected_classes=("pole",), max_gflops=2.0)
    for version in (register(), register(trained.scored(0.3))):
        promote_version(tracking, version, policy, decided_by="ann")
    tags = store.version_tags(tracking, tracking.experiment, 2)
    [recorded] = [json.loads(text) for key, text in tags.items() if key.startswith("promotion.history.")]
    assert recorded["policy"] == policy.model_dump(mode="json")
    assert recorded["promotion.by"] == "ann"
    assert recorded["promotion.against"] == "version 1"
    assert recorded["promotion.reason"].startswith("refused: mIoU 0.3000, minimum 0.4000; ")
    assert [check["passed"] for check in recorded["checks"]] == [False, True, False, True, True]


@pytest.mark.usefixtures("trusting")
def test_promote_version__a_champion_that_came_meanwhile_is_compared_with(
    tracking: Tracking, trained: Any, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, better, best = (register(trained.scored(miou)) for miou in (0.5, 0.6, 0.7))
    promote_version(tracking, first, PromotionPolicy())
    checks: list[int] = []

    def overtaken(*_: Any) -> Check:
        if not checks:
            checks.append(1)
            promote_version(tracking, best, PromotionPolicy())
        return Check(name="artifact", passed=True, detail="trusted")

    monkeypatch.setattr(promote, "reproduces", overtaken)
    decision = promote_version(tracking, better, PromotionPolicy())
    assert (decision.promoted, decision.champion_before, decision.champion_after) == (False, 3, 3)
    assert decision.reason == "refused: mIoU 0.6000, the champion's 0.7000, tolerance 0.0000"
    assert store.find_alias(tracking, first.name, "champion") == 3
    assert decisions.champions(tracking, first.name, 3) == [1, 3]


@pytest.mark.usefixtures("trusting")
def test_promote_version__two_at_once_agree_on_one_champion(
    tracking: Tracking, trained: Any, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, better, best = (register(trained.scored(miou)) for miou in (0.5, 0.6, 0.7))
    promote_version(tracking, first, PromotionPolicy())
    both = threading.Barrier(2)

    def together(*_: Any) -> Check:
        both.wait(30)
        return Check(name="artifact", passed=True, detail="trusted")

    monkeypatch.setattr(promote, "reproduces", together)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(promote_version, tracking, one, PromotionPolicy()) for one in (better, best)]
        of_better, of_best = (one.result() for one in asked)
    champion = store.find_alias(tracking, first.name, "champion")
    assert of_best.promoted
    assert champion == 3
    assert of_best.champion_before in (1, 2)
    if of_best.champion_before == 1 and not of_better.promoted:
        assert of_better.reason == "refused: mIoU 0.6000, the champion's 0.7000, tolerance 0.0000"
    else:
        assert of_better.promoted


@pytest.mark.usefixtures("trusting")
def test_promote_best__a_cheaper_one_passes_where_the_best_is_over_budget(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    figures = ((0.6, 8.0, "a"), (0.5, 3.0, "b"), (0.7, 12.0, "c"), (0.6, 11.0, "d"))
    versions = [register(trained.scored(miou, gflops=gflops, variant=variant)) for miou, gflops, variant in figures]
    policy = PromotionPolicy(max_gflops=10.0)
    decision = promote_best(tracking, versions, policy, decided_by="ann")
    assert (decision.promoted, decision.version, decision.also_refused) == (True, 1, (3,))
    assert (decision.champion_before, decision.champion_after) == (None, 1)
    assert decision.reason == (
        "promoted: mIoU 0.6000, the first champion; 3 checks passed; "
        "version 3 (mIoU 0.7000) refused: GFLOPs 12, at most 10"
    )
    assert [store.find_alias(tracking, decision.name, alias) for alias in ("champion", "candidate")] == [1, 1]
    listed = {one.version: (one.promoted, one.reason) for one in models.list_models(tracking, decision.name)}
    assert listed[3] == (False, "refused: GFLOPs 12, at most 10")
    assert listed[2] == listed[4] == (None, None)
    assert verify_decision(decision, tracking, {}) is None
    again = promote_best(tracking, versions, policy)
    assert (again.promoted, again.version, again.also_refused) == (True, 1, (3,))
    assert again.reason.startswith("version 1 is the champion already; kept (promoted: mIoU 0.6000, the first champion")
    assert len(moves(tracking, decision.name)) == 1


@pytest.mark.usefixtures("trusting")
def test_promote_best__where_none_passes_the_best_is_the_candidate(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    figures = ((0.5, 3.0, "a"), (0.7, 5.0, "b"), (0.7, 4.0, "c"))
    versions = [register(trained.scored(miou, gflops=gflops, variant=variant)) for miou, gflops, variant in figures]
    decision = promote_best(tracking, versions, PromotionPolicy(min_miou=0.8))
    assert (decision.promoted, decision.version, decision.also_refused) == (False, 3, (2, 1))
    assert decision.reason == (
        "refused: mIoU 0.7000, minimum 0.8000; version 2 (mIoU 0.7000) refused: mIoU 0.7000, minimum 0.8000; "
        "version 1 (mIoU 0.5000) refused: mIoU 0.5000, minimum 0.8000"
    )
    assert [store.find_alias(tracking, decision.name, alias) for alias in ("champion", "candidate")] == [None, 3]
    assert verify_decision(decision, tracking, {}) is None


@pytest.mark.usefixtures("trusting")
def test_promote_best__a_champion_among_them_stays_where_better_ones_are_refused(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    cheap, worse = register(trained.scored(0.6)), register(trained.scored(0.59))
    policy = PromotionPolicy(max_gflops=2.0, max_regression=0.1)
    promote_best(tracking, [cheap], policy)
    over = register(trained.scored(0.7, gflops=3.0))
    decision = promote_best(tracking, [worse, over, cheap], policy)
    assert (decision.version, decision.champion_after, decision.also_refused) == (1, 1, (3,))
    assert decision.reason.endswith("; version 3 (mIoU 0.7000) refused: GFLOPs 3, at most 2")
    assert store.find_alias(tracking, cheap.name, "champion") == 1
    assert store.version_tags(tracking, cheap.name, 2).get("promotion.decision") is None


@pytest.mark.usefixtures("trusting")
def test_promote_version__the_champion_scored_anew_is_what_counts(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    promote_version(tracking, register(trained.scored(0.9)), PromotionPolicy())
    sliding = {"inference": {"mode": "sliding", "stride": (8, 8)}}
    worse, better = (register(trained.scored(miou, **sliding)) for miou in (0.6, 0.8))
    for version in (worse, better):
        store.set_version_tags(tracking, version.name, version.version, {store.CHECKPOINT_DIGEST: "c" * 64})
    refused = promote_version(tracking, better, PromotionPolicy())
    assert ": not comparable; run the experiment again, or score the champion alike: segvit" in refused.reason
    register(trained.scored(0.7, **sliding))
    refused = promote_version(tracking, worse, PromotionPolicy())
    assert refused.reason == "refused: mIoU 0.6000, the champion's 0.7000, tolerance 0.0000"
    promoted = promote_version(tracking, better, PromotionPolicy())
    assert promoted.reason == "promoted: mIoU 0.8000, the champion had 0.7000; 4 checks passed"


@pytest.mark.usefixtures("trusting")
def test_promote_version__a_champion_without_its_files_is_no_success(tracking: Tracking, register: Register) -> None:
    version = register()
    assert promote_version(tracking, version, PromotionPolicy()).promoted
    shutil.rmtree(store.version_location(tracking, version.name, 1))
    with pytest.raises(UserError, match=r"/1 has lost its files \(model.safetensors, config.json\)") as raised:
        promote_version(tracking, version, PromotionPolicy(), manual=True)
    assert str(raised.value).endswith(
        f"; run its experiment again, which registers it anew, or go back with segvit rollback {version.name}"
    )
    anew = register()
    decision = promote_version(tracking, anew, PromotionPolicy())
    assert (decision.promoted, decision.champion_before, decision.champion_after) == (True, 1, 2)
    assert models.checkpoint_folder(tracking, f"models:/{version.name}@champion", "unused").is_dir()


@pytest.mark.usefixtures("trusting")
def test_promote_version__a_candidate_without_its_files_is_refused(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    promote_version(tracking, register(), PromotionPolicy())
    better = register(trained.scored(0.6))
    folder = store.version_location(tracking, better.name, 2)
    shutil.rmtree(folder)
    decision = promote_version(tracking, better, PromotionPolicy(), manual=True)
    assert decision.reason == f"refused: {better.model_uri} has lost its files ({folder} is gone)"
    assert decision.champion_after == 1


def moves(tracking: Tracking, name: str) -> dict[str, str]:
    tags = tracking.client().get_registered_model(name).tags
    return {key: text for key, text in tags.items() if key.startswith("promotion.moves.")}


def champion_after(tracking: Tracking, name: str) -> tuple[int | None, int | None]:
    """What a rollback says it did, and where the alias is."""
    return roll_back(tracking, name).champion_after, store.find_alias(tracking, name, "champion")


@pytest.mark.usefixtures("trusting")
def test_roll_back__after_several_promotions_and_rollbacks(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    versions = [register(trained.scored(miou)) for miou in (0.5, 0.6, 0.7, 0.8)]
    name = versions[0].name
    for version in versions[:3]:
        promote_version(tracking, version, PromotionPolicy())
    assert champion_after(tracking, name) == (2, 2)
    assert champion_after(tracking, name) == (1, 1)
    with pytest.raises(
        UserError, match=r"version 1 .* is champion, and no earlier champion is usable \(there was none\)"
    ):
        roll_back(tracking, name)
    promote_version(tracking, versions[3], PromotionPolicy())
    assert champion_after(tracking, name) == (1, 1)
    promote_version(tracking, versions[1], PromotionPolicy(), manual=True)
    promote_version(tracking, versions[2], PromotionPolicy(), manual=True)
    promote_version(tracking, versions[1], PromotionPolicy(max_regression=1.0), manual=True)
    assert decisions.champions(tracking, name, 2) == [1, 2, 3, 2]
    assert [champion_after(tracking, name) for _ in range(3)] == [(3, 3), (2, 2), (1, 1)]


@pytest.mark.usefixtures("trusting")
def test_roll_back__is_recorded_on_both_versions(tracking: Tracking, trained: Any, register: Register) -> None:
    for miou in (0.5, 0.6):
        promote_version(tracking, register(trained.scored(miou)), PromotionPolicy())
    done = roll_back(tracking, tracking.experiment, decided_by="ann")
    assert (done.champion_before, done.champion_after, done.skipped) == (2, 1, ())
    left, restored = models.list_models(tracking, tracking.experiment)
    assert (left.promoted, left.reason, left.aliases) == (False, "rolled back to version 1 by ann", ())
    assert restored.aliases == ("champion",)
    assert (restored.promoted, restored.reason) == (True, "champion again: version 2 was rolled back by ann")
    for version in (1, 2):
        tags = store.version_tags(tracking, tracking.experiment, version)
        history = [json.loads(tags[key]) for key in sorted(tags) if key.startswith("promotion.history.")]
        assert [one["promotion.promoted"] for one in history] == (
            ["true", "true"] if version == 1 else ["true", "false"]
        )
    assert decisions.why_withdrawn(tracking, tracking.experiment, 2).startswith(
        "was rolled back to version 1 by ann at 20"
    )


@pytest.mark.usefixtures("trusting")
def test_roll_back__the_next_flow_does_not_promote_it_again(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    first, second = register(), register(trained.scored(0.6))
    decision = [promote_version(tracking, one, PromotionPolicy()) for one in (first, second)][1]
    roll_back(tracking, first.name, decided_by="ann")
    assert verify_decision(decision, tracking, {}) == f"the champion of {first.name} is now version 1"
    refused = promote_version(tracking, second, PromotionPolicy())
    assert not refused.promoted
    assert refused.reason.startswith("refused: version 2 was rolled back to version 1 by ann at 20")
    assert refused.reason.endswith(f"; to have it all the same, run segvit promote {first.name} 2")
    assert verify_decision(refused, tracking, {}) is None
    assert promote_version(tracking, second, PromotionPolicy(), manual=True).promoted
    assert decisions.why_withdrawn(tracking, first.name, 2) == ""
    assert store.find_alias(tracking, first.name, "champion") == 2


@pytest.mark.usefixtures("trusting")
def test_promote_version__the_next_flow_does_not_undo_a_promotion_by_hand(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    worse, better, best = (register(trained.scored(miou)) for miou in (0.5, 0.6, 0.7))
    promote_version(tracking, better, PromotionPolicy())
    promote_version(tracking, worse, PromotionPolicy(max_regression=1.0), manual=True, decided_by="ann")
    refused = promote_version(tracking, better, PromotionPolicy())
    assert refused.reason.startswith("refused: version 2 was replaced with version 1 by ann at 20")
    assert promote_version(tracking, best, PromotionPolicy()).promoted
    assert roll_back(tracking, worse.name).champion_after == 1
    assert roll_back(tracking, worse.name).champion_after == 2
    assert decisions.why_withdrawn(tracking, worse.name, 2) == ""


@pytest.mark.usefixtures("trusting")
def test_roll_back__skips_what_was_deleted_or_lost_its_artifact_or_predicts_otherwise(
    tracking: Tracking, trained: Any, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [register(trained.scored(miou)) for miou in (0.5, 0.6, 0.7, 0.8, 0.9)]
    name = versions[0].name
    for version in versions:
        promote_version(tracking, version, PromotionPolicy())
    tracking.client().delete_model_version(name, "4")
    shutil.rmtree(store.version_location(tracking, name, 3))

    def second_differs(_folder: Path, evaluation: Any) -> Check:
        passed = evaluation.miou == 0.5
        return Check(name="artifact", passed=passed, detail="trusted" if passed else "predicts otherwise")

    monkeypatch.setattr(promote, "reproduces", second_differs)
    tried = roll_back(tracking, name, dry_run=True)
    assert store.find_alias(tracking, name, "champion") == 5
    assert "rolled back" not in str(models.list_models(tracking, name))
    done = roll_back(tracking, name)
    assert tried == done
    assert done.champion_after == store.find_alias(tracking, name, "champion") == 1
    deleted, lost, different = done.skipped
    assert (deleted.version, lost.version) == (4, 3)
    assert deleted.reason.startswith(f"model {name} has no version 4 in ")
    assert lost.reason.startswith(f"models:/{name}/3 has lost its files (")
    assert different.model_dump() == {"version": 2, "reason": "predicts otherwise"}


@pytest.mark.usefixtures("trusting")
def test_roll_back__where_the_champion_was_deleted_or_moved_by_hand(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    versions = [register(trained.scored(miou)) for miou in (0.5, 0.6, 0.7)]
    name = versions[0].name
    for version in versions[:2]:
        promote_version(tracking, version, PromotionPolicy())
    store.set_alias(tracking, name, "champion", 3)
    assert champion_after(tracking, name) == (2, 2)
    tracking.client().delete_model_version(name, "2")
    assert store.find_alias(tracking, name, "champion") is None
    done = roll_back(tracking, name)
    assert (done.champion_before, done.champion_after) == (None, 1)
    assert [one.version for one in done.skipped] == [2]


@pytest.mark.usefixtures("trusting")
def test_roll_back__killed_before_the_alias_moved_goes_on(
    tracking: Tracking, trained: Any, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for miou in (0.5, 0.6):
        promote_version(tracking, register(trained.scored(miou)), PromotionPolicy())
    with monkeypatch.context() as patched:
        patched.setattr(store, "set_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            roll_back(tracking, tracking.experiment)
    assert store.find_alias(tracking, tracking.experiment, "champion") == 2
    assert champion_after(tracking, tracking.experiment) == (1, 1)
