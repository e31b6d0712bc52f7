from __future__ import annotations

import pytest
import yaml

from flows.cli import main
from tests.flows.cluster.rendered import VARIANTS, Document, Render


@pytest.fixture
def render(capsys: pytest.CaptureFixture[str]) -> Render:
    """Documents of what the command prints."""

    def run(*options: str) -> list[Document]:
        capsys.readouterr()
        main(["cluster", "render", *options])
        return list(yaml.safe_load_all(capsys.readouterr().out))

    return run


@pytest.fixture(params=VARIANTS)
def documents(request: pytest.FixtureRequest, render: Render) -> list[Document]:
    return render(*VARIANTS[request.param])
