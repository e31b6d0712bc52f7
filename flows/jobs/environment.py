"""The caller's variables that go with a job, and what of this machine a job elsewhere cannot reach."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config import ExperimentConfig
from pipeline.config.experiment import MODEL_SCHEME, lies_elsewhere
from pipeline.errors import UserError
from segvit.weights.pretrained import WEIGHTS_VARIABLE

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Read before a process can be told, or Ray's own.
_NOT_SENT = re.compile(r"RAY_\w*|SEGVIT_JOB|PATH|PYTHONPATH|PYTHONHOME|LD_LIBRARY_PATH|LD_PRELOAD|CUDA_VISIBLE_DEVICES")
# What experiments commonly need; a caller who has one set may think that it goes along.
_OFTEN_NEEDED = (
    WEIGHTS_VARIABLE,
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
)


def asked_environment(given: Sequence[str], listed: Sequence[str] = ()) -> dict[str, str]:
    """Variables by name.

    Args:
        given: `NAME=VALUE`, or `NAME` for the caller's own value.
        listed: names of `runtime.env`; `given` wins over them.

    Raises:
        UserError: a name that is none, that is not set here, or that has no effect in a job. No message has a value.
    """
    values: dict[str, str] = {}
    for where, entry in [*(("runtime.env", name) for name in listed), *(("--env", entry) for entry in given)]:
        name, separator, value = entry.partition("=")
        if not NAME_PATTERN.fullmatch(name):
            raise UserError(f"{where} {name!r} is no variable's name; give NAME or NAME=VALUE")
        if _NOT_SENT.fullmatch(name):
            raise UserError(f"{where} {name} cannot be sent: the cluster's own value counts there; leave it out")
        if not separator:
            if name not in os.environ:
                raise UserError(f"{where} {name} is not set here; export it, or give {name}=VALUE to --env")
            value = os.environ[name]
        values[name] = value
    return values


def tracking_store(given: str | None) -> tuple[str | None, str | None]:
    """The MLflow store that a job is told, None for the cluster's own; and a note where the caller's is not told.

    `given`, the store as the cluster sees it, is taken as it is. Of the environment only what lies elsewhere.
    """
    if given:
        return given, None
    own = os.environ.get(TRACKING_VARIABLE)
    if not own or not _is_of_this_machine(own):
        return own or None, None
    return None, (
        f"{TRACKING_VARIABLE} {without_password(own)} is reached from this machine only and is not sent: the job uses "
        "the cluster's own, or a file in the workspace; --tracking-uri names a store as the cluster sees it"
    )


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def path_problems(config: ExperimentConfig, environment: Mapping[str, str]) -> list[str]:
    """Paths that mean something on this machine only, a line each."""
    return [
        f"{key} {path} is relative, but a job runs elsewhere; give an absolute path that all nodes share, or a URI"
        for key, path in _named_paths(config, environment)
        if "://" not in path and not path.startswith(("/", "~", "$"))
    ]


def notes_on_paths(config: ExperimentConfig, environment: Mapping[str, str]) -> list[str]:
    """Paths that the cluster's nodes may not have, a line each: what lies in the caller's home."""
    home = Path.home()
    return [
        f"{key} {path} lies in your home here; the job looks for it on the cluster's nodes"
        for key, path in _named_paths(config, environment)
        if path.startswith("~") or (path.startswith("/") and home != Path("/") and Path(path).is_relative_to(home))
    ]


def notes_on_variables(mentioned: set[str], environment: Mapping[str, str]) -> list[str]:
    """One line about variables that are set here and do not go along.

    `mentioned`: names that the experiment file refers to as `${NAME}`; the cluster has its own values of those.
    """
    left = [name for name in (*sorted(mentioned), *_OFTEN_NEEDED) if name in os.environ and name not in environment]
    if not left:
        return []
    return [f"set here and not sent: {', '.join(dict.fromkeys(left))}; the cluster's own count, or add --env NAME"]


def _named_paths(config: ExperimentConfig, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Settings that name a file or folder, each with its path, once."""
    found: dict[tuple[str, str], None] = {}
    if config.data.root:
        found["data.root", config.data.root] = None
    for name, variant in config.variants.items():
        weights = config.backbone_weights(name)
        if weights not in ("auto", "random"):
            found[f"variants.{name}.weights" if variant.weights else "model.weights", weights] = None
        start = config.start_from(name)
        if start and lies_elsewhere(start) and not start.startswith(MODEL_SCHEME):
            found["model.start_from" if start == config.model.start_from else f"variants.{name}.start_from", start] = (
                None
            )
    if environment.get(WEIGHTS_VARIABLE):
        found[WEIGHTS_VARIABLE, environment[WEIGHTS_VARIABLE]] = None
    return list(found)


def _is_of_this_machine(uri: str) -> bool:
    """Whether a tracking URI names a file, or an address that is another machine's own elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        # A database server is reached by its host; sqlite and folders are files.
        return parts.scheme in ("", "file") or parts.scheme.startswith("sqlite") or not parts.hostname
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"
