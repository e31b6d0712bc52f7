"""Rendered manifests against Kubernetes' own schemas and KubeRay's fields; the YAML itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.cluster.manifests import to_yaml
from tests.flows.cluster import kuberay_fields
from tests.flows.cluster.rendered import VARIANTS, Document, Render, cluster_spec, of_kind, templates

OLDEST, NEWEST = "1.29", "1.37"  # releases of Kubernetes that manifests are for


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
def test_manifests__kubernetes_schema_accepts_them(documents: list[Document], release: str) -> None:
    for one in documents:
        if one["kind"] not in kuberay_fields.SPECS:
            kubernetes_validate.validate(one, release, strict=True)
    for template in templates(documents).values():
        # A pod template within the operator's resource, as the object that Kubernetes has of it.
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(whole, release, strict=True)
    # The autoscaler's container is described in the operator's words, but of Kubernetes' parts.
    sidecar = cluster_spec(documents)["autoscalerOptions"]
    parts = {key: sidecar[key] for key in ("resources", "securityContext", "volumeMounts")}
    pod = {"containers": [{"name": "autoscaler", "image": "x", **parts}]}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}, release, strict=True
    )


def test_kubernetes_schema__refuses_a_misspelt_field(render: Render) -> None:
    [deployment] = of_kind(render(*VARIANTS["kuberay"]), "Deployment")
    deployment["spec"]["template"]["spec"]["securityContext"]["runAsNonRot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


def test_manifests__kuberay_has_every_field(documents: list[Document]) -> None:
    [found] = [one for one in documents if one["kind"] in kuberay_fields.SPECS]
    jsonschema.validate(found, kuberay_fields.document(found["kind"]))
    found["spec"]["rayVersoin"] = "2.60.0"
    with pytest.raises(jsonschema.ValidationError, match="rayVersoin"):
        jsonschema.validate(found, kuberay_fields.document(found["kind"]))


def test_manifests__operators_own_definitions_accept_them(documents: list[Document]) -> None:
    folder = os.environ.get("SEGVIT_KUBERAY_CRDS")
    if not folder:
        pytest.skip(
            "SEGVIT_KUBERAY_CRDS names no folder with KubeRay's ray.io_rayclusters.yaml and ray.io_rayjobs.yaml"
        )
    [found] = [one for one in documents if one["kind"] in kuberay_fields.SPECS]
    definition = yaml.safe_load((Path(folder) / f"ray.io_{found['kind'].lower()}s.yaml").read_text(encoding="utf-8"))
    [schema] = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1"]
    found["metadata"] = {}
    jsonschema.validate(found, kuberay_fields.closed(schema))


def test_closed__definition_refuses_what_it_does_not_name() -> None:
    amount = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    schema = {
        "type": "object",
        "properties": {"cpu": amount, "list": {"type": "array", "items": {"properties": {"a": {}}}}},
    }
    closed = kuberay_fields.closed(schema)
    jsonschema.validate({"cpu": "500m", "list": [{"a": 1}]}, closed)
    jsonschema.validate({"cpu": 1}, closed)
    for wrong in ({"cpus": 1}, {"list": [{"b": 1}]}, {"cpu": 1.5}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, closed)


_TEXTS = st.text(st.characters(codec="utf-8"))
_VALUES = st.recursive(
    _TEXTS | st.integers() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner)
)


@settings(max_examples=60, deadline=None)
@given(_VALUES)
def test_yaml__any_value_comes_back_as_it_was(value: Any) -> None:
    assert list(yaml.safe_load_all(to_yaml([{"data": value}]))) == [{"data": value}]


def test_yaml__texts_that_other_readers_take_for_numbers_are_quoted() -> None:
    said = to_yaml([{"a": ["1e3", "0o7", "12", "y", "on", "1_0", "~", ".5", "a: b", "# c", "- d", "{e}", "&f", "*g"]}])
    values = [line.removeprefix("- ") for line in said.splitlines() if line.startswith("- ")]
    assert len(values) == 14
    assert all(value[0] == value[-1] and value[0] in "'\"" for value in values)


def test_yaml__a_text_stays_within_its_field() -> None:
    hostile = "name: x\n---\nkind: Secret\n"
    assert list(yaml.safe_load_all(to_yaml([{"data": {"experiment.yaml": hostile}}]))) == [
        {"data": {"experiment.yaml": hostile}}
    ]
