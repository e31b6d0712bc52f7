"""What the report shows, read from what the steps left on storage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import segvit
from pipeline.errors import UserError, shown
from pipeline.evaluation.paper import figure_of
from pipeline.masking import masked
from pipeline.records import (
    BackboneRecord,
    Checkpoint,
    Evaluation,
    ModelVersion,
    PromotionDecision,
    SearchResult,
    ShardSet,
)
from pipeline.reports.pages import data_uri
from pipeline.storage import join, read_bytes, read_json
from pipeline.storage.names import CONFUSION_FILE, EXAMPLES_FILE, MANIFEST, SCORES_FILE
from pipeline.tuning.view import SearchSummary, read_search
from pipeline.workflow.tracking import RunState

_MIME = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


@dataclass(frozen=True, slots=True)
class Example:
    """A val image with its ground truth and prediction laid over it, as data URIs."""

    key: str
    kind: Literal["best", "worst"]
    miou: float
    image: str
    truth: str
    prediction: str


@dataclass(frozen=True, slots=True, eq=False)
class VariantReport:
    """All that the page shows of one variant.

    Attributes:
        confusion: (K, K) pixel counts, rows = true class, columns = predicted class.
        image_mious: mIoU of every image of the split.
        history: rows of history.jsonl, each with "step" and loss terms or "val_miou".
        paper: what the paper reports for the model, where it is one of the paper's.
        also: scores of the same checkpoint predicted in other ways, by name.
    """

    checkpoint: Checkpoint
    evaluation: Evaluation
    version: ModelVersion | None
    confusion: NDArray[np.int64]
    image_mious: tuple[float, ...]
    examples: tuple[Example, ...]
    history: tuple[Mapping[str, Any], ...]
    paper: segvit.PaperFigure | None = None
    also: Mapping[str, Evaluation] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The variant's name in the experiment file."""
        return self.evaluation.variant


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReportInput:
    """Everything on the page.

    Attributes:
        palette: one (red, green, blue) of 0-255 a class.
        found: what the search chose, and `search` all its trials; None where there was no search.
    """

    experiment: str
    run_id: str
    created_at: datetime
    config_yaml: str
    shard_set: ShardSet
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    backbones: tuple[BackboneRecord, ...]
    found: SearchResult | None
    search: SearchSummary | None
    variants: tuple[VariantReport, ...]
    decision: PromotionDecision | None


def load_report_input(
    *,
    experiment: str,
    run_id: str,
    created_at: datetime,
    config_yaml: str,
    shard_set: ShardSet,
    backbones: Sequence[BackboneRecord],
    search: SearchResult | None,
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[Evaluation],
    versions: Sequence[ModelVersion] = (),
    decision: PromotionDecision | None = None,
    also: Mapping[str, Sequence[Evaluation]] = MappingProxyType({}),
) -> ReportInput:
    """Read the files that the records name; variants keep the order of `evaluations`.

    Raises FileNotFoundError where a file is missing, and ValueError where an evaluation's checkpoint is.
    """
    manifest = read_json(join(shard_set.uri, MANIFEST))
    by_variant = {checkpoint.variant: checkpoint for checkpoint in checkpoints}
    registered = {version.variant: version for version in versions}
    variants = []
    for evaluation in evaluations:
        checkpoint = by_variant.get(evaluation.variant)
        if checkpoint is None or checkpoint.digest != evaluation.checkpoint_digest:
            raise ValueError(f"evaluation of variant {evaluation.variant!r} has no matching checkpoint; pass both")
        others = {
            name: one for name, scored in also.items() for one in scored if one.checkpoint_digest == checkpoint.digest
        }
        variants.append(_load_variant(checkpoint, evaluation, registered.get(evaluation.variant), others))
    trials = None
    if search is not None:
        trials = read_search(search.trials_uri.rpartition("/")[0], run_id, experiment, RunState.FINISHED)
    return ReportInput(
        experiment=experiment,
        run_id=run_id,
        created_at=created_at,
        config_yaml=masked(config_yaml),
        shard_set=shard_set,
        class_names=tuple(manifest["classes"]),
        palette=tuple((red, green, blue) for red, green, blue in manifest["palette"]),
        backbones=tuple(backbones),
        found=search,
        search=trials,
        variants=tuple(variants),
        decision=decision,
    )


def _load_variant(
    checkpoint: Checkpoint, evaluation: Evaluation, version: ModelVersion | None, also: Mapping[str, Evaluation]
) -> VariantReport:
    folder = evaluation.uri
    confusion = read_json(join(folder, CONFUSION_FILE))
    examples = [
        Example(
            key=row["key"],
            kind=row["kind"],
            miou=row["miou"],
            **{part: _example(folder, row[part]) for part in ("image", "truth", "prediction")},
        )
        for row in read_json(join(folder, EXAMPLES_FILE))
    ]
    history = read_bytes(checkpoint.history_uri).decode().splitlines() if checkpoint.history_uri else []
    return VariantReport(
        checkpoint=checkpoint,
        evaluation=evaluation,
        version=version,
        confusion=np.asarray(confusion["matrix"], dtype=np.int64),
        image_mious=tuple(row["miou"] for row in read_json(join(folder, SCORES_FILE))),
        examples=tuple(examples),
        history=tuple(json.loads(line) for line in history if line.strip()),
        paper=figure_of(checkpoint),
        also=also,
    )


def _example(folder: str, name: str) -> str:
    """The picture `name` below `folder`, as a page holds it; raises UserError for a name that leads elsewhere."""
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{join(folder, EXAMPLES_FILE)} names {shown(name)}, outside of its folder; run its flow again")
    return _picture(join(folder, name))


def _picture(uri: str) -> str:
    return data_uri(read_bytes(uri), _MIME[Path(uri).suffix.lower()])
