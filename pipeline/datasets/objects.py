"""Label maps of annotated objects: which class each is, and what pixels without one are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config.data import Unlabelled
from pipeline.datasets.splits import first_repeated
from pipeline.errors import UserError, shown
from segvit.image_files import IGNORE_INDEX

BACKGROUND = "background"
# What tools call the class of pixels that no object is on.
_BACKGROUND_NAMES = (BACKGROUND, "_background_", "__background__")
_IGNORED_NAMES = ("__ignore__", "ignore")


class ObjectClasses(NamedTuple):
    """The classes of annotated objects.

    Attributes:
        names: by class id.
        id_of: class ids by the name that annotations use; IGNORE_INDEX where objects of it are to be ignored.
        void: what pixels without an object are, a class id or IGNORE_INDEX.
    """

    names: tuple[str, ...]
    id_of: dict[str, int]
    void: int

    def blank(self, height: int, width: int) -> NDArray[np.uint8]:
        """(H, W) without an object."""
        return np.full((height, width), self.void, np.uint8)


def object_classes(labels: Sequence[str], unlabelled: Unlabelled, where: str) -> ObjectClasses:
    """The classes of objects called `labels`, in their order, behind the background where there is one.

    A label that is called background is it. `where` they come from is for messages; raises UserError for none and for
    too many.
    """
    ignored = [label for label in labels if label.lower() in _IGNORED_NAMES]
    ground = [label for label in labels if label.lower() in _BACKGROUND_NAMES]
    things = [label for label in labels if label not in (*ignored, *ground)]
    first = [BACKGROUND] if ground or unlabelled == "background" else []
    names = (*first, *things)
    if not things:
        raise UserError(f"{where} names no class of objects; annotate some, or correct the path")
    if len(names) > IGNORE_INDEX or len(set(names)) < len(names):
        twice = first_repeated(names)
        what = f"{len(names)} classes, more than {IGNORE_INDEX}" if twice is None else f"the class {shown(twice)} twice"
        raise UserError(f"{where} names {what}; merge or rename them")
    for name in names:
        if not name.isprintable():
            raise UserError(f"{where} names the class {shown(name)}, which cannot be shown; rename it")
    id_of = {name: number for number, name in enumerate(names)}
    id_of |= dict.fromkeys(ground, 0) | dict.fromkeys(ignored, IGNORE_INDEX)
    return ObjectClasses(names, id_of, 0 if unlabelled == "background" else IGNORE_INDEX)
