"""The Ray cluster as KubeRay's custom resources: one that stays, or one that an experiment brings with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.metadata import version

from flows.cluster import pods
from flows.cluster.options import JobOptions, KubernetesOptions, Size
from flows.cluster.pods import Manifest

API_VERSION = "ray.io/v1"
DASHBOARD_PORT = 8265
_EXPERIMENT_FOLDER = "/etc/segvit"
_EXPERIMENT_FILE = "experiment.yaml"
_IDLE_S = 600
_RETRIES = 3
# Long enough to read the log of what just ended.
_KEEP_ENDED_S = 900


def ray_cluster(options: KubernetesOptions) -> list[Manifest]:
    """A cluster that stays, for jobs by `segvit submit`."""
    cluster = {
        "apiVersion": API_VERSION,
        "kind": "RayCluster",
        "metadata": pods.metadata(options, options.name, "ray"),
        "spec": _cluster_spec(options, options.name),
    }
    return [_keep_head(options, options.name), cluster]


def ray_job(options: JobOptions, name: str, text: str, overrides: Sequence[str]) -> list[Manifest]:
    """One `segvit run` of the experiment file's `text`, with a cluster that comes and goes with it.

    The operator itself hands the job in: no further pod needs the token. A retry has a new cluster and goes on in the
    workspace.
    """
    command = ["segvit", "run", f"{_EXPERIMENT_FOLDER}/{_EXPERIMENT_FILE}", "--workspace", options.workspace]
    command += [word for override in overrides for word in ("--set", override)]
    experiment = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": pods.metadata(options, f"{name}-experiment", "ray"),
        "data": {_EXPERIMENT_FILE: text},
    }
    job = {
        "apiVersion": API_VERSION,
        "kind": "RayJob",
        "metadata": pods.metadata(options, name, "ray"),
        "spec": {
            "entrypoint": shlex.join(command),
            "submissionMode": "HTTPMode",
            "backoffLimit": _RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEEP_ENDED_S,
            "rayClusterSpec": _cluster_spec(options, name, experiment=f"{name}-experiment"),
        },
    }
    return [experiment, _keep_head(options, name), job]


def _keep_head(options: KubernetesOptions, cluster: str) -> Manifest:
    """The head is not evicted for maintenance: the drivers of all jobs would go with it."""
    selector = {"matchLabels": pods.cluster_labels(options, cluster, "head")}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": pods.metadata(options, f"{cluster}-head", "head"),
        "spec": {"minAvailable": 1, "selector": selector},
    }


def _cluster_spec(options: KubernetesOptions, cluster: str, experiment: str | None = None) -> Manifest:
    """A head without GPU, worker groups from zero, and the autoscaler between them.

    `experiment`: the config map that the head mounts.
    """
    spec: Manifest = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token", "secretName": pods.token_secret(options)},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": _IDLE_S,
            "resources": pods.resources(Size(cpus=1, memory="1Gi")),
            "securityContext": dict(pods.CONTAINER_SECURITY),
            "volumeMounts": [
                pods.account_volume()[1],
                *(mount for mount in pods.volumes(options)[1] if mount["name"] != "storage"),
            ],
        },
    }
    if options.redis is not None:
        password = {"secretKeyRef": {"name": f"{options.name}-redis", "key": "password"}}
        spec["gcsFaultToleranceOptions"] = {"redisAddress": options.redis, "redisPassword": {"valueFrom": password}}
    spec["headGroupSpec"] = _head(options, cluster, experiment)
    groups = []
    if options.cpu_workers:
        groups.append(_workers(options, cluster, "cpu", options.cpu_workers, options.cpu_worker_size, 0))
    if options.gpu_workers:
        size, gpus = options.gpu_worker_size, options.gpus_per_worker
        groups.append(_workers(options, cluster, "gpu", options.gpu_workers, size, gpus))
    spec["workerGroupSpecs"] = groups
    return spec


def _head(options: KubernetesOptions, cluster: str, experiment: str | None) -> Manifest:
    template = _template(options, cluster, "head", options.head_size, 0)
    pod = template["spec"]
    pod["containers"][0]["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": DASHBOARD_PORT},
    ]
    pod["volumes"].append(pods.account_volume()[0])
    if experiment is not None:
        pod["volumes"].append({"name": "experiment", "configMap": {"name": experiment}})
        mount = {"name": "experiment", "mountPath": _EXPERIMENT_FOLDER, "readOnly": True}
        pod["containers"][0]["volumeMounts"].append(mount)
    return {
        "serviceType": "ClusterIP",
        # No CPU: a task that runs out of memory must not take the cluster's own services with it.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": template,
    }


def _workers(options: KubernetesOptions, cluster: str, group: str, most: int, size: Size, gpus: int) -> Manifest:
    template = _template(options, cluster, "worker", size, gpus)
    template["spec"] |= pods.placement(options, gpu=gpus > 0)
    return {
        "groupName": group,
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": template,
    }


def _template(options: KubernetesOptions, cluster: str, component: str, size: Size, gpus: int) -> Manifest:
    """A Ray pod; the operator adds command, probes, token and shared memory."""
    found, mounts = pods.volumes(options)
    container = {
        "name": f"ray-{component}",
        "image": options.image,
        "env": pods.environment(options),
        # Credentials of object stores and of the tracking server, where there are any.
        "envFrom": [{"secretRef": {"name": f"{options.name}-env", "optional": True}}],
        "resources": pods.resources(size, gpus),
        "securityContext": dict(pods.CONTAINER_SECURITY),
        "volumeMounts": mounts,
    }
    return {
        "metadata": {"labels": pods.cluster_labels(options, cluster, component), "annotations": dict(pods.STAY)},
        "spec": {
            # What a job runs has no business with the cluster's own interface.
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "securityContext": pods.pod_security(),
            "containers": [container],
            "volumes": found,
        },
    }
