"""Seals on object stores; those of local files are broken in test_tampering."""

from __future__ import annotations

import uuid

import pytest

from pipeline import storage
from pipeline.records import Report
from pipeline.storage.file_stamps import file_stamps
from pipeline.workflow.output_checksum import changed_outputs, output_checksums


@pytest.fixture
def output_uri() -> str:
    return f"memory://{uuid.uuid4().hex}/step"


@pytest.mark.parametrize("name", ["", "inner/page.html"])
def test_output_checksums__of_a_file_and_of_a_folder_that_are_remote(output_uri: str, name: str) -> None:
    page = f"{output_uri}/inner/page.html"
    storage.publish_bytes(page, b"one")
    checksums = output_checksums(Report(uri=f"{output_uri}/{name}".rstrip("/"), digest="d"), output_uri)
    assert changed_outputs(checksums) is None
    storage.publish_bytes(page, b"two")
    assert changed_outputs(checksums) == f"{page} has changed"


@pytest.mark.parametrize("recursive", [False, True])
def test_file_stamps__a_remote_file_is_no_folder(output_uri: str, recursive: bool) -> None:
    storage.publish_bytes(f"{output_uri}/page.html", b"one")
    assert {name: stamp.num_bytes for name, stamp in file_stamps(output_uri, recursive=recursive).items()} == {
        "page.html": 3
    }
    assert file_stamps(f"{output_uri}/page.html", recursive=recursive) == {}
