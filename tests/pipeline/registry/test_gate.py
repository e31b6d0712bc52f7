from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.registry.gate import decide, policy_problems, scoring_differences


def test_decide__first_champion_has_nothing_to_beat(trained: Any) -> None:
    gate = decide(trained.scored(0.1234), None, PromotionPolicy(max_regression=0.0, protected_classes=("pole",)))
    assert gate.promoted
    assert gate.reason == "promoted: mIoU 0.1234, the first champion; 1 checks passed"
    assert [check.name for check in gate.checks] == ["minimum mIoU"]


@pytest.mark.parametrize(
    ("candidate", "policy", "reason"),
    [
        ({"miou": 0.39}, {"min_miou": 0.4, "max_regression": 0.5}, "mIoU 0.3900, minimum 0.4000"),
        ({"miou": 0.479}, {"max_regression": 0.02}, "mIoU 0.4790, the champion's 0.5000, tolerance 0.0200"),
        (
            {"per_class_iou": (0.9, 0.9, 0.09)},
            {"protected_classes": ("road", "pole"), "max_class_regression": 0.1},
            "pole: IoU 0.0900, the champion's 0.2000, tolerance 0.1000",
        ),
        ({"per_class_iou": (0.9, 0.9, None)}, {"protected_classes": ("pole",)}, "pole: no IoU, the champion's 0.2000"),
        (
            {"per_class_accuracy": (0.9, None, None), "miou": 1.0},
            {},
            "split val has no labelled pixel of road, pole, and the mIoU says nothing of it; score it on data that "
            "shows all",
        ),
        ({}, {"max_gflops": 1.4}, "GFLOPs 1.5, at most 1.4"),
        ({}, {"max_parameters": 4_999_999}, "parameters 5,000,000, at most 4,999,999"),
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


def test_decide__unmeasured_classes_that_the_policy_allows_are_on_the_record(trained: Any) -> None:
    candidate = trained.evaluation.model_copy(update={"per_class_accuracy": (0.9, 0.6, None)})
    gate = decide(candidate, None, PromotionPolicy(unmeasured_classes="allow"))
    assert gate.promoted
    assert gate.checks[1].detail == "split val has no labelled pixel of pole, which the policy allows"
    assert not decide(candidate, None, PromotionPolicy()).promoted


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"data_digest": "f" * 64}, "on data ffffffff, the champion on data dddddddd"),
        ({"split": "test"}, "on split test, the champion on split val"),
        ({"class_names": ("sky", "road", "tram")}, "with class 2 tram, the champion with pole"),
        ({"class_names": ("sky", "road"), "per_class_iou": (0.8, 0.5)}, "with class 2 missing, the champion with pole"),
        ({"inference": {"stride": (8, 8)}}, 'with inference {"stride": [8, 8]}, the champion with {}'),
    ],
)
def test_decide__compares_only_what_was_scored_alike(trained: Any, changes: dict[str, Any], difference: str) -> None:
    candidate = trained.evaluation.model_copy(update=changes)
    gate = decide(candidate, trained.evaluation, PromotionPolicy())
    assert not gate.promoted
    remedy = (
        "a model of other classes is another model; give its experiment another name"
        if "class" in difference
        else "score both on the same data with the same settings"
    )
    assert gate.reason == f"refused: scored {difference}: not comparable; {remedy}"
    assert decide(candidate, candidate, PromotionPolicy()).promoted


def test_decide__a_champion_that_nobody_can_use_is_not_compared_with_where_it_was_scored_otherwise(
    trained: Any,
) -> None:
    elsewhere = trained.scored(0.4, data_digest="f" * 64)
    gate = decide(elsewhere, trained.evaluation, PromotionPolicy(min_miou=0.3), unusable="its files are gone")
    assert gate.reason == "promoted: mIoU 0.4000, not compared with the champion; 2 checks passed"
    assert gate.checks[1].detail == "its files are gone: not compared"
    assert not decide(elsewhere, trained.evaluation, PromotionPolicy(min_miou=0.5), unusable="gone").promoted
    alike = decide(trained.scored(0.4), trained.evaluation, PromotionPolicy(), unusable="gone")
    assert alike.reason == "refused: mIoU 0.4000, the champion's 0.5000, tolerance 0.0000"


def test_scoring_differences__all_of_them_but_not_the_form_of_equal_ones(trained: Any) -> None:
    first = trained.evaluation.model_copy(update={"inference": {"crop": (32, 32)}, "split": "test"})
    second = trained.evaluation.model_copy(update={"inference": {"crop": [32, 32]}, "data_digest": "f" * 64})
    assert scoring_differences(first, second, "the other") == [
        "on split test, the other on split val",
        "on data dddddddd, the other on data ffffffff",
    ]


def test_decide__a_latency_timed_beside_other_work_is_not_used(trained: Any) -> None:
    candidate = trained.scored(0.5, latency_reliable=False)
    gate = decide(candidate, None, PromotionPolicy(max_latency_ms=99.0))
    assert gate.reason == (
        "refused: latency ms 12, at most 99, but timed beside other work and therefore unreliable; when the machine is "
        f"idle, remove {candidate.uri} and run the experiment again: only this evaluation and what follows is done anew"
    )
    assert decide(candidate, None, PromotionPolicy()).promoted


def test_policy_problems__names_every_class_that_is_not_there() -> None:
    policy = PromotionPolicy(protected_classes=("raod", "sky", "cat"))
    assert policy_problems(policy, ("sky", "road")) == [
        "protected_classes names 'raod'; choose from road, sky",
        "protected_classes names 'cat'; choose from sky, road",
    ]
    assert policy_problems(PromotionPolicy(), ()) == []


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
    with pytest.raises(UserError, match=r"the policy's protected_classes names 'tram'; choose from sky, road, pole"):
        decide(trained.evaluation, None, PromotionPolicy(protected_classes=("tram",)))


def test_decide__a_figure_that_is_no_number_never_passes(trained: Any) -> None:
    nan = float("nan")
    policy = PromotionPolicy(max_gflops=9.0, max_latency_ms=99.0)
    gate = decide(trained.scored(nan, gflops=nan, latency_ms=nan), trained.evaluation, policy)
    assert [check.name for check in gate.checks if not check.passed] == [
        "minimum mIoU",
        "no regression",
        "GFLOPs",
        "latency ms",
    ]
