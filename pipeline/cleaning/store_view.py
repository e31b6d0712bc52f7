"""What a tracking store knows of a workspace: flows, steps, versions and models, read once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.cleaning.workspace_files import DIGITS, OutputKey
from pipeline.errors import UserError
from pipeline.registry import decisions, store
from pipeline.registry.store import CHAMPION, all_pages
from pipeline.workflow import liveness
from pipeline.workflow.runs import mark_abandoned
from pipeline.workflow.tracking import RunState, Tag, Tracking

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CLEANING = "cleaning"  # the kind of a cleaner's own runs, which it deletes when it has ended
_FOLDER = re.compile(rf"([\w.-]+)/({DIGITS})(?=[/\"]|$)")


@dataclass(frozen=True, slots=True)
class FlowRun:
    """One run of a flow; `ended` in seconds since 1970, of a running one that is now."""

    run_id: str
    name: str
    ended: float
    is_alive: bool

    @property
    def text(self) -> str:
        """For people."""
        return f"run {self.run_id[:12]} of {self.name}"


@dataclass(frozen=True, slots=True)
class StepRun:
    """One run of a step that had its inputs; `is_done`: it has finished, or was reused, and its outputs are there."""

    run_id: str
    flow_run_id: str
    step: str
    label: str
    fingerprint: str
    is_done: bool
    ended: float

    @property
    def key(self) -> OutputKey:
        """The folder of its outputs."""
        return OutputKey(self.step, self.fingerprint[:16])


@dataclass(frozen=True, slots=True)
class Version:
    """A registered version; `folders` are the outputs of steps that its tags name."""

    name: str
    number: int
    aliases: tuple[str, ...]
    source: str
    run_id: str
    flow_run_id: str
    folders: frozenset[OutputKey]
    created: float

    @property
    def uri(self) -> str:
        """As MLflow names it."""
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True, slots=True)
class StoreView:
    """All that is on record.

    Attributes:
        flows: the newest first.
        steps: those that had their inputs.
        versions: of all models.
        former_champions: of each model, those that a rollback goes back to, the latest first.
        models: MLflow's logged models, where they lie by id.
        being_registered: those of them whose step is at work.
        deleted_runs: the ids of those that were deleted, and that MLflow could still restore.
    """

    flows: tuple[FlowRun, ...] = ()
    steps: tuple[StepRun, ...] = ()
    versions: tuple[Version, ...] = ()
    former_champions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    being_registered: frozenset[str] = frozenset()
    deleted_runs: tuple[str, ...] = ()


def read_store(tracking: Tracking) -> StoreView:
    """Read it all; what dead drivers left running is marked first."""
    experiment = tracking.find_experiment()
    if experiment is None:
        return StoreView()
    from mlflow.entities import ViewType

    mark_abandoned(tracking)
    client = tracking.client()
    # Of all experiments: they may keep their artifacts in one place.
    experiments = [str(one.experiment_id) for one in all_pages(client.search_experiments)]
    models = all_pages(client.search_logged_models, experiment_ids=experiments)
    versions: list[Version] = []
    champions: dict[str, tuple[int, ...]] = {}
    for model in all_pages(client.search_registered_models):
        aliases = {alias: int(number) for alias, number in model.aliases.items()}
        found = all_pages(client.search_model_versions, filter_string=f"name = '{model.name}'")
        versions += [_version(version, aliases) for version in found]
        champions[model.name] = _former_champions(tracking, model.name, aliases.get(CHAMPION))
    runs = list(tracking.runs(""))
    at_work = {run.info.run_id for run in runs if run.info.status == "RUNNING"}
    deleted = all_pages(client.search_runs, experiment_ids=[experiment], run_view_type=ViewType.DELETED_ONLY)
    return StoreView(
        flows=tuple(_flow(run) for run in runs if run.data.tags.get(Tag.KIND) == "flow"),
        steps=tuple(_steps(runs)),
        versions=tuple(sorted(versions, key=lambda one: (one.name, -one.number))),
        former_champions=champions,
        models={str(model.model_id): str(model.artifact_location) for model in models},
        being_registered=frozenset(str(model.model_id) for model in models if model.source_run_id in at_work),
        deleted_runs=tuple(str(run.info.run_id) for run in deleted if run.data.tags.get(Tag.KIND) != CLEANING),
    )


def living_flows(tracking: Tracking) -> list[Run]:
    """The flows at work now."""
    running = tracking.runs(f"tags.`{Tag.KIND}` = 'flow' and attributes.status = 'RUNNING'")
    return [run for run in running if liveness.why_dead(run.data.tags) is None]


def _flow(run: Run) -> FlowRun:
    alive = run.info.status == "RUNNING"
    ended = run.info.end_time or run.info.start_time
    return FlowRun(str(run.info.run_id), str(run.data.tags.get(Tag.FLOW, run.info.run_name)), ended / 1000, alive)


def _steps(runs: Iterable[Run]) -> Iterator[StepRun]:
    for run in runs:
        tags = run.data.tags
        fingerprint = tags.get(Tag.FINGERPRINT)
        if tags.get(Tag.KIND) == "step" and fingerprint:
            yield StepRun(
                run_id=str(run.info.run_id),
                flow_run_id=tags.get(Tag.PARENT, ""),
                step=tags[Tag.STEP],
                label=tags.get(Tag.LABEL, ""),
                fingerprint=fingerprint,
                is_done=Tag.CLEANED not in tags and (Tag.DONE in tags or tags.get(Tag.STATE) == RunState.REUSED),
                ended=(run.info.end_time or run.info.start_time) / 1000,
            )


def _version(version: MlflowVersion, aliases: dict[str, int]) -> Version:
    number = int(version.version)
    named = {OutputKey(step, digits) for text in version.tags.values() for step, digits in _FOLDER.findall(text)}
    return Version(
        name=str(version.name),
        number=number,
        aliases=tuple(sorted(alias for alias, of in aliases.items() if of == number)),
        source=str(version.source),
        run_id=str(version.run_id or ""),
        flow_run_id=version.tags.get(store.FLOW_RUN, ""),
        folders=frozenset(named),
        created=version.creation_timestamp / 1000,
    )


def _former_champions(tracking: Tracking, name: str, now: int | None) -> tuple[int, ...]:
    try:
        line = decisions.champions(tracking, name, now)
    except ValueError as error:
        raise UserError(f"what is recorded of the champions of {name} cannot be read ({error})") from error
    earlier = [number for number in reversed(line) if number != now]
    return tuple(dict.fromkeys(earlier))
