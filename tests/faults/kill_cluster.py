"""kill -9 of head services, nodes and jobs of a growing cluster at random instants of whole flows.

    python -m tests.faults.kill_cluster [--kills 60] [--seed 0] [--keep DIR]

The flow of tests.faults.kill_flow runs on a cluster of Ray's fake multi-node provider (tests.faults.fake_cluster)
whose head has no CPU for work: the nodes for its steps come when they are asked for. One thing is killed at a random
instant of each step: a node with all that runs on it, as a provider reclaims it; a service of the head, which is then
started again; or the flow's driver. A flow that lost a node must end well by itself; one that lost its head or its
driver must, when the same command is given again. At last each step must have been finished once, and the registry
and the published files be those of an undisturbed flow.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from tests.faults.fake_cluster import HEAD_SERVICES, FakeCluster, kill
from tests.faults.kill_flow import (
    EXPERIMENT,
    FLOW_LIMIT_S,
    STEPS,
    Flow,
    check_alike,
    check_executed_once,
    check_visible,
    last_cause,
    published,
    registry_state,
)

ON_CPUS = EXPERIMENT | {"runtime": EXPERIMENT["runtime"] | {"use_gpu": False}}
NODE, JOB = "node", "job"
KINDS = (*HEAD_SERVICES, NODE, JOB)
# A driver whose control service is dead waits for it a minute, and the head is back before.
DRIVER = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
NODE_LIMIT_S = 60.0


class Disturbance:
    """Flows on one cluster, and what is killed in them."""

    def __init__(self, cluster: FakeCluster, config: Path, rng: random.Random) -> None:
        self.cluster = cluster
        self.config = config
        self.counts: Counter[str] = Counter()
        self._rng = rng

    def start(self, workspace: Path) -> Flow:
        """The flow's command, given on a cluster whose head is up."""
        if not self.cluster.is_up:
            self.cluster.restart_head(keep_nodes=False)
        return Flow(self.config, workspace, self.cluster.access | DRIVER)

    def undisturbed(self, workspace: Path) -> dict[str, float]:
        """Seconds of each step."""
        flow = self.start(workspace)
        if flow.wait_for_end(FLOW_LIMIT_S):
            raise SystemExit(f"the undisturbed flow failed:\n{flow.tail()}")
        return {
            label: flow.moments[f"{label} done"] - flow.moments.get(f"{label} running", flow.started) for label in STEPS
        }

    def disturb(self, workspace: Path, targets: list[str], seconds: dict[str, float]) -> None:
        """One flow to its end, with a kill in each of the steps `targets`."""
        flow = self.start(workspace)
        nodes_alone = True
        for label in targets:
            if not flow.wait_for(label):
                flow = self._again(flow, workspace, nodes_alone)
                nodes_alone = True
                if not flow.wait_for(label):
                    raise SystemExit(f"the rerun ended before {label}:\n{flow.tail()}")
            moment = self._rng.uniform(0, seconds[label])
            time.sleep(moment)
            kind = self._kill(flow)
            if kind is None:
                continue
            nodes_alone &= kind == NODE
            print(f"kill {self.counts.total()}: {kind} in {label}, {moment:.1f} s after its start", flush=True)
            check_visible(workspace)
        while flow.wait_for_end(FLOW_LIMIT_S):
            flow = self._again(flow, workspace, nodes_alone)
            nodes_alone = True

    def _again(self, flow: Flow, workspace: Path, nodes_alone: bool) -> Flow:
        if flow.wait_for_end(FLOW_LIMIT_S) and nodes_alone:
            raise SystemExit(f"a flow that lost nothing but nodes failed: {last_cause(workspace)}\n{flow.tail()}")
        print(f"  again, since it ended with: {last_cause(workspace)}", flush=True)
        return self.start(workspace)

    def _kill(self, flow: Flow) -> str | None:
        """Kill what has been killed least; what it was, or None where the flow was quicker."""
        if flow.ended:
            return None
        kind = min(KINDS, key=lambda one: (self.counts[one], self._rng.random()))
        match kind:
            case "job":
                flow.kill("driver")
            case "node":
                deadline = time.monotonic() + NODE_LIMIT_S
                while not (nodes := self.cluster.nodes()):
                    # On the head alone there is nothing to reclaim.
                    if flow.ended or time.monotonic() > deadline:
                        return None
                    time.sleep(0.2)
                kill(nodes[self._rng.choice(sorted(nodes))])
            case service:
                kill(self.cluster.head_processes(service))
                self.cluster.restart_head(keep_nodes=False)
        self.counts[kind] += 1
        return kind


def main() -> None:
    """Disturb flows until there were `--kills` kills, and compare each with the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep the workspaces in this folder")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kc-")))
        cluster = stack.enter_context(FakeCluster(folder / "cluster"))
        config, reference = folder / "kills.yaml", folder / "reference"
        config.write_text(yaml.safe_dump(ON_CPUS))
        run = Disturbance(cluster, config, rng)
        begun = time.monotonic()
        seconds = run.undisturbed(reference)
        check_visible(reference)
        check_executed_once(reference)
        expected, files = registry_state(reference), published(reference)
        print(f"undisturbed, on nodes that came for it: {time.monotonic() - begun:.0f} s", flush=True)
        flows = 0
        while run.counts.total() < options.kills:
            left = options.kills - run.counts.total()
            targets = sorted(rng.sample(STEPS, min(left, len(STEPS))), key=STEPS.index)
            workspace = folder / f"workspace-{flows}"
            run.disturb(workspace, targets, seconds)
            flows += 1
            check_alike(workspace, expected, files)
            print(f"flow {flows}: completed, the same registry and files, every step finished once", flush=True)
            if options.keep is None:
                shutil.rmtree(workspace)
    print(", ".join(f"{kind} {count}" for kind, count in run.counts.most_common()))
    print(f"{run.counts.total()} kills in {flows} flows on a growing cluster, every flow ended, nothing twice")


if __name__ == "__main__":
    main()
