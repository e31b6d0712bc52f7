"""Things that are looked up by name: those built in, and those that other packages add by an entry point."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Items of one kind by name, loaded when they are asked for.

    A package adds one by an entry point of the group: its name is the item's, its value ``module:object``. A name
    that is built in stays built in.

    Args:
        kind: What an item is called in messages, such as ``loss term``.
        group: Group of the entry points.
        builtins: ``module:object`` by name.
    """

    def __init__(self, kind: str, group: str, builtins: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self.builtins = {name: EntryPoint(name, target, group) for name, target in builtins.items()}
        self._registered: dict[str, T] = {}

    def get(self, name: str) -> T:
        """The item of that name.

        Raises:
            ValueError: No such item, two packages that add it, or one that cannot be loaded.
        """
        if name in self._registered:
            return self._registered[name]
        found = self.builtins.get(name) or self.plugin(name)
        if found is None:
            raise ValueError(
                f"unknown {self.kind} {name!r}; choose from {', '.join(nearest_first(name, self.names()))}"
            )
        try:
            item: T = found.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.kind} {name!r} cannot be loaded from {found.value}: {error}; "
                f"correct its entry point of group {self.group}"
            ) from error
        return item

    def names(self) -> list[str]:
        """All names: the built-in ones, then those of entry points and of `register`; imports nothing."""
        plugins = sorted(point.name for point in entry_points(group=self.group))
        return list(dict.fromkeys((*self.builtins, *plugins, *self._registered)))

    def register(self, name: str, item: T) -> None:
        """Add an item in this process only, over any other of the name."""
        self._registered[name] = item

    def plugin(self, name: str) -> EntryPoint | None:
        """The entry point that adds the name, None for what is built in or not there.

        Raises:
            ValueError: Two packages add the name.
        """
        if name in self.builtins:
            return None
        points = {point.value: point for point in entry_points(group=self.group, name=name)}
        if len(points) > 1:
            raise ValueError(
                f"{self.kind} {name!r} is added by {' and by '.join(sorted(points))}; remove or rename one of them"
            )
        return next(iter(points.values()), None)

    def plugin_file(self, name: str) -> Path | None:
        """The file of the module that the name's entry point refers to, None for what is built in or not there."""
        point = self.plugin(name)
        spec = find_spec(point.module) if point is not None else None
        return Path(spec.origin) if spec is not None and spec.origin is not None else None


def nearest_first(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, those most like the name in front."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    return [*close, *(choice for choice in choices if choice not in close)]
