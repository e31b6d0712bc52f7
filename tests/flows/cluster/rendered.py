"""What the command renders, and what the tests ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.flows.cluster import kuberay_fields

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "flows" / "configs" / "quickstart.yaml"
IMAGE = "registry.example.org/segvit:0.1.0"
# Everything that changes what is rendered.
FULL = ("--spot", "gke", "--gpu-selector", "cloud.google.com/gke-accelerator=nvidia-l4", "--gpus-per-worker", "4")
VARIANTS: dict[str, tuple[str, ...]] = {
    "kuberay": ("--kind", "kuberay", "--image", IMAGE),
    "kuberay, all": (
        "--kind",
        "kuberay",
        "--image",
        IMAGE,
        *FULL,
        "--redis",
        "redis.db:6379",
        "--storage-class",
        "efs",
    ),
    "kuberay, outside": (
        "--kind",
        "kuberay",
        "--image",
        IMAGE,
        "--claim",
        "team",
        "--mlflow-uri",
        "https://m.example.org",
    ),
    "kuberay, cpu": ("--kind", "kuberay", "--image", IMAGE, "--gpu-workers", "0", "--cpu-worker-size", "6x20Gi"),
    "rayjob": ("--kind", "rayjob", "--image", IMAGE, str(CONFIG)),
}
Document = dict[str, Any]
Render = Callable[..., list[Document]]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [one for one in documents if one["kind"] == kind]


def cluster_spec(documents: list[Document]) -> Document:
    """The one Ray cluster's, whatever it lies in."""
    [found] = [one for one in documents if one["kind"] in kuberay_fields.SPECS]
    spec: Document = found["spec"]
    return spec if found["kind"] == "RayCluster" else spec["rayClusterSpec"]


def templates(documents: list[Document]) -> dict[str, Document]:
    """Every pod template by its part."""
    spec = cluster_spec(documents)
    found = {"head": spec["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return found | {one["metadata"]["name"]: one["spec"]["template"] for one in of_kind(documents, "Deployment")}


def walk(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """A label selector, evaluated as Kubernetes does."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "In"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return True


def reaches(documents: list[Document], source: dict[str, str], space: str, target: dict[str, str], port: int) -> bool:
    """Whether policies let a pod of `source`'s labels in namespace `space` open a port of a pod of `target`'s."""
    policies = [one for one in of_kind(documents, "NetworkPolicy") if selects(one["spec"]["podSelector"], target)]
    if not policies:
        return True
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        for rule in policy["spec"]["ingress"]:
            if "ports" in rule and port not in {one["port"] for one in rule["ports"]}:
                continue
            for peer in rule["from"]:
                spaces = peer.get("namespaceSelector")
                there = (
                    selects(spaces, {"kubernetes.io/metadata.name": space})
                    if spaces is not None
                    else space == policy["metadata"]["namespace"]
                )
                if there and selects(peer.get("podSelector", {}), source):
                    return True
    return False
