"""Which policy the gate is to ask: that of a file, or the one that fits a version best."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from pipeline.config import PromotionPolicy
from pipeline.config.file import expand_variables, explain_problem
from pipeline.config.yaml_text import parse_yaml, read_yaml
from pipeline.errors import UserError
from pipeline.records import ModelVersion
from pipeline.registry import decisions, store
from pipeline.workflow.tracking import Tracking


class ChosenPolicy(NamedTuple):
    """A policy and, for people, where it is from."""

    policy: PromotionPolicy
    source: str


def load_policy(path: str | Path) -> PromotionPolicy:
    """The policy in a YAML or JSON file, which holds fields of PromotionPolicy, as an experiment's `promote` does.

    Raises UserError listing every problem with its key, value and rule.
    """
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise UserError(f"policy {path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"policy {path} is neither YAML nor JSON: {error}") from error
    fields = ", ".join(PromotionPolicy.model_fields)
    if not isinstance(tree, dict):
        raise UserError(f"policy {path} holds {type(tree).__name__}, not a mapping; its keys are {fields}")
    try:
        return PromotionPolicy.model_validate(expand_variables(tree))
    except ValidationError as error:
        lines = [f"policy {path}: {error.error_count()} problem(s); its keys are {fields}"]
        lines += [f"  {'.'.join(map(str, problem['loc']))}: {explain_problem(problem)}" for problem in error.errors()]
        raise UserError("\n".join(lines)) from error


def choose_policy(tracking: Tracking, version: ModelVersion, file: str | Path | None = None) -> ChosenPolicy:
    """The policy in `file`, or else what people mean when they name none.

    That is the one with which the version's flow was run last; for a version of an earlier release the one in that
    flow's configuration; else the one used last for any version of the model; else the defaults.
    """
    if file is not None:
        return ChosenPolicy(load_policy(file), f"the file {file}")
    tags = store.version_tags(tracking, version.name, version.version)
    with suppress(KeyError, ValidationError):
        kept = PromotionPolicy.model_validate_json(tags[decisions.POLICY])
        return ChosenPolicy(kept, "that of the version's own flow")
    flow_run = tags.get(store.FLOW_RUN, "")
    configured = _configured(tracking, flow_run)
    if configured is not None:
        return ChosenPolicy(configured, f"that of run {flow_run[:12]}, which registered the version")
    last = decisions.last_policy(tracking, version.name)
    if last is not None:
        return ChosenPolicy(last[1], f"the one used last for {version.name}, for version {last[0]}")
    return ChosenPolicy(PromotionPolicy(), "the defaults, as none was used for this model yet")


def _configured(tracking: Tracking, flow_run: str) -> PromotionPolicy | None:
    from mlflow.exceptions import MlflowException

    # A run that was deleted, or a configuration of another release, leaves the other ways.
    with suppress(MlflowException, ValueError, AttributeError):
        section: Any = parse_yaml(tracking.read_text(flow_run, "config.yaml") or "").get("promote")
        return None if section is None else PromotionPolicy.model_validate(section)
    return None
