"""The loss and its terms, by name.

A package adds a term by an entry point of group ``segvit.loss_terms`` whose value is a
`segvit.losses.term.LossTerm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from segvit.registry import Registry

if TYPE_CHECKING:
    from segvit.losses.term import LossTerm

LOSS_TERMS: Registry[LossTerm] = Registry(
    "loss term",
    "segvit.loss_terms",
    {
        "class": "segvit.losses.class_entropy:CLASS_ENTROPY",
        "focal": "segvit.losses.focal:FOCAL",
        "dice": "segvit.losses.dice:DICE",
        "cross_entropy": "segvit.losses.cross_entropy:CROSS_ENTROPY",
    },
)
