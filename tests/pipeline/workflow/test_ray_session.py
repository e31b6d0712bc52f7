from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import ray

from pipeline.errors import UserError
from pipeline.workflow import cluster_growth, ray_session


def test_default_options__local_dashboard_on_loopback_else_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    local = ray_session.default_options()
    assert (local["include_dashboard"], local["dashboard_host"]) == (True, "127.0.0.1")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ray_session.default_options() == {}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("GCS"), r"the Ray cluster at 10\.0\.0\.1:6379 does not answer or refuses this user's token"),
        (Exception("timed out\n during startup"), r"Ray could not start on this machine: timed out during startup"),
    ],
)
def test_start__failure_is_one_clear_message(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=message):
        ray_session.start(lambda: {"address": "10.0.0.1:6379"})


@pytest.mark.parametrize(("address", "is_local"), [("", True), ("10.0.0.1:6379", False)])
@pytest.mark.parametrize(
    ("setting", "local"), [("RAY_gcs_rpc_server_reconnect_timeout_s", "15"), ("RAY_prestart_worker_first_driver", "0")]
)
def test_start__only_a_local_ray_gives_up_a_dead_control_service_soon_and_starts_no_idle_processes(
    monkeypatch: pytest.MonkeyPatch, address: str, is_local: bool, setting: str, local: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv(setting, "of another test")  # put back in the end
    monkeypatch.delenv(setting)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    assert ray_session.start(dict)
    assert os.environ.get(setting) == (local if is_local else None)


def test_start__mistaken_options_are_not_taken_for_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(TypeError):
        ray_session.start(lambda: {1: 2})  # type: ignore[dict-item]


def test_cancel__nothing_to_cancel_needs_no_ray() -> None:
    ray_session.cancel([None, None])


@pytest.mark.parametrize(
    ("resources", "use_gpu", "cpus", "fit"),
    [
        ({"CPU": 8.0}, None, 3, 2),
        ({"CPU": 2.0}, False, 4, 1),
        ({"CPU": 64.0, "GPU": 4.0}, None, 3, 4),
        ({"CPU": 8.0, "GPU": 4.0}, False, 2, 4),
    ],
)
def test_workers_that_fit__by_gpus_or_else_by_cpus(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], use_gpu: bool | None, cpus: int, fit: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(cluster_growth, "will_come", lambda _: False)
    assert ray_session.workers_that_fit(use_gpu, cpus) == fit


@pytest.mark.parametrize(
    ("there", "can_come", "use_gpu", "wanted"),
    [
        (1.0, None, None, True),
        (1.0, None, False, False),
        (0.0, None, False, False),
        (0.0, True, None, True),
        (0.0, True, True, True),
        (0.0, False, None, False),
    ],
)
def test_wants_gpu__counts_what_the_autoscaler_would_start(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    there: float,
    can_come: bool | None,
    use_gpu: bool | None,
    wanted: bool,
) -> None:
    def will_come(resources: dict[str, float]) -> bool:
        assert (resources, can_come is not None) == ({"GPU": 1}, True), "asked without need"
        return bool(can_come)

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": there})
    monkeypatch.setattr(cluster_growth, "will_come", will_come)
    assert ray_session.wants_gpu(use_gpu) is wanted
    # Whoever watches is told what is waited for.
    assert ("the autoscaler starts one" in capsys.readouterr().out) is bool(can_come)


def test_wants_gpu__one_that_can_never_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(cluster_growth, "will_come", lambda _: False)
    with pytest.raises(UserError, match=r"no GPU and no node type with one; set it to false or add GPU workers"):
        ray_session.wants_gpu(True)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (None, False),
        (ray.exceptions.RpcError("unavailable"), False),  # type: ignore[no-untyped-call]
        (ray.exceptions.AuthenticationError("WrongClusterID"), True),
    ],
)
def test_require_cluster__another_head_at_the_same_address_is_another_cluster(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, lost: bool
) -> None:
    def get(key: bytes, namespace: bytes) -> bytes:
        if error is not None:
            raise error
        return b"session_1"

    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", get)
    with pytest.raises(UserError, match="started anew") if lost else contextlib.nullcontext():
        ray_session.require_cluster()
