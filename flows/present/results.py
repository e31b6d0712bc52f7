"""What a flow came to, whatever its recipe: its records, each kind in its own form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from flows.present.runs import variants_table
from flows.present.scores import inference_text
from pipeline import storage
from pipeline.records import (
    Evaluation,
    ModelVersion,
    PromotionDecision,
    Record,
    Report,
    RescoredChampion,
    SearchResult,
    Study,
)
from pipeline.storage.names import STUDY_TEXT
from pipeline.tuning.space import value_text


def print_results(console: Console, records: Mapping[str, Record]) -> None:
    """Evaluations side by side, then a line for each search, decision and report."""
    evaluations, also = _evaluations(records)
    decision = next((one for one in records.values() if isinstance(one, PromotionDecision)), None)
    if evaluations and not any(isinstance(record, Study) for record in records.values()):
        console.print(variants_table(list(evaluations.values()), _versions(records), decision))
    for name, one in evaluations.items():
        if one.unmeasured_classes:
            left = f"{len(one.class_names) - len(one.unmeasured_classes)} of {len(one.class_names)} classes"
            missing = ", ".join(one.unmeasured_classes)
            text = f"warning   {name}: the mIoU is of {left}; split {one.split} has no labelled pixel of {missing}"
            console.print(text, style="yellow", markup=False, soft_wrap=True)
    for name, one in also.items():
        console.print(f"also      {name}: mIoU {one.miou:.4f}{inference_text(one)}", markup=False, soft_wrap=True)
    for record in records.values():
        match record:
            case SearchResult():
                found = ", ".join(f"{path} {value_text(value)}" for path, value in record.values.items())
                console.print(f"search    {found}", markup=False, soft_wrap=True)
            case RescoredChampion(evaluation=Evaluation(miou=miou)):
                text = f"champion  models:/{record.name}/{record.champion} scored again on this data: mIoU {miou:.4f}"
                console.print(text, markup=False, soft_wrap=True)
            case PromotionDecision():
                console.print(f"decision  {record.reason}", markup=False, soft_wrap=True)
            case Report():
                console.print(f"report    {record.uri}", markup=False, soft_wrap=True)
            case Study():
                table = storage.read_bytes(storage.join(record.uri, STUDY_TEXT)).decode()
                console.print(table, markup=False, soft_wrap=True)
                console.print(f"study     {record.uri}", markup=False, soft_wrap=True)


def facts(records: Mapping[str, Record]) -> dict[str, Any]:
    """The records as JSON: evaluations, versions, decision and report by themselves, and all of them by step."""
    evaluations, also = _evaluations(records)
    found: dict[str, Any] = {
        "evaluations": {name: one.model_dump(mode="json") for name, one in evaluations.items()},
        "also_evaluated": {name: one.model_dump(mode="json") for name, one in also.items()},
        "versions": {name: version.version for name, version in _versions(records).items()},
    }
    for record in records.values():
        match record:
            case PromotionDecision():
                found["decision"] = record.model_dump(mode="json")
            case Report():
                found["report"] = record.uri
            case Study():
                found["study"] = record.uri
    return {**found, "records": {label: record.model_dump(mode="json") for label, record in records.items()}}


def _evaluations(records: Mapping[str, Record]) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Those of the variants by their steps' names, "full", and those by `evaluate.also`, each "full/multi_scale"."""
    scored = {label: record for label, record in records.items() if isinstance(record, Evaluation)}
    found = {label.partition("/")[2] or record.variant: record for label, record in scored.items()}
    also = {name: record for name, record in found.items() if "/" in name}
    return {name: record for name, record in found.items() if name not in also}, also


def _versions(records: Mapping[str, Record]) -> dict[str, ModelVersion]:
    return {one.variant: one for one in records.values() if isinstance(one, ModelVersion)}
