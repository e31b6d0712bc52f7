"""A flow on the stores of a cluster: MLflow's server over PostgreSQL, its artifacts in an object store."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.registry.models import checkpoint_folder, list_models
from pipeline.workflow.tracking import Tracking
from tests.faults.postgres import USER, PostgresServer, find_programs
from tests.faults.race_drivers import Driver, check
from tests.faults.tracking_server import TrackingServer
from tests.tiny_model import make_tiny_model

pytest.importorskip("s3fs", reason="needs the extra s3: pip install 'segvit-pipeline[s3]'")
pytest.importorskip("psycopg", reason="needs psycopg of the extra dev")
moto = pytest.importorskip("moto.server", reason="needs moto[server] of the extra dev")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket of an S3 server on loopback."""
    service = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("mlflow")
    yield "s3://mlflow"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    service.stop()


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty database of a real PostgreSQL server."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    if os.geteuid() == 0 and USER not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip(f"PostgreSQL refuses to run as root, and this machine has no user {USER}")
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        # pytest's own folders are closed to the server's user.
        Path(folder).chmod(0o755)
        with PostgresServer(Path(folder) / "server", programs) as server:
            yield server.uri


def test_flow__registers_and_promotes_on_postgresql_and_an_object_store(
    tmp_path: Path, postgres: str, bucket: str
) -> None:
    with TrackingServer(tmp_path / "server", postgres, bucket) as server:
        tracking = Tracking(server.uri)
        for record in make_tiny_model(tmp_path):
            (tmp_path / f"{type(record).__name__}.json").write_text(record.to_json())
        driver = Driver(tmp_path, server.uri, {}, 0)
        try:
            driver.expect("READY")
            driver.ask("stored 0 0.0 1")
            run_id = driver.expect("ENDED")
            check(tmp_path, tracking, "stored", {run_id}, promoted=True)
            driver.ask("stored 0 0.0 1")
            # Nothing is executed a second time.
            check(tmp_path, tracking, "stored", {run_id, driver.expect("ENDED")}, promoted=True)
        finally:
            driver.end()
        [version] = list_models(tracking)
        assert (version.name, version.aliases) == ("stored", ("candidate", "champion"))
        stored = fsspec.filesystem("s3").find(bucket)
        assert any(path.endswith("artifacts/checkpoint/model.safetensors") for path in stored), stored
        fetched = checkpoint_folder(tracking, "models:/stored@champion", tmp_path / "fetched")
        assert {path.name for path in fetched.iterdir()} >= {"config.json", "model.safetensors"}
