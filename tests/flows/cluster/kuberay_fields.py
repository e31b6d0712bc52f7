"""The fields of KubeRay's resources that rendered manifests may use, as its API reference gives them (1.6 and 1.7).

A field that is not here is refused, as the API server would drop it without a word. Pod templates are Kubernetes' own
and checked by its schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_KUBERNETES: Schema = {"type": "object"}
_CREDENTIAL: Schema = {
    "type": "object",
    "properties": {"valueFrom": _KUBERNETES, "value": _TEXT},
    "additionalProperties": False,
}
_GROUP: Schema = {"rayStartParams": _TEXTS, "template": _KUBERNETES, "resources": _TEXTS, "labels": _TEXTS}


def _object(required: tuple[str, ...], properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": _object((), {"mode": {"enum": ["disabled", "token"]}, "secretName": _TEXT}),
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": _object(
            (),
            {
                "version": {"enum": ["v1", "v2"]},
                "idleTimeoutSeconds": _COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "image": _TEXT,
                "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
                "resources": _KUBERNETES,
                "securityContext": _KUBERNETES,
                "env": {"type": "array"},
                "envFrom": {"type": "array"},
                "volumeMounts": {"type": "array"},
            },
        ),
        "gcsFaultToleranceOptions": _object(
            (),
            {
                "redisAddress": _TEXT,
                "redisUsername": _CREDENTIAL,
                "redisPassword": _CREDENTIAL,
                "externalStorageNamespace": _TEXT,
            },
        ),
        "headServiceAnnotations": _TEXTS,
        "headGroupSpec": _object(
            ("template",),
            {
                **_GROUP,
                "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                "headService": _KUBERNETES,
                "enableIngress": {"type": "boolean"},
            },
        ),
        "workerGroupSpecs": {
            "type": "array",
            "items": _object(
                ("groupName", "minReplicas", "maxReplicas", "template"),
                {
                    **_GROUP,
                    "groupName": _TEXT,
                    "replicas": _COUNT,
                    "minReplicas": _COUNT,
                    "maxReplicas": _COUNT,
                    "numOfHosts": _COUNT,
                    "idleTimeoutSeconds": _COUNT,
                    "suspend": {"type": "boolean"},
                },
            ),
        },
    },
)
JOB_SPEC = _object(
    ("rayClusterSpec", "entrypoint"),
    {
        "entrypoint": _TEXT,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "runtimeEnvYAML": _TEXT,
        "jobId": _TEXT,
        "metadata": _TEXTS,
        "backoffLimit": _COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": _COUNT,
        "entrypointNumCpus": {"type": "number"},
        "entrypointNumGpus": {"type": "number"},
        "entrypointResources": _TEXT,
        "suspend": {"type": "boolean"},
        "rayClusterSpec": CLUSTER_SPEC,
    },
)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}


def document(kind: str) -> Schema:
    """The schema of a whole object."""
    properties = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": _KUBERNETES}
    return _object(("apiVersion", "kind", "metadata", "spec"), {**properties, "spec": SPECS[kind]})


def closed(schema: Any) -> Any:
    """A resource definition's schema as one that refuses what it does not name, which the API server only drops.

    Its own extensions become JSON schema: amounts are texts or whole numbers.
    """
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-embedded-resource"):
            found["additionalProperties"] = True
    return found
