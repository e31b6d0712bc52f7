from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.records import ModelVersion
from pipeline.registry import models
from pipeline.registry.artifact_check import least_agreement, reproduces
from pipeline.registry.models import ModelReference
from pipeline.workflow.tracking import Tracking

Register = Callable[..., ModelVersion]


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


def test_least_agreement__an_evaluation_in_bf16_may_meet_a_machine_without_it(trained: Any) -> None:
    in_bf16 = trained.evaluation.model_copy(update={"inference": {"precision": "bf16"}})
    assert (least_agreement(trained.evaluation), least_agreement(in_bf16)) == (0.995, 0.98)


def test_reproduces__predictions_that_are_gone_cannot_be_compared(
    tracking: Tracking, trained: Any, register: Register
) -> None:
    folder = models.model_folder(tracking, ModelReference(register().name, 1), "unused")
    check = reproduces(folder, trained.scored(0.5, uri="/nowhere"))
    assert not check.passed
    assert check.detail == (
        "the registered artifact cannot be compared, the evaluated predictions at /nowhere/probe are gone; "
        "run its flow again"
    )
