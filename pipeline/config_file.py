"""An experiment file: read, overridden, its variables filled in, and checked as a whole before anything starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import ExperimentConfig
from pipeline.errors import UserError


def load_config(path: str | Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """Read, override (`a.b=c`, values as YAML), expand `${NAME}` from the environment, and check an experiment file.

    Raises UserError listing every problem with its place, value and rule.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds {type(tree).__name__}, not a mapping of sections; see flows/configs")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(expand_variables(tree), source=str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> ExperimentConfig:
    """Check a parsed experiment tree; raises UserError listing every problem."""
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"{source}: {error.error_count()} problem(s)"]
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
            lines.append(f"  {place}: {explain_problem(problem)}")
        raise UserError("\n".join(lines)) from error


def explain_problem(problem: Any) -> str:
    """One of pydantic's errors as the rule that was broken, with the remedy."""
    if problem["type"] == "extra_forbidden":
        return "unknown key; remove it or correct its spelling"
    if problem["type"] == "missing":
        return "missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    return message if isinstance(value, dict | BaseModel) else f"{value!r}: {message}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {override!r} is not of the form a.b=c, such as --set train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from error
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: {key!r} is a value, not a section")
        node = child
    # YAML 1.1 reads 3e-5 as text; what is a number to everyone is a number here.
    node[keys[-1]] = _number(value)


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def expand_variables(node: Any) -> Any:
    """`node` with each `${NAME}` in its strings replaced; raises UserError for a variable that is not set."""
    if isinstance(node, dict):
        return {key: expand_variables(value) for key, value in node.items()}
    if isinstance(node, list):
        return [expand_variables(value) for value in node]
    if not isinstance(node, str):
        return node

    def replace(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in os.environ:
            raise UserError(f"the config refers to ${{{name}}}, which is not set; export {name} or write the value")
        return os.environ[name]

    return _number(re.sub(r"\$\{(\w+)\}", replace, node))
