"""What the pods have in common: who they run as, what they may write, what they know."""

from __future__ import annotations

from typing import Any

from flows.cluster.kinds import Spot
from flows.cluster.options import SHARED, KubernetesOptions, Size

Manifest = dict[str, Any]

USER_ID = 1000  # the Dockerfile's user
MLFLOW_PORT = 5000
_HOME = "/home/segvit"
# Where the in-tree autoscaler looks for the account that may change the cluster's size.
_ACCOUNT_MOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_ACCOUNT_TOKEN_S = 3607

CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# Asked by both of the autoscalers of nodes that are widespread: no busy pod is moved to save a machine.
STAY = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
_SPOT_LABELS = {
    Spot.GKE: ("cloud.google.com/gke-spot", "true"),
    Spot.EKS: ("eks.amazonaws.com/capacityType", "SPOT"),
    Spot.KARPENTER: ("karpenter.sh/capacity-type", "spot"),
    Spot.AKS: ("kubernetes.azure.com/scalesetpriority", "spot"),
}


def labels(options: KubernetesOptions, component: str) -> dict[str, str]:
    """Labels of one part; the operator puts its own under other keys, and selects by `app.kubernetes.io/name`."""
    return {"app.kubernetes.io/part-of": options.name, "app.kubernetes.io/component": component}


def cluster_labels(options: KubernetesOptions, cluster: str, component: str) -> dict[str, str]:
    """Labels of a pod of one of the Ray clusters, which share all else that has the installation's name."""
    return {**labels(options, component), "app.kubernetes.io/instance": cluster}


def metadata(options: KubernetesOptions, name: str, component: str) -> Manifest:
    """Name, namespace and labels of an object."""
    return {"name": name, "namespace": options.namespace, "labels": labels(options, component)}


def claim_name(options: KubernetesOptions) -> str:
    """The volume claim of the shared storage."""
    return options.claim or f"{options.name}-storage"


def mlflow_name(options: KubernetesOptions) -> str:
    """The tracking server's service, deployment and claim."""
    return f"{options.name}-mlflow"


def token_secret(options: KubernetesOptions) -> str:
    """The secret with Ray's token under the key `auth_token`; made by hand, never part of a manifest."""
    return f"{options.name}-ray-token"


def pod_security() -> Manifest:
    """As the restricted pod security standard demands it; files on volumes belong to the image's user."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def resources(size: Size, gpus: int = 0) -> Manifest:
    """Requests equal to limits: Ray plans with what it has, and takes no more than was asked for."""
    amounts: Manifest = {"cpu": str(size.cpus), "memory": size.memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": dict(amounts), "limits": dict(amounts)}


def environment(options: KubernetesOptions) -> list[Manifest]:
    """Variables of every Ray pod, so that a driver and its workers find the same data and the same store."""
    variables = {
        "MLFLOW_TRACKING_URI": options.mlflow_uri or f"http://{mlflow_name(options)}:{MLFLOW_PORT}",
        "SEGVIT_DATA": f"{SHARED}/data",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return [{"name": name, "value": value} for name, value in variables.items()]


def volumes(options: KubernetesOptions) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes and their mounts: the shared storage, and the two places that a read-only image must let be written."""
    found = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": claim_name(options)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
    ]
    places = {"storage": SHARED, "tmp": "/tmp", "home": _HOME}
    return found, [{"name": name, "mountPath": place} for name, place in places.items()]


def account_volume() -> tuple[Manifest, Manifest]:
    """The service account's credentials, and where the autoscaler's container alone mounts them."""
    sources: list[Manifest] = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": _ACCOUNT_TOKEN_S}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
    ]
    volume = {"name": "account", "projected": {"sources": sources}}
    return volume, {"name": "account", "mountPath": _ACCOUNT_MOUNT, "readOnly": True}


def placement(options: KubernetesOptions, *, gpu: bool) -> Manifest:
    """Node labels and tolerations of a worker group; empty where any node will do."""
    selector = dict(options.gpu_labels) if gpu else {}
    tolerations: list[Manifest] = []
    if gpu:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if options.spot is not None:
        key, value = _SPOT_LABELS[options.spot]
        selector[key] = value
        tolerations.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    found: Manifest = {}
    if selector:
        found["nodeSelector"] = selector
    if tolerations:
        found["tolerations"] = tolerations
    return found
