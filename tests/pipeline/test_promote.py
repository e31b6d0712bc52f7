from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import models, promote, registry
from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.models import ModelReference
from pipeline.promote import decide, promote_version, reproduces, verify_decision
from pipeline.records import Check, ModelVersion
from pipeline.tracking import Tracking

Register = Callable[..., ModelVersion]


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the loading of the artifact, which has tests of its own."""
    monkeypatch.setattr(promote, "reproduces", lambda *_: Check(name="artifact", passed=True, detail="trusted"))


def test_decide__first_champion_has_nothing_to_beat(trained: Any) -> None:
    gate = decide(trained.scored(0.1234), None, PromotionPolicy(max_regression=0.0, protected_classes=("pole",)))
    assert gate.promoted
    assert gate.reason == "promoted: mIoU 0.1234, the first champion; 1 checks passed"
    assert [check.name for check in gate.checks] == ["minimum mIoU"]


@pytest.mark.parametrize(
    ("candidate", "policy", "reason"),
    [
        ({"miou": 0.39}, {"min_miou": 0.4, "max_regression": 0.5}, "mIoU 0.3900, minimum 0.4000"),
        ({"data_digest": "f" * 64}, {}, "scored on data ffffffff, the champion on dddddddd: not comparable"),
        ({"miou": 0.479}, {"max_regression": 0.02}, "mIoU 0.4790, the champion's 0.5000, tolerance 0.0200"),
        (
            {"per_class_iou": (0.9, 0.9, 0.09)},
            {"protected_classes": ("road", "pole"), "max_class_regression": 0.1},
            "pole: IoU 0.0900, the champion's 0.2000, tolerance 0.1000",
        ),
        ({"per_class_iou": (0.9, 0.9, None)}, {"protected_classes": ("pole",)}, "pole: no IoU, the champion's 0.2000"),
        ({}, {"max_gflops": 1.4}, "GFLOPs 1.5, at most 1.4"),
        ({}, {"max_parameters": 4_999_999}, "parameters 5e+06, at most 5e+06"),
        ({}, {"max_latency_ms": 11.5}, "latency ms 12, at most 11.5"),
    ],
)
def test_decide__refuses_for_each_reason_alone(
    trained: Any, candidate: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    gate = decide(trained.evaluation.model_copy(update=candidate), trained.evaluation, PromotionPolicy(**policy))
    assert not gate.promoted
    assert gate.reason == f"refused: {reason}"
    assert [check.detail for check in gate.checks if not check.passed] == [reason]


def test_decide__names_all_reasons_at_once(trained: Any) -> None:
    policy = PromotionPolicy(min_miou=0.45, max_gflops=1.0)
    gate = decide(trained.scored(0.4), trained.evaluation, policy)
    assert gate.reason == (
        "refused: mIoU 0.4000, minimum 0.4500; mIoU 0.4000, the champion's 0.5000, tolerance 0.0000; "
        "GFLOPs 1.5, at most 1"
    )


def test_decide__at_the_edge_of_every_condition_passes(trained: Any) -> None:
    policy = PromotionPolicy(
        min_miou=0.48,
        max_regression=0.02,
        protected_classes=("sky", "pole"),
        max_class_regression=0.1,
        max_gflops=1.5,
        max_parameters=5_000_000,
        max_latency_ms=12.0,
    )
    gate = decide(trained.scored(0.48, per_class_iou=(0.7, 0.0, 0.1)), trained.evaluation, policy)
    assert gate.promoted, gate.reason
    assert gate.reason == "promoted: mIoU 0.4800, the champion had 0.5000; 8 checks passed"


def test_decide__class_the_champion_never_saw_cannot_regress(trained: Any) -> None:
    champion = trained.scored(0.5, per_class_iou=(0.8, 0.5, None))
    assert decide(trained.evaluation, champion, PromotionPolicy(protected_classes=("pole",))).promoted


def test_decide__unknown_protected_class_is_a_mistake(trained: Any) -> None:
    with pytest.raises(UserError, match=r"promote.protected_classes names 'tram'; choose from sky, road, pole"):
        decide(trained.evaluation, None, PromotionPolicy(protected_classes=("tram",)))


@pytest.mark.usefixtures("trusting")
def test_promote_version__moves_the_alias_and_records(tracking: Tracking, trained: Any, register: Register) -> None:
    first, better, worse = (register(trained.scored(miou)) for miou in (0.5, 0.6, 0.3))
    decisions = [promote_version(tracking, one, PromotionPolicy(), decided_by="ann") for one in (first, better, worse)]
    assert [(one.promoted, one.champion_before, one.champion_after) for one in decisions] == [
        (True, None, 1),
        (True, 1, 2),
        (False, 2, 2),
    ]
    assert registry.find_alias(tracking, first.name, "champion") == 2
    tags = registry.version_tags(tracking, first.name, 3)
    assert (tags["promotion.promoted"], tags["promotion.by"], tags["promotion.against"]) == (
        "false",
        "ann",
        "version 2",
    )
    assert tags["promotion.at"].endswith("+00:00")
    assert tags["promotion.reason"] == "refused: mIoU 0.3000, the champion's 0.6000, tolerance 0.0000"
    promote_version(tracking, worse, PromotionPolicy(min_miou=0.9), decided_by="bob")
    tags = registry.version_tags(tracking, first.name, 3)
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
    keys = [key for key in registry.version_tags(tracking, version.name, 1) if "history" in key]
    assert len(keys) == 1


def test_promote_version__champion_set_by_hand_is_kept(tracking: Tracking, register: Register) -> None:
    version = register()
    registry.set_alias(tracking, version.name, "champion", 1)
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
        patched.setattr(registry, "set_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            promote_version(tracking, version, PromotionPolicy())
    assert registry.find_alias(tracking, version.name, "champion") is None
    assert promote_version(tracking, version, PromotionPolicy()).champion_after == 1
    assert registry.find_alias(tracking, version.name, "champion") == 1


@pytest.mark.usefixtures("trusting")
def test_verify_decision__holds_while_the_champion_stays(tracking: Tracking, trained: Any, register: Register) -> None:
    decision = promote_version(tracking, register(), PromotionPolicy())
    assert verify_decision(decision, tracking) is None
    promote_version(tracking, register(trained.scored(0.6)), PromotionPolicy())
    assert verify_decision(decision, tracking) == f"the champion of {decision.name} is now version 2"


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
    assert registry.find_alias(tracking, version.name, "champion") is None


def test_reproduces__the_untouched_artifact_does(tracking: Tracking, trained: Any, register: Register) -> None:
    folder = models.model_folder(tracking, ModelReference(register().name, 1), "unused")
    check = reproduces(folder, trained.evaluation)
    assert check.passed
    assert check.detail == "the registered artifact predicts as evaluated in 100.00% of pixels, at least 99.50%"


def test_reproduces__a_flipped_byte_is_found(tracking: Tracking, trained: Any, register: Register) -> None:
    folder = models.model_folder(tracking, ModelReference(register().name, 1), "unused")
    weights = folder / "artifacts/checkpoint/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    check = reproduces(folder, trained.evaluation)
    assert (check.passed, check.detail) == (False, "the registered artifact does not hold the evaluated weights")


def test_reproduces__code_that_does_not_load_is_told(tracking: Tracking, trained: Any, register: Register) -> None:
    folder = models.model_folder(tracking, ModelReference(register().name, 1), "unused")
    (folder / "code/segvit/checkpoint.py").write_text("raise RuntimeError('broken code')\n")
    check = reproduces(folder, trained.evaluation)
    assert not check.passed
    assert check.detail.startswith("the registered artifact does not load: ")
    assert "broken code" in check.detail
