"""How many examples a property test draws."""

from __future__ import annotations

import os

VARIABLE = "SEGVIT_PROMISE_EXAMPLES"
LONG_FORM = VARIABLE in os.environ


def num_examples(few: int) -> int:
    """`few`, or as many as the environment asks for: SEGVIT_PROMISE_EXAMPLES=500 pytest tests/pipeline/shards."""
    return int(os.environ.get(VARIABLE, few))
