"""What a Ray cluster needs beside it: storage that all pods share, a tracking server, who may reach whom."""

from __future__ import annotations

from flows.cluster import pods
from flows.cluster.options import SHARED, KubernetesOptions, Size
from flows.cluster.pods import MLFLOW_PORT, Manifest
from flows.cluster.ray import DASHBOARD_PORT

_MLFLOW_SIZE = Size(cpus=2, memory="4Gi")
_DATABASE = "/var/lib/mlflow"
_DATABASE_SIZE = "20Gi"


def storage(options: KubernetesOptions) -> list[Manifest]:
    """The claim for data, workspace and artifacts; none where one exists."""
    if options.claim is not None:
        return []
    return [_claim(options, pods.claim_name(options), "ReadWriteMany", options.storage_size, "storage")]


def mlflow(options: KubernetesOptions) -> list[Manifest]:
    """A tracking server that the Ray pods reach by its service; none where one exists.

    Its sqlite file has a volume of its own: locks of shared file systems are not to be trusted.
    """
    if options.mlflow_uri is not None:
        return []
    name = pods.mlflow_name(options)
    ports = [{"name": "http", "port": MLFLOW_PORT, "targetPort": "http"}]
    selector = pods.labels(options, "mlflow")
    return [
        _claim(options, name, "ReadWriteOnce", _DATABASE_SIZE, "mlflow"),
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": pods.metadata(options, name, "mlflow"),
            "spec": {
                "replicas": 1,
                # Two servers must not open the file at the same time.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": selector},
                "template": {"metadata": {"labels": selector}, "spec": _mlflow_pod(options, name)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": pods.metadata(options, name, "mlflow"),
            "spec": {"type": "ClusterIP", "selector": selector, "ports": ports},
        },
    ]


def network(options: KubernetesOptions) -> list[Manifest]:
    """Nothing reaches a pod but what is listed here; `kubectl port-forward` goes by the API server and needs no entry.

    Ray's pods reach one another; the operator the head's dashboard, for the state of jobs; Ray's pods the tracking
    server.
    """
    part = {"app.kubernetes.io/part-of": options.name}
    ray = {
        "matchLabels": part,
        "matchExpressions": [
            {"key": "app.kubernetes.io/component", "operator": "In", "values": ["head", "worker"]},
        ],
    }
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": options.operator_namespace}}}
    found = [
        _policy(options, "deny-ingress", {"matchLabels": part}, []),
        _policy(options, "ray", ray, [{"from": [{"podSelector": ray}]}]),
        _policy(
            options,
            "operator",
            {"matchLabels": pods.labels(options, "head")},
            [{"from": [operator], "ports": [{"protocol": "TCP", "port": DASHBOARD_PORT}]}],
        ),
    ]
    if options.mlflow_uri is None:
        rule = {"from": [{"podSelector": ray}], "ports": [{"protocol": "TCP", "port": MLFLOW_PORT}]}
        found.append(_policy(options, "mlflow", {"matchLabels": pods.labels(options, "mlflow")}, [rule]))
    return found


def _mlflow_pod(options: KubernetesOptions, name: str) -> Manifest:
    found, mounts = pods.volumes(options)
    hosts = ",".join(f"{host}:*" for host in (name, "localhost", "127.0.0.1"))
    container = {
        "name": "mlflow",
        "image": options.image,
        "command": ["mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT)],
        "args": [
            "--backend-store-uri",
            f"sqlite:///{_DATABASE}/mlflow.db",
            "--artifacts-destination",
            f"{SHARED}/mlflow-artifacts",
            # It answers to the names it is known by, and to no page that a browser was led to.
            "--allowed-hosts",
            hosts,
        ],
        "ports": [{"name": "http", "containerPort": MLFLOW_PORT}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10},
        "livenessProbe": {
            "httpGet": {"path": "/health", "port": "http"},
            "initialDelaySeconds": 60,
            "periodSeconds": 30,
            "timeoutSeconds": 10,
        },
        "resources": pods.resources(_MLFLOW_SIZE),
        "securityContext": dict(pods.CONTAINER_SECURITY),
        "volumeMounts": [*mounts, {"name": "database", "mountPath": _DATABASE}],
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pods.pod_security(),
        "containers": [container],
        "volumes": [*found, {"name": "database", "persistentVolumeClaim": {"claimName": name}}],
    }


def _claim(options: KubernetesOptions, name: str, mode: str, size: str, component: str) -> Manifest:
    spec: Manifest = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    if options.storage_class is not None and mode == "ReadWriteMany":
        spec["storageClassName"] = options.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": pods.metadata(options, name, component),
        "spec": spec,
    }


def _policy(options: KubernetesOptions, name: str, selector: Manifest, ingress: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": pods.metadata(options, f"{options.name}-{name}", "network"),
        "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": ingress},
    }
