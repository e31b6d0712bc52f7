"""Does an experiment's runtime fit the cluster: what its nodes have, and whether it may grow."""

from __future__ import annotations

from typing import Any, NamedTuple

from flows.jobs.server import JobServer
from pipeline.config import RuntimeConfig

NODES = "/api/v0/nodes?detail=1&limit=10000"
STATUS = "/api/cluster_status"


class ClusterResources(NamedTuple):
    """What a cluster has.

    Attributes:
        nodes: (CPUs, GPUs) of each live node.
        is_fixed: whether nobody adds nodes; False also where that is not known.
    """

    nodes: tuple[tuple[float, float], ...]
    is_fixed: bool

    @property
    def num_cpus(self) -> float:
        """Of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def num_gpus(self) -> float:
        """Of all nodes."""
        return sum(gpus for _, gpus in self.nodes)

    def workers_that_fit(self, cpus: int, *, gpu: bool) -> int:
        """How many workers of that many CPUs, and a GPU each where wanted, the nodes have room for; none is split."""
        return sum(
            int(min(node_cpus // cpus, node_gpus) if gpu else node_cpus // cpus) for node_cpus, node_gpus in self.nodes
        )


def ask_resources(server: JobServer) -> ClusterResources | None:
    """What the dashboard tells of the cluster's nodes, None where it does not tell."""
    try:
        found = server.json(NODES)["data"]["result"]["result"]
        nodes = [node["resources_total"] for node in found if node["state"] == "ALIVE"]
        resources = tuple((float(node.get("CPU", 0)), float(node.get("GPU", 0))) for node in nodes)
        return ClusterResources(resources, _is_fixed(server.json(STATUS)))
    except (RuntimeError, ConnectionError, LookupError, TypeError, AttributeError, ValueError):
        return None


def cluster_findings(runtime: RuntimeConfig, resources: ClusterResources | None) -> tuple[list[str], list[str]]:
    """(problems, notes), a line each: what can never fit, and what fits only if the cluster grows."""
    if resources is None:
        return [], ["the cluster does not tell its resources; whether the experiment fits is seen when it runs"]
    lacks = _lacks(runtime, resources)
    if resources.is_fixed or lacks is None:
        return ([f"{lacks[0]}; {lacks[1]}"] if lacks else []), []
    return [], [f"{lacks[0]} as it is now; the job asks its autoscaler for more"]


def _lacks(runtime: RuntimeConfig, resources: ClusterResources) -> tuple[str, str] | None:
    """(what the cluster lacks, the remedy)."""
    if runtime.use_gpu and not resources.num_gpus:
        return "runtime.use_gpu is true, and the cluster has no GPU", "set it to false, or add nodes with GPUs"
    gpu = resources.num_gpus > 0 if runtime.use_gpu is None else runtime.use_gpu
    cpus, least = runtime.cpus_per_worker, runtime.min_workers
    fitting = resources.workers_that_fit(cpus, gpu=gpu)
    if fitting >= least:
        return None
    wanted = f"runtime.num_workers {least} x {'one GPU and ' if gpu else ''}runtime.cpus_per_worker {cpus}"
    has = f"{resources.num_cpus:.0f} CPUs and {resources.num_gpus:.0f} GPUs on {len(resources.nodes)} nodes"
    return f"{wanted} do not fit the cluster, whose {has} have room for {fitting}", "lower one of them, or add nodes"


def _is_fixed(status: Any) -> bool:
    """Whether the head only watches its nodes: it then makes up a type `node_ID` for each."""
    report = (status["data"]["clusterStatus"] or {}).get("autoscalerReport") or {}
    types = report.get("nodeTypeMapping") or {}
    return bool(types) and all(kind == f"node_{node}" for node, kind in types.items())
