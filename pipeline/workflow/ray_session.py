"""The few things flows ask of Ray, so that a flow which needs none of them never imports it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from pipeline.errors import UserError
from pipeline.workflow import cluster_growth, ray_logs

STEPS_PER_CORE = 4
CANCEL_TIMEOUT_S = 3.0
# A local control service that died does not come back; Ray would wait a minute for it, and its agents one more.
CONTROL_TIMEOUT_S = 15
# Until what a worker said before it was held has been heard.
SETTLE_S = 0.1
# Whether a start was broken off half-way: what Ray had made in this process crashes when the interpreter is taken down
# (2.60; a segmentation fault), so that the command ends without that.
is_broken_off = False


def default_options() -> dict[str, Any]:
    """Arguments of `ray.init`: none inside a submitted job or beside a named cluster, else a local Ray.

    The dashboard stays on, at loopback only: Ray Train frees the workers of stopped trials by asking it.
    """
    if os.environ.get("RAY_ADDRESS"):
        return {}
    return {
        # Else it would join whatever cluster was last started on this machine, alive or not.
        "address": "local",
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "logging_level": logging.ERROR,
    }


def start(options: Callable[[], dict[str, Any]]) -> bool:
    """Start or join Ray unless this process has; returns whether it was done here.

    Raises UserError where the cluster to join does not answer, or a local one does not come up.
    """
    # Ray would fold equal-looking progress lines of parallel branches into one, and reads this when imported.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(CONTROL_TIMEOUT_S))
        # Nobody takes this machine away with a warning: a process less to start in each training.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # A process a core, started ahead for tasks without an environment of their own; `submit` gives all of ours one.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    with _on_loopback():
        return _start(options)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A local Ray that is started within has its node at 127.0.0.1 and binds all its sockets to that.

    Ray does so where it knows no clusters of several machines; else its services and metrics, which ask for no token,
    listen at every interface. It reads the setting when it is imported, and where it is told to join a cluster, which
    it then refuses: so it is there for no longer than the start.
    """
    setting = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    if os.environ.get("RAY_ADDRESS") or setting in os.environ or "ray" in sys.modules:
        yield
        return
    os.environ[setting] = "0"
    try:
        yield
    finally:
        del os.environ[setting]


def _start(options: Callable[[], dict[str, Any]]) -> bool:
    import ray

    if ray.is_initialized():
        return False
    chosen = options()
    before = psutil.Process().children(recursive=True)
    try:
        context: Any = ray.init(**chosen)
        if chosen.get("address") == "local":
            ray_logs.own_session(context.address_info["session_dir"])
    except ConnectionError as error:
        address = chosen.get("address") or os.environ.get("RAY_ADDRESS")
        raise UserError(
            f"the Ray cluster at {address} does not answer or refuses this user's token; "
            "start it, correct RAY_ADDRESS, or unset it to run on this machine"
        ) from error
    except Exception as error:
        # Ray says so with a bare Exception when its processes are not up in time.
        if type(error) is not Exception:
            raise
        raise UserError(f"Ray could not start on this machine: {' '.join(str(error).split())}") from error
    except BaseException:
        global is_broken_off
        is_broken_off = True
        # Broken off half-way, Ray does not know what it has started.
        _kill([one for one in psutil.Process().children(recursive=True) if one not in before])
        raise
    return True


def stop() -> None:
    """Leave Ray; a local one ends with it."""
    import ray

    # What is still starting then would look for its node manager for ten seconds.
    raylets = _own_raylets()
    left = [one for raylet in raylets for one in _descendants(raylet)]
    sockets = {
        word.partition("=")[2]
        for raylet in raylets
        for word in _command_line(raylet)
        if word.startswith("--raylet_socket_name=")
    }
    ray.shutdown()
    for process in psutil.process_iter() if sockets else ():
        if not sockets.isdisjoint(word.removeprefix("--raylet-name=") for word in _command_line(process)):
            left.append(process)
    _kill(left)


def _own_raylets() -> list[psutil.Process]:
    """The node managers of the local Rays that this process started: their workers are children of theirs."""
    return [one for one in psutil.Process().children() if "".join(_command_line(one)[:1]).endswith("/raylet")]


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _command_line(process: psutil.Process) -> list[str]:
    """Empty where the process is gone or another user's."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def wants_gpu(use_gpu: bool | None) -> bool:
    """`use_gpu`, or where it is None whether the cluster has a GPU or starts a node with one when it is asked for.

    Raises UserError for a GPU that is neither there nor can come.
    """
    if use_gpu is False:
        return False
    import ray

    if ray.cluster_resources().get("GPU", 0) > 0:  # type: ignore[no-untyped-call]
        return True
    if cluster_growth.will_come({"GPU": 1}):
        print("no node with a GPU is up; the autoscaler starts one, which takes minutes", flush=True)
        return True
    if use_gpu:
        raise UserError(
            "runtime.use_gpu is true, but this cluster has no GPU and no node type with one; set it to false or add "
            "GPU workers"
        )
    return False


def workers_that_fit(use_gpu: bool | None, cpus: int) -> int:
    """How many workers of one GPU, or else of that many CPUs, the cluster as it is has room for; 1 at least.

    Raises UserError as `wants_gpu` does.
    """
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    rooms = resources.get("GPU", 0) if wants_gpu(use_gpu) else resources.get("CPU", 0) / cpus
    return max(1, int(rooms))


def submit(fn: Callable[..., Any], *args: Any, name: str, max_retries: int) -> Any:
    """Start a task on the driver's own node, where the tracking store is within reach; returns its reference.

    It takes no CPU, for the heavy work is in the tasks it starts; its share of the node bounds how many run
    at once.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray ends the process that asks another cluster than it knows for its nodes.
    require_cluster()
    context = ray.get_runtime_context()
    node_id = context.get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    address = next(node["NodeManagerAddress"] for node in nodes if node["NodeID"] == node_id)
    task = ray.remote(fn).options(
        name=name,
        num_cpus=0,
        max_retries=max_retries,
        resources={f"node:{address}": 1 / (STEPS_PER_CORE * (os.cpu_count() or 1))},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        # What frees the workers of killed training runs looks for a cluster by itself, and gives up where it finds
        # two on one machine.
        runtime_env={"env_vars": {"RAY_ADDRESS": context.gcs_address}},
    )
    return task.remote(*args)


def require_cluster() -> None:
    """Raise UserError where the head of the cluster was started anew: what ran there is waited for for ever.

    A head that keeps its state elsewhere (Redis) is the same one. One that does not answer yet is no sign of either.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        _internal_kv_get(b"session_name", namespace=b"session")
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            "the head of the Ray cluster was started anew, and what ran there is lost; run the same command again: it "
            "goes on with what had finished"
        ) from error
    except ray.exceptions.RpcError:
        return


def wait(object_refs: Sequence[Any], timeout_s: float) -> set[Any]:
    """The references that are ready; returns as soon as one is, or after the timeout."""
    import ray

    ready, _ = ray.wait(list(object_refs), num_returns=1, timeout=timeout_s)
    if ready:
        ready, _ = ray.wait(list(object_refs), num_returns=len(object_refs), timeout=0)
    return set(ready)


def get(object_ref: Any) -> Any:
    """The task's result; raises what the task, or the death of its process, left."""
    import ray

    return ray.get(object_ref)


def cancel(object_refs: Sequence[Any]) -> None:
    """End the processes of running tasks, and with them all that those started; drop tasks that wait.

    An interrupt would be gentler, but it can strike in the middle of an import and leave a process that answers
    later tasks with nonsense.
    """
    pending = [object_ref for object_ref in object_refs if object_ref is not None]
    if not pending:
        return
    import ray

    if not ray.is_initialized():
        return
    with _workers_held():
        for object_ref in pending:
            ray.cancel(object_ref, force=True)
    ray.wait(pending, num_returns=len(pending), timeout=CANCEL_TIMEOUT_S)


@contextmanager
def _workers_held() -> Iterator[None]:
    """Within, no worker of a local Ray ends its task; those of a cluster that was joined go on.

    Where one did in the moment in which Ray is asked to cancel it, Ray would abort this process (2.60; a failed check
    in its task manager), and leave what it has started to itself.
    """
    held = [worker for raylet in _own_raylets() for worker in _descendants(raylet)]
    try:
        for worker in held:
            with suppress(psutil.Error):
                worker.suspend()
        time.sleep(SETTLE_S)
        yield
    finally:
        for worker in held:
            with suppress(psutil.Error):
                worker.resume()
