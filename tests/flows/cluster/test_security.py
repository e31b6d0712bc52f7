"""Who may reach, write and change what in a rendered cluster."""

from __future__ import annotations

from tests.flows.cluster.rendered import VARIANTS, Document, Render, cluster_spec, of_kind, reaches, templates, walk


def test_pods__are_as_the_restricted_standard_demands(documents: list[Document]) -> None:
    for name, template in templates(documents).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"persistentVolumeClaim", "emptyDir", "projected", "configMap"}, name
        contexts = [container["securityContext"] for container in pod["containers"]]
        contexts.append(cluster_spec(documents)["autoscalerOptions"]["securityContext"])
        for context in contexts:
            assert context == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
        assert not any("hostPort" in one for one in walk(pod) if isinstance(one, dict)), name


def test_account__only_the_autoscaler_may_change_the_cluster(documents: list[Document]) -> None:
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    from ray.autoscaler._private.kuberay import node_provider

    assert f"{place}/token" == node_provider.IN_CLUSTER_TOKEN_PATH
    assert f"{place}/ca.crt" == node_provider.IN_CLUSTER_CA_CERT_PATH
    mounts = cluster_spec(documents)["autoscalerOptions"]["volumeMounts"]
    assert {"name": "account", "mountPath": place, "readOnly": True} in mounts
    for template in templates(documents).values():
        assert template["spec"]["automountServiceAccountToken"] is False
        for container in template["spec"]["containers"]:
            assert "account" not in {mount["name"] for mount in container["volumeMounts"]}
    [account] = [one for one in templates(documents)["head"]["spec"]["volumes"] if one["name"] == "account"]
    assert [path for one in walk(account) if isinstance(one, dict) and (path := one.get("path"))] == ["token", "ca.crt"]


def test_token__is_asked_for_and_in_no_manifest(documents: list[Document]) -> None:
    assert cluster_spec(documents)["authOptions"] == {"mode": "token", "secretName": "segvit-ray-token"}
    assert of_kind(documents, "Secret") == []
    names = {one["name"] for one in walk(documents) if isinstance(one, dict) and "value" in one and "name" in one}
    assert names == {"MLFLOW_TRACKING_URI", "SEGVIT_DATA", "RAY_USAGE_STATS_ENABLED"}


def test_network__nothing_reaches_the_pods_but_one_another_and_the_operator(documents: list[Document]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in templates(documents).items()}
    ray = {name: found for name, found in labels.items() if not name.endswith("mlflow")}
    stranger = {"app": "web"}
    for target in labels.values():
        for port in (5000, 6379, 8265, 10001, 52365):
            assert not reaches(documents, stranger, "segvit", target, port)
            assert not reaches(documents, stranger, "elsewhere", target, port)
            # The same labels in another namespace open nothing.
            assert not reaches(documents, ray["head"], "elsewhere", target, port)
    for source in ray.values():
        for target in ray.values():
            assert all(reaches(documents, source, "segvit", target, port) for port in (6379, 8265, 43210))
    operator = {"app.kubernetes.io/component": "kuberay-operator"}
    assert reaches(documents, operator, "kuberay-operator", ray["head"], 8265)
    assert not reaches(documents, operator, "kuberay-operator", ray["head"], 6379)
    for name in ray.keys() - {"head"}:
        assert not reaches(documents, operator, "kuberay-operator", ray[name], 8265)
    if "segvit-mlflow" in labels:
        for source in ray.values():
            assert reaches(documents, source, "segvit", labels["segvit-mlflow"], 5000)
            assert not reaches(documents, source, "segvit", labels["segvit-mlflow"], 22)
        assert not reaches(documents, labels["segvit-mlflow"], "segvit", ray["head"], 8265)


def test_network__no_address_of_the_outside_world(documents: list[Document]) -> None:
    assert cluster_spec(documents)["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert {one["spec"]["type"] for one in of_kind(documents, "Service")} <= {"ClusterIP"}
    assert not {one["kind"] for one in documents} & {"Ingress", "Route", "Gateway"}


def test_operator_namespace__is_the_one_that_reaches_the_dashboard(render: Render) -> None:
    documents = render(
        *VARIANTS["kuberay"], "--operator-namespace", "ray-system", "--namespace", "team-a", "--name", "b"
    )
    assert {one["metadata"]["namespace"] for one in documents} == {"team-a"}
    head = templates(documents)["head"]["metadata"]["labels"]
    assert reaches(documents, {}, "ray-system", head, 8265)
    assert not reaches(documents, {}, "kuberay-operator", head, 8265)
    assert all(one["metadata"]["name"].startswith("b") for one in documents)


def test_labels__leave_the_operators_own_alone(documents: list[Document]) -> None:
    # The operator's services select by these.
    for template in templates(documents).values():
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & template["metadata"]["labels"].keys()
        assert not [key for key in template["metadata"]["labels"] if key.startswith("ray.io/")]
