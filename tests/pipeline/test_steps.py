from __future__ import annotations

import pytest

from pipeline import steps
from pipeline.config import RuntimeConfig
from pipeline.workflow import ray_session


@pytest.mark.parametrize(
    ("runtime", "at_once"),
    [
        (RuntimeConfig(), 8),
        (RuntimeConfig(num_workers=3), 2),
        (RuntimeConfig(num_workers=(2, 6)), 4),
        (RuntimeConfig(num_workers=16), 1),
        (RuntimeConfig(num_workers=16, trainings_at_once=5), 5),
    ],
)
def test_train__as_many_at_once_as_there_are_workers_for(
    monkeypatch: pytest.MonkeyPatch, runtime: RuntimeConfig, at_once: int
) -> None:
    monkeypatch.setattr(ray_session, "workers_that_fit", lambda *_: 8)
    assert steps.train.at_once is not None
    assert steps.train.at_once(runtime) == at_once
