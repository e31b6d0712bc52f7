"""The logs of a run's steps, read as they grow."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.workflow.runs import RunTree, StepSummary, run_tree
from pipeline.workflow.step_log import LOG_ARTIFACT, log_uri, read_log
from pipeline.workflow.tracking import RunState, Tag, Tracking

_WITHOUT_LOG = (RunState.WAITING, RunState.SKIPPED)


class RunLogs:
    """What the steps of one run have printed.

    Args:
        tracking: the store that knows the run.
        run_id: as for `pipeline.workflow.runs.find_run`.
        step: the label of the one to show; None: all.

    Raises UserError for a run or a step that does not exist.
    """

    def __init__(self, tracking: Tracking, run_id: str, step: str | None = None) -> None:
        self._tracking = tracking
        tree = run_tree(tracking, run_id)
        # "latest" is another run soon.
        self._run_id = tree.run.run_id
        self._step = step
        self._shown: dict[str, str] = {}
        self._tree = tree
        labels = [one.label for one in tree.steps]
        if step is not None and step not in labels:
            known = f"choose from {', '.join(labels)}" if labels else "it has none yet"
            raise UserError(f"run {self._run_id[:12]} has no step {step!r}; {known}")

    @property
    def is_single(self) -> bool:
        """Whether only one step is shown."""
        return self._step is not None

    def is_running(self) -> bool:
        """Whether more may come; looks anew."""
        self._tree = run_tree(self._tracking, self._run_id)
        return self._tree.run.state == RunState.RUNNING

    def new_lines(self) -> Iterator[tuple[str, list[str]]]:
        """Whole lines that have come since the last call, step by step in the flow's order."""
        for step in self._steps(self._tree):
            if step.state in _WITHOUT_LOG:
                continue
            text = self._text(step)
            whole = text[: text.rfind("\n") + 1]
            shown = self._shown.get(step.label, "")
            new = whole.removeprefix(shown) if whole.startswith(shown) else _after(whole, shown)
            self._shown[step.label] = whole
            if new:
                yield step.label, new.splitlines()

    def notes(self) -> Iterator[tuple[str, str]]:
        """Why steps that were to be shown have no log."""
        for step in self._steps(self._tree):
            if self._shown.get(step.label):
                continue
            if step.state == RunState.REUSED and step.reused_from:
                origin = self._tracking.client().get_run(step.reused_from).data.tags
                flow, label = origin.get(Tag.PARENT, ""), origin.get(Tag.LABEL, step.label)
                yield step.label, f"reused from another run; see segvit logs {flow[:12]} --step {label}"
            else:
                yield step.label, f"{step.state.value}, no log is kept"

    def _steps(self, tree: RunTree) -> list[StepSummary]:
        return [one for one in tree.steps if self._step in (None, one.label)]

    def _text(self, step: StepSummary) -> str:
        text = read_log(log_uri(self._tree.run.workspace, self._run_id, step.label)) if self._tree.run.workspace else ""
        if not text and step.run_id is not None and step.state not in (RunState.RUNNING, RunState.REUSED):
            # The workspace is out of reach, or was cleaned.
            text = self._tracking.read_text(step.run_id, LOG_ARTIFACT) or ""
        return text


def _after(text: str, shown: str) -> str:
    """What of `text` comes after the last line that was shown: its beginning was dropped meanwhile."""
    last = shown.rstrip("\n").rpartition("\n")[2]
    return text.rpartition(f"{last}\n")[2] if last else text
