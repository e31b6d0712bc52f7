"""A real object store as source and as target: moto's S3 server on loopback."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.shards import shard_task
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.sample_check import check_sample
from pipeline.shards.shard_check import check_shard_set

pytest.importorskip("s3fs", reason="needs the extra s3: pip install 'segvit-pipeline[s3]'")
server = pytest.importorskip("moto.server", reason="needs moto[server] of the extra dev")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    service = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    yield f"http://{host}:{port}"
    service.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket; the surroundings hold no other credentials."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    filesystem_class = fsspec.get_filesystem_class("s3")
    # Instances are cached, and with them the credentials and the server that they were made with.
    filesystem_class.clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    filesystem_class.clear_instance_cache()


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Five training and two validation images; train/4 is val/1 again."""
    rng = np.random.default_rng(0)
    root = tmp_path / "raw"
    for split, count in (("train", 5), ("val", 2)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(root / split / f"{number}.png")
            Image.fromarray(rng.integers(0, 12, (16, 24), dtype=np.uint8)).save(root / f"{split}annot/{number}.png")
    (root / "train" / "4.png").write_bytes((root / "val" / "1.png").read_bytes())
    return root


def config_of(root: str, **settings: object) -> DataConfig:
    common = {"dataset": "camvid", "samples_per_shard": 2, "on_bad_sample": "quarantine"}
    return DataConfig.model_validate({**common, "max_quarantined_fraction": 0.2, "root": root, **settings})


def remote_sums(uri: str) -> dict[str, str]:
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()
    return {
        name[len(path) + 1 :]: hashlib.sha256(filesystem.cat_file(name)).hexdigest() for name in filesystem.find(path)
    }


def test_prepare__source_and_target_on_s3(bucket: str, camvid: Path, tmp_path: Path) -> None:
    fsspec.filesystem("s3").put(f"{camvid}/", f"{bucket}/raw/", recursive=True)
    lines: list[str] = []
    local = prepare_shards(config_of(str(camvid)), str(tmp_path / "out"), progress=lines.append)
    remote = prepare_shards(config_of(f"{bucket}/raw"), f"{bucket}/out", progress=lines.append)
    assert remote.digest == local.digest
    assert (remote.num_quarantined, remote.splits["train"].num_samples, remote.splits["val"].num_samples) == (1, 4, 2)
    assert lines[-1] == (f"prepare camvid: 7 images = 6 in 4 shards + 1 in quarantine.parquet; published {bucket}/out")
    assert check_shard_set(f"{bucket}/out").shard_set == remote
    names = set(remote_sums(f"{bucket}/out"))
    assert names == {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    again = prepare_shards(config_of(f"{bucket}/raw"), f"{bucket}/out", progress=lines.append)
    assert again == remote
    assert "is up to date" in lines[-1]


def test_prepare__interrupted_on_s3_goes_on(bucket: str, camvid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = f"{bucket}/out"
    prepare_shards(config_of(str(camvid)), f"{bucket}/whole", progress=lambda line: None)
    done: list[str] = []

    def interrupted(dataset: object, sample: object, *rest: object) -> object:
        done.append("x")
        if len(done) == 4:
            raise KeyboardInterrupt
        return check_sample(dataset, sample, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(shard_task, "check_sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(config_of(str(camvid)), target, progress=lambda line: None)
    assert set(remote_sums(target)) == {"train-00000.tar", "rows/train-00000.parquet"}
    # What a kill between the copy and the removal of the temporary name leaves.
    storage.publish_bytes(f"{target}/manifest.json.0badcafe.partial", b"{")
    prepare_shards(config_of(str(camvid)), target, progress=lambda line: None)
    assert remote_sums(target) == remote_sums(f"{bucket}/whole")


def test_prepare__no_such_bucket_is_one_clear_error(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data root {bucket}-not/raw does not exist; set data\.root"):
        prepare_shards(config_of(f"{bucket}-not/raw"), str(tmp_path / "out"), progress=lambda line: None)


def test_publishing__on_s3_shows_the_old_object_or_the_new_one(bucket: str) -> None:
    uri = f"{bucket}/file.bin"
    storage.publish_bytes(uri, b"old")

    def fail_half_way() -> None:
        with storage.publishing(uri) as file:
            file.write(b"half")
            assert storage.read_bytes(uri) == b"old"
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        fail_half_way()
    assert remote_sums(bucket) == {"file.bin": hashlib.sha256(b"old").hexdigest()}
    storage.publish_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
