"""What a rendered cluster is made of: groups, sizes, spot nodes, storage, MLflow, Redis, the job."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.flows.cluster.rendered import (
    CONFIG,
    VARIANTS,
    Document,
    Render,
    cluster_spec,
    of_kind,
    selects,
    templates,
    walk,
)


def test_cluster__head_has_no_gpu_and_workers_come_from_zero(documents: list[Document]) -> None:
    spec = cluster_spec(documents)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["rayVersion"] == version("ray")
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", "0")
        assert (int(gpus) > 0) == (group["groupName"] == "gpu")


def test_cluster__numbers_are_the_options(render: Render) -> None:
    sizes = ("--cpu-workers", "7", "--gpu-workers", "3", "--gpus-per-worker", "8", "--gpu-worker-size", "90x700Gi")
    groups = cluster_spec(render(*VARIANTS["kuberay"], *sizes))["workerGroupSpecs"]
    assert {group["groupName"]: group["maxReplicas"] for group in groups} == {"cpu": 7, "gpu": 3}
    wanted = {"cpu": "90", "memory": "700Gi", "nvidia.com/gpu": "8"}
    assert groups[1]["template"]["spec"]["containers"][0]["resources"] == {"requests": wanted, "limits": wanted}
    [only] = cluster_spec(render(*VARIANTS["kuberay, cpu"]))["workerGroupSpecs"]
    assert only["groupName"] == "cpu"
    assert only["template"]["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "6", "memory": "20Gi"}


def test_pods__get_what_they_ask_for_and_take_no_more(documents: list[Document]) -> None:
    asked = [one for one in walk(documents) if isinstance(one, dict) and "limits" in one]
    assert len(asked) == len(templates(documents)) + 1
    for one in asked:
        assert one["requests"] == one["limits"]
        assert one["limits"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize(
    ("spot", "label"),
    [
        ("gke", ("cloud.google.com/gke-spot", "true")),
        ("eks", ("eks.amazonaws.com/capacityType", "SPOT")),
        ("karpenter", ("karpenter.sh/capacity-type", "spot")),
        ("aks", ("kubernetes.azure.com/scalesetpriority", "spot")),
    ],
)
def test_spot__workers_go_there_and_the_head_does_not(render: Render, spot: str, label: tuple[str, str]) -> None:
    found = templates(render(*VARIANTS["kuberay"], "--spot", spot, "--gpu-selector", "gpu.example.org/kind=l4"))
    key, value = label
    toleration = {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert found["cpu"]["spec"]["nodeSelector"] == {key: value}
    assert found["cpu"]["spec"]["tolerations"] == [toleration]
    assert found["gpu"]["spec"]["nodeSelector"] == {"gpu.example.org/kind": "l4", key: value}
    assert found["gpu"]["spec"]["tolerations"] == [gpu, toleration]
    for part in ("head", "segvit-mlflow"):
        assert not {"nodeSelector", "tolerations"} & found[part]["spec"].keys()
    plain = templates(render(*VARIANTS["kuberay"]))
    assert not {"nodeSelector", "tolerations"} & plain["cpu"]["spec"].keys()
    assert plain["gpu"]["spec"]["tolerations"] == [gpu]


def test_pods__every_mount_has_its_volume_and_every_claim_is_made_or_named(render: Render) -> None:
    for variant, options in VARIANTS.items():
        documents = render(*options)
        made = {one["metadata"]["name"] for one in of_kind(documents, "PersistentVolumeClaim")}
        maps = {one["metadata"]["name"] for one in of_kind(documents, "ConfigMap")} | {"kube-root-ca.crt"}
        for template in templates(documents).values():
            volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
                places = [mount["mountPath"] for mount in container["volumeMounts"]]
                assert len(places) == len(set(places))
                # The image is read-only; these must be there to be written.
                assert {"/tmp", "/home/segvit", "/mnt/segvit"} <= set(places)
            named = {one["claimName"] for one in walk(template) if isinstance(one, dict) and "claimName" in one}
            assert named <= made | ({"team"} if variant == "kuberay, outside" else set())
            assert {
                one["configMap"]["name"] for one in walk(template) if isinstance(one, dict) and "configMap" in one
            } <= maps
        sidecar = {mount["name"] for mount in cluster_spec(documents)["autoscalerOptions"]["volumeMounts"]}
        assert sidecar <= {volume["name"] for volume in templates(documents)["head"]["spec"]["volumes"]}
        shared = next((one for one in of_kind(documents, "PersistentVolumeClaim") if "storage" in str(one)), None)
        assert (shared is None) == (variant == "kuberay, outside")
        if shared is not None:
            assert shared["spec"]["accessModes"] == ["ReadWriteMany"]
            assert shared["spec"].get("storageClassName") == ("efs" if variant == "kuberay, all" else None)


def test_disruption__the_head_and_busy_workers_stay(documents: list[Document]) -> None:
    [budget] = of_kind(documents, "PodDisruptionBudget")
    found = templates(documents)
    assert budget["spec"]["minAvailable"] == 1
    chosen = [name for name, one in found.items() if selects(budget["spec"]["selector"], one["metadata"]["labels"])]
    assert chosen == ["head"]
    # Of this cluster alone: one head that is up does not excuse the eviction of another's.
    other = {**found["head"]["metadata"]["labels"], "app.kubernetes.io/instance": "other"}
    assert not selects(budget["spec"]["selector"], other)
    for name, template in found.items():
        if not name.endswith("mlflow"):
            assert template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_mlflow__answers_to_the_name_that_pods_call(render: Render) -> None:
    documents = render(*VARIANTS["kuberay"], "--name", "cams")
    [service], [deployment] = of_kind(documents, "Service"), of_kind(documents, "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    port = command[command.index("--port") + 1]
    assert [str(one["port"]) for one in service["spec"]["ports"]] == [port]
    assert selects({"matchLabels": service["spec"]["selector"]}, deployment["spec"]["template"]["metadata"]["labels"])
    hosts = command[command.index("--allowed-hosts") + 1].split(",")
    assert hosts == ["cams-mlflow:*", "localhost:*", "127.0.0.1:*"]
    address = f"http://{service['metadata']['name']}:{port}"
    for name, template in templates(documents).items():
        if not name.endswith("mlflow"):
            variables = {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}
            assert variables["MLFLOW_TRACKING_URI"] == address
    # One writer of the sqlite file, on a volume of its own.
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    database = command[command.index("--backend-store-uri") + 1].removeprefix("sqlite:///")
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "database"]
    assert Path(database).parent == Path(mount["mountPath"])


def test_outside__storage_and_mlflow_that_exist_are_used(render: Render) -> None:
    documents = render(*VARIANTS["kuberay, outside"])
    assert {one["kind"] for one in documents} == {"NetworkPolicy", "PodDisruptionBudget", "RayCluster"}
    for template in templates(documents).values():
        variables = {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}
        assert variables["MLFLOW_TRACKING_URI"] == "https://m.example.org"
        assert template["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "team"}


def test_redis__password_comes_from_a_secret(render: Render) -> None:
    assert cluster_spec(render(*VARIANTS["kuberay, all"]))["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis.db:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "segvit-redis", "key": "password"}}},
    }
    assert "gcsFaultToleranceOptions" not in cluster_spec(render(*VARIANTS["kuberay"]))


def test_rayjob__runs_the_experiment_that_it_carries(render: Render) -> None:
    awkward = "train.learning_rate=1.0e-4 # $(reboot); 'x"
    documents = render(*VARIANTS["rayjob"], "--set", awkward, "--workspace", "/mnt/segvit/my place")
    [job], [experiment] = of_kind(documents, "RayJob"), of_kind(documents, "ConfigMap")
    said = shlex.split(job["spec"]["entrypoint"])
    assert said == [
        *("segvit", "run", "/etc/segvit/experiment.yaml", "--workspace", "/mnt/segvit/my place", "--set", awkward)
    ]
    assert experiment["data"] == {"experiment.yaml": CONFIG.read_text(encoding="utf-8")}
    assert job["metadata"]["name"] == "segvit-quickstart"
    found = templates(documents)
    [volume] = [one for one in found["head"]["spec"]["volumes"] if "configMap" in one]
    assert volume["configMap"]["name"] == experiment["metadata"]["name"]
    [mount] = [one for one in found["head"]["spec"]["containers"][0]["volumeMounts"] if one["name"] == volume["name"]]
    assert (mount["mountPath"], mount["readOnly"]) == ("/etc/segvit", True)
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] == 3
