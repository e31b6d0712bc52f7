"""An experiment file: read, overridden, its variables filled in, and checked as a whole before anything starts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.experiment import ExperimentConfig
from pipeline.config.former import rename_former_keys
from pipeline.config.yaml_text import parse_yaml, read_yaml
from pipeline.errors import UserError
from pipeline.masking import masked

C = TypeVar("C", bound=ExperimentConfig)
_VARIABLE = re.compile(r"\$\{(\w+)\}")
# What an error shows of a file: problems, and characters of each.
MOST_PROBLEMS, MAX_SHOWN = 50, 300


def read_tree(path: str | Path, overrides: Sequence[str] = (), *, expand: bool = True) -> dict[str, Any]:
    """Read an experiment file, override (`a.b=c`, values as YAML) and, with `expand`, fill in `${NAME}`s.

    Keys of earlier releases get today's names, each with a note on standard error. Raises UserError for a file that
    is not one mapping of YAML.
    """
    try:
        tree = read_yaml(path)
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds {type(tree).__name__}, not a mapping of sections; see flows/configs")
    for override in overrides:
        _apply_override(tree, override)
    for change in rename_former_keys(tree):
        print(f"note: {path}: {change}; the former name is still read", file=sys.stderr)
    expanded: dict[str, Any] = expand_variables(tree) if expand else tree
    return expanded


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """`read_tree`, checked as a whole; raises UserError listing every problem with its place, value and rule."""
    return parse_config(read_tree(path, overrides), str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> ExperimentConfig:
    """Check a parsed experiment tree; raises UserError listing every problem."""
    return parse_as(ExperimentConfig, tree, source)


def parse_as(config_type: type[C], tree: dict[str, Any], source: str) -> C:
    """`parse_config` for a recipe with keys of its own."""
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        lines = [f"{source}: {error.error_count()} problem(s)"]
        for problem in error.errors()[:MOST_PROBLEMS]:
            key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
            lines.append(f"  {shorten(key)}: {explain_problem(problem)}")
        raise UserError("\n".join(lines)) from error


def explain_problem(problem: Any) -> str:
    """One of pydantic's errors as the rule that was broken, with the remedy."""
    if problem["type"] == "extra_forbidden":
        return "unknown key; remove it or correct its spelling"
    if problem["type"] == "missing":
        return "missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    may_be_shown = not isinstance(value, dict | BaseModel) and problem["loc"][-1:] != ("notify",)
    return f"{shorten(masked(repr(value)))}: {message}" if may_be_shown else str(message)


def shorten(text: str) -> str:
    """The text, or its beginning where it fills lines."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {override!r} is not of the form a.b=c, such as --set train.steps=100")
    try:
        value = parse_yaml(text)
    except ValueError as error:
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


def expand_variables(node: Any, variables: Mapping[str, str] | None = None) -> Any:
    """`node` with each `${NAME}` in its strings replaced, from this process's environment.

    With `variables` only those are known, and other names stay: they are for another machine to fill in. Raises
    UserError for a variable that is not set.
    """
    if isinstance(node, dict):
        return {key: expand_variables(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [expand_variables(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def replace(found: re.Match[str]) -> str:
        name = found.group(1)
        if variables is not None:
            return variables.get(name, found.group())
        if name not in os.environ:
            raise UserError(f"the config refers to ${{{name}}}, which is not set; export {name} or write the value")
        return os.environ[name]

    return _number(_VARIABLE.sub(replace, node))


def variables_in(node: Any) -> set[str]:
    """The names that strings of `node` refer to as `${NAME}`."""
    if isinstance(node, dict):
        return set().union(*(variables_in(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(variables_in(value) for value in node))
    return set(_VARIABLE.findall(node)) if isinstance(node, str) else set()
