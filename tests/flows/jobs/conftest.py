from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows.jobs import server as job_server
from tests.flows.jobs.fake_server import FakeJobServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobServer]:
    """A cluster of two nodes of 2 and 1 CPUs, and no other one named in the environment."""
    for name in ("RAY_AUTH_MODE", "MLFLOW_TRACKING_URI", "SEGVIT_WEIGHTS", *job_server.ADDRESS_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(job_server, "FIRST_DELAY_S", 0.05)
    fake = FakeJobServer()
    yield fake
    fake.close()
