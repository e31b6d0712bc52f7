"""No file outside of a data root is read: links, and paths that lead upwards, are followed within it alone.

The root itself may be a link. A folder elsewhere, such as a data disk, is within it where a setting names it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline import storage
from pipeline.errors import UserError

SETTING = "data.linked_folders"


class OutsideError(UserError):
    """A path that leads out of the data root."""

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(f"{path} {reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class Boundary:
    """What lies below `root` and the folders `linked`, each where its links end. A root elsewhere has no links.

    Args:
        root: a folder or file; a local path or any fsspec location.
        linked: absolute paths of further folders that links below the root may lead to.
    """

    def __init__(self, root: str, linked: Sequence[str] = ()) -> None:
        self.root = root
        self.linked = tuple(linked)
        self._is_local = storage.is_local(root)
        folders = (str(storage.local_path(root)), *self.linked) if self._is_local else ()
        self._within = tuple(os.path.realpath(folder) for folder in folders)

    def __reduce__(self) -> tuple[type[Boundary], tuple[str, tuple[str, ...]]]:
        # Links may end elsewhere on another machine.
        return Boundary, (self.root, self.linked)

    def end_of(self, uri: str) -> str | None:
        """Where the local path `uri` ends if that is outside; None where it is inside."""
        if not self._is_local:
            return None
        path = os.path.realpath(storage.local_path(uri))
        inside = any(path == folder or path.startswith(f"{folder.rstrip(os.sep)}{os.sep}") for folder in self._within)
        return None if inside else path

    def check(self, uri: str) -> None:
        """Raise OutsideError where `uri` leads out."""
        end = self.end_of(uri)
        if end is not None:
            raise OutsideError(
                uri,
                f"leads out of {self.root}, to {end}",
                f"put it below, or name a folder around it in {SETTING}, such as [{Path(end).parent}]",
            )
