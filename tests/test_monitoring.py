"""The dashboard and its page name metrics that exist, and all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import exported_metrics
from pipeline.exported_metrics import ALL
from pipeline.workflow.exported import Metric

DOCS = Path(__file__).parents[1] / "docs"
SERIES = {metric.series: metric for metric in ALL}
# Ray's own, of each node with GPUs.
RAYS = {"ray_node_gpus_utilization": {"instance", "GpuIndex"}}


def queries() -> Iterator[str]:
    dashboard: dict[str, Any] = json.loads((DOCS / "grafana_dashboard.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def test_metrics__each_has_one_name_and_is_listed() -> None:
    declared = [one for one in vars(exported_metrics).values() if isinstance(one, Metric)]
    assert set(declared) <= set(ALL)
    assert len(SERIES) == len(ALL)
    # A gauge that ends like a counter would be taken for one.
    assert not [one.name for one in ALL if one.name.endswith(("_total", "_sum", "_count", "_bucket"))]
    assert all(one.name.startswith("segvit_") and one.description.endswith(".") for one in ALL)


def test_dashboard__asks_for_metrics_that_exist_and_for_all() -> None:
    asked = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert asked - set(RAYS) == set(SERIES)
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert {name.removeprefix("ray_") for name in RAYS} <= set(METRICS_GAUGES)


def test_dashboard__groups_by_labels_that_the_metrics_have() -> None:
    grouped = re.compile(r"(?:max|sum) by \(([\w, ]+)\) \((ray_\w+)")
    found = [match for query in queries() for match in grouped.findall(query)]
    assert len(found) >= len(ALL)
    for labels, series in found:
        known = set(SERIES[series].tags) if series in SERIES else RAYS[series]
        assert set(labels.split(", ")) <= known, series


def test_page__explains_every_metric() -> None:
    page = (DOCS / "monitoring.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `ray_segvit_")]
    explained: dict[str, set[str]] = {}
    for row in rows:
        _, names, labels, *_ = row.split("|")
        explained |= {name: set(re.findall(r"`(\w+)`", labels)) for name in re.findall(r"`(\w+)`", names)}
    assert explained == {series: set(metric.tags) - {"flow", "run", "step"} for series, metric in SERIES.items()}
