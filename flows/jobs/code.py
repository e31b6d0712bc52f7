"""Whose code a job runs."""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """`source`: what is imported here; `installed`: the same release there; `auto`: source outside of site-packages."""

    AUTO = "auto"
    SOURCE = "source"
    INSTALLED = "installed"
