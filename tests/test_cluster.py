"""cluster.yaml against Ray's own schema and the promises its comments make; no network, no AWS."""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster.yaml"
COMMAND_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    parsed = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    assert isinstance(parsed, dict)
    return parsed


@pytest.fixture(scope="module")
def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    """The file merged with Ray's defaults, as `ray up` does before it validates."""
    from ray.autoscaler._private.util import prepare_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    return dict(prepare_config(yaml.safe_load(yaml.safe_dump(cluster))))


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    kinds = cluster["available_node_types"]
    return {name: kind for name, kind in kinds.items() if name != cluster["head_node_type"]}


def start_command(cluster: dict[str, Any], node: str) -> str:
    return str(next(line for line in cluster[f"{node}_start_ray_commands"] if "ray start" in line))


def test_cluster__ray_accepts_it(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


def test_cluster__ray_refuses_a_misspelt_key(prepared: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config({**prepared, "max_worker": 3})


def test_cluster__workers_start_at_none_are_spot_and_bounded(cluster: dict[str, Any], prepared: dict[str, Any]) -> None:
    kinds = workers(cluster)
    assert any(kind["resources"].get("GPU", 0) > 0 for kind in kinds.values())
    for name, kind in kinds.items():
        assert kind["min_workers"] == 0, name
        assert 0 < kind["max_workers"] <= cluster["max_workers"], name
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
    head = prepared["available_node_types"]["head"]
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "GPU" not in head["resources"]


def test_cluster__disks_are_encrypted_and_metadata_needs_a_token(cluster: dict[str, Any]) -> None:
    for name, kind in cluster["available_node_types"].items():
        config = kind["node_config"]
        assert config["MetadataOptions"] == {"HttpTokens": "required"}, name
        assert all(device["Ebs"]["Encrypted"] for device in config["BlockDeviceMappings"]), name
        assert re.fullmatch(r"ami-[0-9a-f]{17}", config["ImageId"]), name


@pytest.fixture
def ray_inbound_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Ray's own function for the rules of the group it makes, its AWS client library stood in for."""
    before = set(sys.modules)
    libraries = {"boto3": ("exceptions", "resources", "resources.base")}
    libraries["botocore"] = ("client", "config", "exceptions")
    for library, parts in libraries.items():
        monkeypatch.setitem(sys.modules, library, MagicMock(__version__="1.40.0"))
        for part in parts:
            monkeypatch.setitem(sys.modules, f"{library}.{part}", MagicMock())
    yield import_module("ray.autoscaler._private.aws.config")._create_default_inbound_rules
    # What was imported against the stand-ins must not stay for others.
    for name in set(sys.modules) - before:
        if name.startswith("ray.autoscaler._private.aws"):
            del sys.modules[name]


def test_cluster__outside_reaches_ssh_only(
    cluster: dict[str, Any], ray_inbound_rules: Callable[..., list[dict[str, Any]]]
) -> None:
    # A group or interface of its own would bypass the group that Ray makes.
    for kind in cluster["available_node_types"].values():
        assert not {"SecurityGroupIds", "NetworkInterfaces", "LaunchTemplate"} & kind["node_config"].keys()
    group = cluster["provider"]["security_group"]
    assert group["IpPermissions"] == []
    rules = ray_inbound_rules({"sg-cluster"}, group["IpPermissions"])
    opened = [rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) for rule in opened] == [(22, 22, "tcp")]
    inside = [rule for rule in rules if rule not in opened]
    assert [rule["UserIdGroupPairs"] for rule in inside] == [[{"GroupId": "sg-cluster"}]]


def test_cluster__token_authentication_on_every_node(cluster: dict[str, Any]) -> None:
    written = next(line for line in cluster["initialization_commands"] if "RAY_AUTH_MODE" in line)
    assert "'export RAY_AUTH_MODE=token'" in written
    assert written.endswith("> ~/.segvit_env")
    for node in ("head", "worker"):
        assert start_command(cluster, node).startswith(". ~/.segvit_env && ")


def test_cluster__token_travels_as_a_private_file_only(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in line for line in cluster["initialization_commands"])
    assert "RAY_AUTH_TOKEN=" not in CLUSTER.read_text(encoding="utf-8")


def test_cluster__dashboard_and_mlflow_listen_on_loopback(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in start_command(cluster, "head").split()
    server = next(line for line in cluster["head_start_ray_commands"] if "mlflow server" in line).split()
    assert server[server.index("--host") + 1] == "127.0.0.1"
    assert server[server.index("--port") + 1] == "5000"
    assert server[server.index("--backend-store-uri") + 1].startswith("sqlite:///$HOME/")
    assert server[server.index("--artifacts-destination") + 1].startswith("/mnt/segvit/")
    assert "0.0.0.0" not in "".join(line for name in COMMAND_LISTS for line in cluster[name])


def test_cluster__tunnel_key_opens_what_the_tunnel_forwards_and_nothing_else(cluster: dict[str, Any]) -> None:
    tunnel = next(line for line in cluster["worker_start_ray_commands"] if "ssh -N" in line)
    forwarded = {f"127.0.0.1:{port}" for port in re.findall(r"-L 127\.0\.0\.1:\d+:127\.0\.0\.1:(\d+)", tunnel)}
    assert forwarded == {"127.0.0.1:5000", "127.0.0.1:8265"}
    key = next(line for line in cluster["head_setup_commands"] if "authorized_keys" in line)
    assert set(re.findall(r'permitopen="([^"]+)"', key)) == forwarded
    assert "'restrict,port-forwarding," in key
    assert 'command="/bin/false"' in key
    # The same file is made on the head, copied to the workers and used by them.
    assert cluster["cluster_synced_files"] == ["~/.ssh/segvit_tunnel"]
    assert "-f ~/.ssh/segvit_tunnel" in key
    assert "-i $HOME/.ssh/segvit_tunnel" in tunnel


def test_cluster__project_is_installed_with_constraints_on_one_python(cluster: dict[str, Any]) -> None:
    commands = cluster["setup_commands"]
    assert any(line.endswith("pip install -q -c constraints.txt -e .") for line in commands)
    assert sum(bool(re.search(r"--python 3\.11\.\d+ ~/venv", line)) for line in commands) == 1
    mounts = {remote: local for remote, local in cluster["file_mounts"].items() if "segvit-pipeline" in remote}
    for remote, local in mounts.items():
        assert Path(remote).name == Path(local).name
        assert (ROOT / local).exists(), local
    assert {Path(local).name for local in mounts.values()} >= {
        "segvit",
        "pipeline",
        "flows",
        "pyproject.toml",
    }


def test_cluster__every_command_is_valid_shell(cluster: dict[str, Any]) -> None:
    for name in COMMAND_LISTS:
        for line in cluster[name]:
            assert shlex.split(line)
            subprocess.run(["bash", "-n", "-c", line], check=True, timeout=10)
