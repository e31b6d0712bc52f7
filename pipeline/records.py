"""What travels between steps: small frozen records that name data by URI and digest, never the data itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all records: frozen, strict about unknown fields, serialisable as JSON.

    `identity_fields` name what the content is made of. Two records with equal identity are interchangeable as
    inputs of a step, even when they lie at different places or were measured at different times.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    identity_fields: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> str:
        """Canonical JSON of all fields."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that `to_json` wrote; raises pydantic.ValidationError where it does not fit."""
        return cls.model_validate_json(text)

    def content_digest(self) -> str:
        """sha256 over the record's type and identity fields (all fields where none are named)."""
        fields = self.model_dump(mode="json", include=set(self.identity_fields) or None)
        canonical = json.dumps([type(self).__name__, fields], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class SplitInfo(Record):
    """One split of a shard set; `digest` is the sha256 over its shards' sha256 sums in order."""

    num_samples: int
    num_shards: int
    digest: str


class ShardSet(Record):
    """A data set as WebDataset shards: `uri` holds the tars, index.parquet, quarantine.parquet and manifest.json."""

    identity_fields: ClassVar[tuple[str, ...]] = ("digest",)

    name: str
    uri: str
    digest: str
    num_classes: int
    splits: dict[str, SplitInfo]
    num_quarantined: int = 0


class BackboneRecord(Record):
    """Backbone weights as one safetensors file; no `uri` means random initialisation."""

    identity_fields: ClassVar[tuple[str, ...]] = ("backbone", "digest")

    backbone: str
    uri: str | None
    digest: str
    source: str
    message: str


class SearchResult(Record):
    """The best values that a search found on a variant, by dotted path of its settings (`loss.dice`).

    `trials_digest` is the sha256 of the file at `trials_uri`, which holds all trials of the search.
    """

    identity_fields: ClassVar[tuple[str, ...]] = ("variant", "values")

    variant: str
    values: dict[str, Any]
    miou: float | None
    num_trials: int
    trials_uri: str
    trials_digest: str


class Checkpoint(Record):
    """A trained model: `uri` holds model.safetensors and config.json; `digest` is the sha256 of the former.

    One that was fetched from the registry has its version in place of `variant`, `models:/name/3`, and no history.
    `started_from`: the variant or version whose weights it started from; None: from the backbone's alone.
    `source_digest`: the sha256 of the file of another format that it was read from; None: it was trained here.
    `source_uri`: where one from elsewhere was read from; `config_digest`: the sha256 of its config.json, whose classes
    and settings nothing else tells.
    """

    identity_fields: ClassVar[tuple[str, ...]] = ("variant", "digest")

    variant: str
    uri: str
    digest: str
    step: int
    miou: float | None
    history_uri: str | None
    train_seconds: float
    started_from: str | None = None
    source_digest: str | None = None
    source_uri: str | None = None
    config_digest: str | None = None

    def content_digest(self) -> str:
        """As of all records; of one from elsewhere its configuration counts, too."""
        digest = super().content_digest()
        if self.config_digest is None:
            return digest
        return hashlib.sha256(f"{self.config_digest} {digest}".encode()).hexdigest()

    @property
    def origin(self) -> str:
        """For people: where it lay, or the variant or version that it is."""
        return self.source_uri or self.variant


class Evaluation(Record):
    """Scores of one checkpoint on one split; `data_digest` says which scores may be compared.

    `uri` holds confusion.json, counts.parquet, images.json, examples.json, examples/ and probe/. An absent class has
    None. `counts_digest` is the sha256 of counts.parquet; "" where an earlier release kept no such file.
    `inference`: the keyword arguments of segvit.predict that are not its defaults. `latency_ms` is of such a
    prediction, `gflops` of one pass of the network, both of an image of `cost_size`. `latency_reliable`: nothing else
    kept the machine busy while it was timed.
    """

    identity_fields: ClassVar[tuple[str, ...]] = (
        "variant",
        "checkpoint_digest",
        "data_digest",
        "split",
        "inference",
        "miou",
        "counts_digest",
    )

    variant: str
    checkpoint_digest: str
    data_digest: str
    split: str
    inference: dict[str, Any] = {}
    num_images: int
    miou: float
    macc: float
    aacc: float
    boundary_iou: float | None
    class_names: tuple[str, ...]
    per_class_iou: tuple[float | None, ...]
    per_class_accuracy: tuple[float | None, ...]
    gflops: float
    parameters: int
    latency_ms: float
    latency_reliable: bool = True
    cost_size: tuple[int, int]
    uri: str
    counts_digest: str = ""

    @property
    def unmeasured_classes(self) -> tuple[str, ...]:
        """Those of which the split shows no labelled pixel: the mIoU says nothing of them."""
        known = zip(self.class_names, self.per_class_accuracy, strict=False)
        return tuple(name for name, accuracy in known if accuracy is None)


def latency_text(milliseconds: float, reliable: bool) -> str:
    """For people, an unreliable one marked: "~12.3 ms"."""
    return f"{'' if reliable else '~'}{milliseconds:.1f} ms"


class ModelVersion(Record):
    """A registered version in the model registry."""

    identity_fields: ClassVar[tuple[str, ...]] = ("name", "version")

    def content_digest(self) -> str:
        """As of all records; with an unreliable latency it is another one, since the gate may decide otherwise."""
        digest = super().content_digest()
        return (
            digest if self.evaluation.latency_reliable else hashlib.sha256(f"unreliable {digest}".encode()).hexdigest()
        )

    name: str
    version: int
    model_uri: str
    variant: str
    evaluation: Evaluation
    checkpoint_digest: str
    run_id: str


class Check(Record):
    """One condition of the promotion gate and how it came out."""

    name: str
    passed: bool
    detail: str


class RescoredChampion(Record):
    """The champion that candidates are compared with, and what it scored on their data where it was scored again.

    `champion`: its version; None where there is none. `evaluation`: None where nothing had to be done, or nothing
    could be, for what `obstacle` says.
    """

    name: str
    champion: int | None
    evaluation: Evaluation | None = None
    obstacle: str | None = None


class DecidedOn(Record):
    """An evaluation that a decision is based on; `digest` is its content digest.

    `run_id`: the run that registered it with its version or, where it is `rescored`, that scored the version again.
    """

    version: int
    run_id: str
    rescored: bool
    digest: str
    data_digest: str
    miou: float


class PromotionDecision(Record):
    """What the gate decided for a version, and why; `policy` holds the fields of the PromotionPolicy it asked.

    `also_refused`: versions that the gate refused beside this one, of those that it was to choose from.
    `candidate_scores`, `champion_scores`: what was compared; None where there was no champion.
    """

    name: str
    version: int
    promoted: bool
    reason: str
    checks: tuple[Check, ...]
    champion_before: int | None
    champion_after: int | None
    policy: dict[str, Any] = {}
    also_refused: tuple[int, ...] = ()
    candidate_scores: DecidedOn | None = None
    champion_scores: DecidedOn | None = None


class Study(Record):
    """An ablation's table: `uri` holds study.parquet, study.md and study.html; `digest` is the sha256 of the first."""

    identity_fields: ClassVar[tuple[str, ...]] = ("digest",)

    uri: str
    digest: str


class Report(Record):
    """The run's HTML page."""

    identity_fields: ClassVar[tuple[str, ...]] = ("digest",)

    uri: str
    digest: str
