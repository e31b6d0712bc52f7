"""One mutated input: what was changed, how it is read, and how a reader may refuse it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import DataConfig
from pipeline.datasets import RejectedSampleError, open_dataset
from pipeline.errors import UserError
from segvit.image_files import DecodeError


class Case(NamedTuple):
    """A mutated input.

    Attributes:
        kind: of the mutation.
        read: reads it; returns where the mutation left something readable.
        refusals: the exceptions by which it says that it is not; their message is one line.
    """

    kind: str
    read: Callable[[], Any]
    refusals: tuple[type[Exception], ...] = (UserError, RejectedSampleError, DecodeError)


class SeveralLinesError(UserError):
    """A refusal that has a line a problem, or one of what is known: on one line here, and of bounded length."""

    def __init__(self, error: UserError) -> None:
        lines = str(error).splitlines()
        assert len(lines) <= 60, f"{len(lines)} lines"
        assert max(map(len, lines)) <= 2000, f"a line of {max(map(len, lines))} characters"
        super().__init__(lines[0])


# Writes a mutated input into the empty folder.
MakeCase = Callable[[Path, random.Random], Case]


def read_dataset(config: DataConfig) -> None:
    """Read every sample of a raw data set, those that are rejected too; raises UserError."""
    dataset = open_dataset(config)
    for split in dataset.splits():
        for sample in dataset.samples(split):
            try:
                pair = dataset.read(sample)
            except RejectedSampleError as error:
                require_one_line(error)
                continue
            assert pair.label.dtype == "uint8"
            assert pair.label.ndim == 2


def require_one_line(error: Exception) -> None:
    """Raise AssertionError where the message of `error` is not one a person can read."""
    text = str(error)
    assert text, f"{type(error).__name__} says nothing"
    assert "\n" not in text, f"several lines: {text[:400]!r}"
    assert len(text) <= 2000, f"{len(text)} characters: {text[:400]!r}"
