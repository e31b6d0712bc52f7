"""What of a workspace goes and what stays, each with the reason; nothing is changed here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.cleaning.store_view import FlowRun, StoreView, Version
from pipeline.cleaning.workspace_files import LASTING, Files, OutputKey, WorkspaceFiles
from pipeline.records import Record
from pipeline.workflow.moved_store import ARTIFACTS

Kind = Literal[
    "outputs", "ray state", "logs", "page", "version", "model files", "artifacts", "deleted runs", "leftover", "other"
]
TRASH = "clean-"  # what begins like that is on its way out
# What was written this recently may be of somebody of whom no record says that it is at work.
SETTLED_AFTER_S = 3600.0


class Limits(Record):
    """Which runs keep their outputs, and whether versions go.

    Attributes:
        keep_runs: so many of the latest runs do.
        older_than_s: and those that ended less long ago.
        max_bytes: runs go, the oldest first, only until the workspace is as small.
        versions: whether registered versions go that have no alias and are not needed for a rollback.
        keep_champions: so many former champions stay with the champion.
    """

    keep_runs: int = 0
    older_than_s: float = 0.0
    max_bytes: int | None = None
    versions: bool = False
    keep_champions: int = 2


class Item(Record):
    """One thing that goes or stays; `name` is a path from the workspace, a run's id, a model's id or a version."""

    kind: Kind
    name: str
    num_bytes: int
    reason: str


class CleanPlan(Record):
    """What goes and what stays of a workspace of `num_bytes`.

    `losses`: what can no more be done afterwards, in a line each.
    """

    workspace: str
    num_bytes: int
    goes: tuple[Item, ...]
    stays: tuple[Item, ...]
    losses: tuple[str, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """Of all that goes."""
        return sum(item.num_bytes for item in self.goes)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Files and records of a workspace together.

    Attributes:
        owns_all: no other store can know of what lies there.
        is_shared: flows of another store run there, too.
        owns_store: the tracking store lies in it, with the artifacts.
    """

    uri: str
    files: WorkspaceFiles
    store: StoreView
    owns_all: bool
    is_shared: bool
    owns_store: bool


def make_plan(workspace: Workspace, limits: Limits, now: float | None = None) -> CleanPlan:
    """Decide about everything; `now` in seconds since 1970."""
    now = time.time() if now is None else now
    flows = workspace.store.flows
    may_go = [
        flow
        for place, flow in enumerate(flows)
        if place >= limits.keep_runs and not flow.is_alive and now - flow.ended >= limits.older_than_s
    ]
    may_go.reverse()
    if limits.max_bytes is None:
        return _Decision(workspace, limits, may_go, now).plan()
    # The fewest runs, the oldest first, that make it small enough; all, where that is not enough.
    least, most = 0, len(may_go)
    while least < most:
        middle = (least + most) // 2
        plan = _Decision(workspace, limits, may_go[:middle], now).plan()
        least, most = (least, middle) if plan.num_bytes - plan.freed_bytes <= limits.max_bytes else (middle + 1, most)
    return _Decision(workspace, limits, may_go[:least], now).plan()


class _Decision:
    """One plan: the flows `gone` do not need their outputs any more."""

    def __init__(self, workspace: Workspace, limits: Limits, gone: Sequence[FlowRun], now: float) -> None:
        self.files, self.store = workspace.files, workspace.store
        self.workspace, self.limits, self.now = workspace, limits, now
        self.gone = {flow.run_id: flow for flow in gone}
        self.flows = {flow.run_id: flow for flow in self.store.flows}
        self.kept_flows = {run_id: flow for run_id, flow in self.flows.items() if run_id not in self.gone}
        self.versions = {version.uri: self._why_version_stays(version) for version in self.store.versions}
        self.needs = self._needs()
        self.done = {step.key for step in self.store.steps if step.is_done}
        self.known = {step.key: step for step in sorted(self.store.steps, key=lambda step: step.ended)}
        self.at_work = {
            step.key
            for step in self.store.steps
            if step.flow_run_id in self.flows and self.flows[step.flow_run_id].is_alive
        }

    def plan(self) -> CleanPlan:
        """Everything that goes and stays, the largest first."""
        items = [*self._outputs(), *self._ray(), *self._of_flows(), *self._models(), *self._artifacts(), *self._rest()]
        items.sort(key=lambda item: (-item[1].num_bytes, item[1].name))
        return CleanPlan(
            workspace=self.workspace.uri,
            num_bytes=self.files.num_bytes,
            goes=tuple(item for goes, item in items if goes),
            stays=tuple(item for goes, item in items if not goes),
            losses=tuple(self._losses()),
        )

    def _needs(self) -> dict[OutputKey, str]:
        needs: dict[OutputKey, str] = {}
        for step in self.store.steps:
            if (flow := self.kept_flows.get(step.flow_run_id)) is not None:
                state = "is at work" if flow.is_alive else "stays"
                needs.setdefault(step.key, f"{flow.text} {state}")
        for version in self.store.versions:
            if self.versions[version.uri] is not None:
                aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
                needs |= dict.fromkeys(version.folders, f"{version.uri}{aliases} needs it")
        return needs

    def _why_version_stays(self, version: Version) -> str | None:
        if version.aliases:
            return f"it is {', '.join(version.aliases)}"
        if not self.limits.versions:
            return "it is registered; --versions removes those that nothing needs"
        if version.number in self.store.former_champions.get(version.name, ())[: self.limits.keep_champions]:
            return "a rollback may go back to it"
        flow = self.kept_flows.get(version.flow_run_id)
        return f"{flow.text} stays" if flow else None

    def _outputs(self) -> Iterator[tuple[bool, Item]]:
        for key, files in self.files.outputs.items():
            needed = self.needs.get(key)
            goes, reason = (False, needed) if needed else self._unneeded(key, files)
            yield goes, Item(kind="outputs", name=key.path, num_bytes=files.num_bytes, reason=reason)

    def _ray(self) -> Iterator[tuple[bool, Item]]:
        for key, files in self.files.ray.items():
            if key in self.at_work:
                goes, reason = False, "a run is at work on it"
            elif key in self.done and not self.workspace.is_shared:
                goes, reason = True, "its step is finished"
            elif key in self.needs:
                goes, reason = False, f"{self.needs[key]}, and would go on from it"
            else:
                goes, reason = self._unneeded(key, files)
            yield goes, Item(kind="ray state", name=f"ray/{key.run_name}", num_bytes=files.num_bytes, reason=reason)

    def _unneeded(self, key: OutputKey, files: Files) -> tuple[bool, str]:
        step = self.known.get(key)
        if step is not None and self.workspace.is_shared:
            return False, "flows of another tracking store run in this workspace and may need it"
        if step is not None:
            flow = self.flows.get(step.flow_run_id)
            return True, f"last used by {flow.text}" if flow else "its run was deleted"
        return self._unknown(files)

    def _unknown(self, files: Files) -> tuple[bool, str]:
        if not self.workspace.owns_all:
            return False, "no run here knows it; another tracking store may"
        if self.now - files.newest < SETTLED_AFTER_S:
            return False, "no run knows it, but it was written within the last hour"
        return True, "no run knows it"

    def _of_flows(self) -> Iterator[tuple[bool, Item]]:
        for run_id, files in self.files.logs.items():
            if run_id in self.kept_flows:
                goes, reason = False, f"{self.kept_flows[run_id].text} stays"
            else:
                goes, reason = (True, self.gone[run_id].text) if run_id in self.gone else self._unknown(files)
            yield goes, Item(kind="logs", name=run_id, num_bytes=files.num_bytes, reason=reason)
        if self.workspace.owns_store:
            for run_id in self.gone.keys() & self.files.pages.keys():
                for name, num_bytes in self.files.pages[run_id].items():
                    reason = self.gone[run_id].text
                    yield True, Item(kind="page", name=f"{run_id}/{name}", num_bytes=num_bytes, reason=reason)

    def _models(self) -> Iterator[tuple[bool, Item]]:
        ids = {location: model_id for model_id, location in self.store.models.items()}
        for version in self.store.versions:
            reason = self.versions[version.uri]
            num_bytes = self.files.models.get(ids.get(version.source, ""), Files()).num_bytes
            why = reason or "no alias, no rollback and no run needs it"
            yield reason is None, Item(kind="version", name=version.uri, num_bytes=num_bytes, reason=why)
        sources = {version.source for version in self.store.versions}
        for model_id, location in self.store.models.items():
            files = self.files.models.get(model_id)
            if location not in sources and files is not None:
                goes = model_id not in self.store.being_registered
                reason = "no version is made of it" if goes else "it may be on its way to be registered"
                yield goes, Item(kind="model files", name=model_id, num_bytes=files.num_bytes, reason=reason)
        if self.workspace.owns_store:
            for model_id in self.files.models.keys() - self.store.models.keys():
                num_bytes = self.files.models[model_id].num_bytes
                yield True, Item(kind="model files", name=model_id, num_bytes=num_bytes, reason="deleted in MLflow")

    def _artifacts(self) -> Iterator[tuple[bool, Item]]:
        if not self.workspace.owns_store:
            return
        pages = {run_id: sum(pages.values()) for run_id, pages in self.files.pages.items() if run_id in self.gone}
        deleted = set(self.store.deleted_runs)
        for run_id, files in self.files.artifacts.items():
            num_bytes = files.num_bytes - pages.get(run_id, 0)
            if run_id in deleted:
                yield True, Item(kind="deleted runs", name=run_id, num_bytes=num_bytes, reason="deleted in MLflow")
            else:
                yield False, Item(kind="artifacts", name=run_id, num_bytes=num_bytes, reason="history of its run")
        for run_id in deleted - self.files.artifacts.keys():
            yield True, Item(kind="deleted runs", name=run_id, num_bytes=0, reason="deleted in MLflow")

    def _rest(self) -> Iterator[tuple[bool, Item]]:
        for path, (key, files) in self.files.partial.items():
            if path.startswith(TRASH):
                goes, reason = True, "an earlier clean was broken off"
            elif key in self.at_work:
                goes, reason = False, "a run is at work on it"
            elif self.now - files.newest < SETTLED_AFTER_S:
                goes, reason = False, "it was written within the last hour"
            else:
                goes, reason = True, "left by a process that was killed"
            yield goes, Item(kind="leftover", name=path, num_bytes=files.num_bytes, reason=reason)
        for name, files in self.files.other.items():
            own = name in (*LASTING, ARTIFACTS)
            reason = "needed to find all else" if own else "not of segvit's making"
            yield False, Item(kind="other", name=name, num_bytes=files.num_bytes, reason=reason)

    def _losses(self) -> Iterator[str]:
        for name, former in self.store.former_champions.items():
            lost = [number for number in former if self.versions.get(f"models:/{name}/{number}", "") is None]
            if lost:
                numbers = ", ".join(map(str, lost))
                yield f"a rollback of {name} cannot go back to version {numbers} any more"
