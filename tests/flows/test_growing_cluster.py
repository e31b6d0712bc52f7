"""A head without CPU and GPU for work: the nodes of a flow come for it, may be reclaimed, and go when it has ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.workflow.tracking import Tracking
from tests.faults.fake_cluster import FakeCluster, kill
from tests.faults.kill_flow import EXPERIMENT, Flow

pytestmark = pytest.mark.timeout(1200)
# A trial trains in its own process, so that a GPU in name only will do.
SEARCH = {name: section for name, section in EXPERIMENT.items() if name != "promote"} | {
    "recipe": "search",
    # More would ask for more CPUs than the nodes without GPU have, and find the other one up when it needs a GPU.
    "runtime": EXPERIMENT["runtime"] | {"prepare_tasks": 1},
}
FLOW_LIMIT_S = 900.0
IDLE_MINUTES = 0.2


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path / "cluster", idle_minutes=IDLE_MINUTES) as cluster:
        yield cluster


def wait_until(true: Callable[[], bool], what: str, limit_s: float = 300.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"in vain waited until {what}"
        time.sleep(0.2)


def gpu_nodes(cluster: FakeCluster) -> list[str]:
    return [node for node in cluster.nodes() if cluster.node_type(node) == "gpu"]


def test_flows__two_at_once_make_a_gpu_node_come_lose_it_and_end_well(cluster: FakeCluster, tmp_path: Path) -> None:
    config = tmp_path / "search.yaml"
    config.write_text(yaml.safe_dump(SEARCH))
    assert "use_gpu" not in SEARCH["runtime"]
    assert cluster.nodes() == {}
    flows = [Flow(config, tmp_path / name, cluster.access) for name in ("first", "second")]
    assert all(flow.wait_for("tune") for flow in flows)
    wait_until(lambda: gpu_nodes(cluster) != [], "a GPU node came")
    taken = gpu_nodes(cluster)
    wait_until(lambda: any("trial" in line for flow in flows for line in flow.lines), "a trial had begun")
    kill([process for node in taken for process in cluster.nodes().get(node, [])])
    for flow, name in zip(flows, ("first", "second"), strict=True):
        assert flow.wait_for_end(FLOW_LIMIT_S) == 0, flow.tail()
        steps = Tracking.for_workspace(str(tmp_path / name)).runs("tags.`segvit.done` != ''")
        assert sorted(run.data.tags["segvit.label"] for run in steps) == ["fetch_backbone", "prepare", "report", "tune"]
        trials = json.loads(next((tmp_path / name / "tune").glob("*/trials.json")).read_text())
        assert len(trials) == SEARCH["tune"]["num_trials"]
        assert all(trial["miou"] > 0 for trial in trials), trials
    assert set(gpu_nodes(cluster)) != set(taken), "the node that was killed is no node any more"
    wait_until(lambda: cluster.nodes() == {}, "idle nodes had gone")
