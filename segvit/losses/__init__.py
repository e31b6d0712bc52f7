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
        "focal_balanced": "segvit.losses.focal:BALANCED_FOCAL",
        "focal_hard": "segvit.losses.hard_pixels:HARD_FOCAL",
        "dice": "segvit.losses.dice:DICE",
        "dice_hard": "segvit.losses.hard_pixels:HARD_DICE",
        "cross_entropy": "segvit.losses.cross_entropy:CROSS_ENTROPY",
        "cross_entropy_balanced": "segvit.losses.cross_entropy:BALANCED_CROSS_ENTROPY",
        "cross_entropy_hard": "segvit.losses.cross_entropy:HARD_CROSS_ENTROPY",
    },
)
