"""Manifests as text: a file for each thing that lives and dies by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from flows.cluster import surroundings
from flows.cluster.options import JobOptions, KubernetesOptions
from flows.cluster.pods import Manifest
from flows.cluster.ray import ray_cluster, ray_job

# Of what is written without quotes, YAML's readers must all think the same: `1e3` and `0o7` are texts to some.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9./:_-]+")


class _Dumper(yaml.SafeDumper):
    """Texts in quotes unless they are words; longer ones line by line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None if _PLAIN.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def cluster_files(options: KubernetesOptions) -> dict[str, str]:
    """File names and texts of a cluster that stays."""
    return _files(options, {"raycluster.yaml": ray_cluster(options)})


def job_files(options: JobOptions, name: str, text: str, overrides: Sequence[str]) -> dict[str, str]:
    """File names and texts of a job with its own cluster; `text` is the experiment file's."""
    return _files(options, {"rayjob.yaml": ray_job(options, name, text, overrides)})


def to_yaml(documents: Sequence[Manifest]) -> str:
    """Documents of one YAML file."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120)


def _files(options: KubernetesOptions, ray: Mapping[str, Sequence[Manifest]]) -> dict[str, str]:
    files: dict[str, Sequence[Manifest]] = {
        "storage.yaml": surroundings.storage(options),
        "network.yaml": surroundings.network(options),
        "mlflow.yaml": surroundings.mlflow(options),
        **ray,
    }
    return {name: to_yaml(documents) for name, documents in files.items() if documents}
