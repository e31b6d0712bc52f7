from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.records import ModelVersion, PromotionDecision
from pipeline.registry import decisions, store
from pipeline.registry.policy_file import choose_policy, load_policy
from pipeline.workflow.tracking import Tracking

Register = Callable[..., ModelVersion]

FIELDS = {
    "min_miou": 0.4,
    "max_regression": 0.01,
    "protected_classes": ["pole"],
    "max_class_regression": 0.02,
    "unmeasured_classes": "allow",
    "max_gflops": 50.0,
    "max_parameters": 7_000_000,
    "max_latency_ms": 80.0,
}


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_load_policy__every_field_from_yaml_or_json(write: Callable[[Any], str], tmp_path: Path) -> None:
    assert set(FIELDS) == set(PromotionPolicy.model_fields)
    (tmp_path / "policy").write_text(write(FIELDS))
    assert load_policy(tmp_path / "policy") == PromotionPolicy.model_validate(FIELDS)


def test_load_policy__numbers_people_write(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("max_parameters: 7e6\nmax_gflops: 1e2\n")
    assert load_policy(tmp_path / "policy.yaml") == PromotionPolicy(max_parameters=7_000_000, max_gflops=100.0)


def test_load_policy__all_mistakes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("min_iou: 0.5\nmax_regression: 2\nmax_gflops: 0\nprotected_classes: pole\n")
    with pytest.raises(UserError) as raised:
        load_policy(file)
    first, *lines = str(raised.value).splitlines()
    assert first == f"policy {file}: 4 problem(s); its keys are {', '.join(FIELDS)}"
    assert sorted(lines) == [
        "  max_gflops: 0: Input should be greater than 0",
        "  max_regression: 2: Input should be less than or equal to 1",
        "  min_iou: unknown key; remove it or correct its spelling",
        "  protected_classes: 'pole': Input should be a valid tuple",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"policy .* cannot be read \(No such file or directory\); check the path"),
        ("a: [", r"policy .* is neither YAML nor JSON: "),
        ("- 1", r"policy .* holds list, not a mapping; its keys are min_miou, "),
        ("", r"policy .* holds NoneType, not a mapping"),
        ("7: 1", r"policy .*: 1 problem\(s\)"),
    ],
)
def test_load_policy__no_policy_at_all(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "policy").write_text(content)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "policy")


def test_choose_policy__nearest_one_first(tracking: Tracking, trained: Any, register: Register, tmp_path: Path) -> None:
    version, other = register(), register(trained.scored(0.6))
    assert choose_policy(tracking, version) == (
        PromotionPolicy(),
        "the defaults, as none was used for this model yet",
    )
    for reason, least in (("older", 0.1), ("newer", 0.2)):
        decision = PromotionDecision(
            name=other.name,
            version=other.version,
            promoted=False,
            reason=reason,
            checks=(),
            champion_before=None,
            champion_after=None,
            policy=PromotionPolicy(min_miou=least).model_dump(mode="json"),
        )
        decisions.record_promotion(tracking, decision, "ann")
    assert choose_policy(tracking, version) == (
        PromotionPolicy(min_miou=0.2),
        f"the one used last for {version.name}, for version 2",
    )
    flow = tracking.client().create_run(tracking.experiment_id()).info.run_id
    tracking.client().log_text(flow, "name: x\npromote: {min_miou: 0.3}\n", "config.yaml")
    store.set_version_tags(tracking, version.name, 1, {store.FLOW_RUN: flow})
    assert choose_policy(tracking, version) == (
        PromotionPolicy(min_miou=0.3),
        f"that of run {flow[:12]}, which registered the version",
    )
    decisions.keep_policy(tracking, [version], PromotionPolicy(min_miou=0.4, protected_classes=("sky",)))
    assert choose_policy(tracking, version) == (
        PromotionPolicy(min_miou=0.4, protected_classes=("sky",)),
        "that of the version's own flow",
    )
    (tmp_path / "p.json").write_text('{"min_miou": 0.5}')
    assert choose_policy(tracking, version, tmp_path / "p.json") == (
        PromotionPolicy(min_miou=0.5),
        f"the file {tmp_path / 'p.json'}",
    )
