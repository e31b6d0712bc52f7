"""Stand-ins that note what they are told."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.workflow.exported import Metric
from pipeline.workflow.progress import Progress


class Told:
    """Stands for a StepProgress."""

    label = "step/one"

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self.exported: list[tuple[Metric, float, dict[str, str]]] = []

    def tell(self, progress: Progress) -> None:
        self.progress.append(progress)

    def export(self, metric: Metric, value: float, tags: Mapping[str, str] | None = None) -> None:
        self.exported.append((metric, value, dict(tags or {})))
