"""What may be chosen of a rendered cluster, checked before a line is written."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from flows.cluster.kinds import Spot
from pipeline.errors import UserError

SHARED = "/mnt/segvit"  # where every node has the shared storage
# Kubernetes allows 63 characters; what the operator appends needs its share of them.
NAME_PATTERN = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
NAMESPACE_PATTERN = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
OBJECT_PATTERN = r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?"
IMAGE_PATTERN = r"[a-z0-9]+([._:/-]+[a-zA-Z0-9]+)*"
MEMORY_PATTERN = r"[1-9]\d{0,6}(Mi|Gi|Ti)"
SELECTOR_PATTERN = r"([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?"
LABEL_VALUE_PATTERN = r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?"
HOST_PORT_PATTERN = r"[A-Za-z0-9]([-.A-Za-z0-9]{0,251}[A-Za-z0-9])?:(?P<port>[1-9]\d{0,4})"

_PERHAPS_SECRET = ("--mlflow-uri", "--redis")  # not repeated in messages


def _matching(pattern: str, rule: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return AfterValidator(check)


def _tagged(image: str) -> str:
    tag = image.rsplit("/", 1)[-1].partition("@")[2] or image.rsplit("/", 1)[-1].partition(":")[2]
    if tag in {"", "latest"}:
        raise ValueError("an image needs a tag other than latest, or a digest: else nodes may differ from one another")
    name, _, digest = image.partition("@")
    if not re.fullmatch(IMAGE_PATTERN, name) or (digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest)):
        raise ValueError("no image reference; it looks like registry.example.org/segvit:0.1.0")
    return image


def _host_and_port(address: str) -> str:
    found = re.fullmatch(HOST_PORT_PATTERN, address)
    if found is None or int(found["port"]) > 65535:
        raise ValueError("must be HOST:PORT, as redis.db:6379; its password goes into a secret")
    return address


def _without_secrets(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be the http or https address of a tracking server, as https://mlflow.example.org")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "holds credentials, which would be readable; put MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD into the environment that the pods or jobs get"
        )
    return uri


def _shared_place(workspace: str) -> str:
    if "://" in workspace:
        return workspace
    if not PurePosixPath(workspace).is_absolute() or ".." in PurePosixPath(workspace).parts:
        raise ValueError("must be an absolute path that all nodes share, or a URI")
    return workspace


Name = Annotated[
    str, _matching(NAME_PATTERN, "must be lower-case letters, digits and dashes, 40 at most, from a letter")
]
ObjectName = Annotated[str, _matching(OBJECT_PATTERN, "must be lower-case letters, digits, dots and dashes")]
Memory = Annotated[str, _matching(MEMORY_PATTERN, "must be a whole number of Mi, Gi or Ti, as 28Gi")]
Workspace = Annotated[str, AfterValidator(_shared_place)]


class Size(BaseModel):
    """CPU cores and memory of a node, written `14x28Gi`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: int = Field(ge=1, le=1024)
    memory: Memory

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        cpus, separator, memory = value.partition("x")
        if not separator or not cpus.isdecimal():
            raise ValueError("must be cores and memory, as 14x28Gi")
        return {"cpus": int(cpus), "memory": memory}


class KubernetesOptions(BaseModel):
    """A Ray cluster on Kubernetes; every field is an option of `segvit cluster render`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Annotated[str, AfterValidator(_tagged)]
    name: Name = "segvit"
    namespace: Annotated[str, _matching(NAMESPACE_PATTERN, "must be lower-case letters, digits and dashes")] = "segvit"
    # Less than a machine of 16 cores has, for Kubernetes keeps some of it: all of it would never be scheduled.
    cpu_worker_size: Size = Size(cpus=14, memory="28Gi")
    gpu_worker_size: Size = Size(cpus=14, memory="56Gi")
    cpu_workers: int = Field(default=4, ge=0, le=1000)
    gpu_workers: int = Field(default=4, ge=0, le=1000)
    gpus_per_worker: int = Field(default=1, ge=1, le=16)
    gpu_selector: tuple[str, ...] = ()
    spot: Spot | None = None
    storage_class: ObjectName | None = None
    storage_size: Memory = "500Gi"
    claim: ObjectName | None = None
    mlflow_uri: Annotated[str, AfterValidator(_without_secrets)] | None = None
    operator_namespace: Annotated[
        str, _matching(NAMESPACE_PATTERN, "must be lower-case letters, digits and dashes")
    ] = "kuberay-operator"
    redis: Annotated[str, AfterValidator(_host_and_port)] | None = None

    @property
    def head_size(self) -> Size:
        """The head runs Ray's services and the drivers of jobs, no tasks."""
        return Size(cpus=4, memory="16Gi")

    @property
    def gpu_labels(self) -> dict[str, str]:
        """Labels of the nodes that GPU workers go to."""
        return dict(pair.split("=", 1) for pair in self.gpu_selector)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for pair in self.gpu_selector:
            key, separator, value = pair.partition("=")
            if not (separator and re.fullmatch(SELECTOR_PATTERN, key) and re.fullmatch(LABEL_VALUE_PATTERN, value)):
                raise ValueError(
                    f"--gpu-selector {pair} must be a node's label, as cloud.google.com/gke-accelerator=nvidia-l4"
                )
        if self.claim is not None and (self.storage_class is not None or "storage_size" in self.model_fields_set):
            raise ValueError(
                "--claim names a volume claim that exists; --storage-class and --storage-size make one: give either"
            )
        if self.cpu_workers + self.gpu_workers == 0:
            raise ValueError(
                "--cpu-workers and --gpu-workers are both 0, and the head runs no tasks; allow one at least"
            )
        return self


class JobOptions(KubernetesOptions):
    """`KubernetesOptions` for one experiment that brings its cluster with it and takes it away."""

    workspace: Workspace = f"{SHARED}/workspace"

    @model_validator(mode="after")
    def _check_job(self) -> Self:
        if self.redis is not None:
            raise ValueError(
                "--redis keeps what a cluster knows while its head is away; a job that lost its head starts "
                "a new cluster and goes on in the workspace: leave it out"
            )
        if "://" not in self.workspace and not PurePosixPath(self.workspace).is_relative_to(SHARED):
            raise ValueError(
                f"--workspace {self.workspace} is on no storage that the pods share; "
                f"it must be below {SHARED}, or a URI"
            )
        return self


class SlurmOptions(BaseModel):
    """One experiment as a batch job on nodes that it has to itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: Workspace
    name: Name = "segvit"
    nodes: int = Field(default=1, ge=1, le=1000)
    gpus_per_worker: int = Field(default=1, ge=0, le=16)
    mlflow_uri: Annotated[str, AfterValidator(_without_secrets)] | None = None


Options = TypeVar("Options", bound=BaseModel)


def parse_options(kind: str, options_type: type[Options], given: dict[str, Any]) -> Options:
    """Options of a kind of cluster; raises UserError naming every option that is wrong, missing or of another kind."""
    try:
        return options_type.model_validate(given)
    except ValidationError as error:
        problems = [_explain(kind, problem) for problem in error.errors()]
        raise UserError(
            "\n  ".join(problems) if len(problems) == 1 else "\n  ".join(["options:", *problems])
        ) from error


def _explain(kind: str, problem: Any) -> str:
    option = "--" + str(problem["loc"][0]).replace("_", "-") if problem["loc"] else ""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{option} means nothing to --kind {kind}; leave it out"
    if problem["type"] == "missing":
        return f"--kind {kind} needs {option}"
    if option in _PERHAPS_SECRET:
        return f"{option} {message}"
    return f"{option} {problem['input']}: {message}" if option else message
