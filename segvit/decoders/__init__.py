"""Decoders by name: Attention-to-Mask in the structures of the paper, and the linear baseline.

A package adds one by an entry point of group ``segvit.decoders`` whose value is a subclass of
`segvit.decoders.decoder.Decoder`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from segvit.registry import Registry

if TYPE_CHECKING:
    from segvit.decoders.decoder import Decoder

DECODERS: Registry[type[Decoder]] = Registry(
    "structure",
    "segvit.decoders",
    {
        "cascade": "segvit.decoders.cascade:Cascade",
        "single": "segvit.decoders.single:Single",
        "naive_qd": "segvit.decoders.naive_qd:NaiveQD",
        "shrunk": "segvit.decoders.shrunk:Shrunk",
        "anchored": "segvit.decoders.anchored:Anchored",
        "linear": "segvit.decoders.linear:Linear",
    },
)
