"""What a training run left in storage: which of its checkpoints are whole, and making it fit to go on.

Ray Train keeps checkpoints in folders and lists those it has in a file of its own, which it neither publishes by
rename nor checks against what lies in the folders. So before Ray reads a run again, the run is mended here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import fsspec
import ray

from pipeline import storage
from pipeline.training.checkpoint_files import STATE_FILE, damage_of
from pipeline.workflow.lease import Lease

# Ray Train's names.
RAY_LIST = "checkpoint_manager_snapshot.json"
RAY_PREFIX = "checkpoint_"

Log = Callable[[str], None]


class SavedCheckpoint(NamedTuple):
    """A whole checkpoint of a run.

    Attributes:
        val_miou: of its own step; -1 where it was not validated.
        best_miou: the best of the run up to it.
        finished: whether training ended with it.
    """

    name: str
    uri: str
    step: int
    val_miou: float
    best_miou: float
    train_seconds: float
    finished: bool = False


def repair_run(run_uri: str, keep: str, lease: Lease, log: Log = print) -> tuple[SavedCheckpoint, ...]:
    """Leave in the run only checkpoints to go on from, and a list of them that Ray can read.

    Removed are the remains of uploads that a kill ended, damaged checkpoints, and those that know of a better
    one (`keep` best) that is lost: going on from before it finds it again. Only the holder of the run's lease does
    that, so what is removed is at most the upload of one that was overtaken; its next one is refused.

    Returns:
        What is left, in the order of steps; nothing where the run starts anew.

    Raises:
        LeaseLost: another execution has the run; nothing of it is touched.
    """
    lease.check()
    found = [name for name in storage.list_names(run_uri) if name.startswith(RAY_PREFIX) and name != RAY_LIST]
    listed = listed_checkpoints(run_uri)
    kept = usable_checkpoints(run_uri, found if listed is None else listed, keep, log)
    names = {one.name for one in kept}
    if names != set(listed or ()):
        if listed is None:
            log(f"{run_uri}: Ray's list of checkpoints is gone or unreadable; made anew from {len(kept)} whole ones")
        lease.check()
        _write_list(run_uri, kept)
    elif not kept:
        storage.remove_files(run_uri, [RAY_LIST])
    for name in found:
        if name not in names:
            # It may be what a newer holder uploads, if this one was paused meanwhile.
            lease.check()
            _remove_folder(storage.join(run_uri, name))
    return kept


def listed_checkpoints(run_uri: str) -> list[str] | None:
    """The names of the checkpoints that Ray has on its list; None where it has none that it would read."""
    try:
        state = storage.read_json(storage.join(run_uri, RAY_LIST))
        if state["ray_version"] != ray.__version__:
            return None
        return [str(result["checkpoint_dir_name"]) for result in state["checkpoint_results"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def usable_checkpoints(run_uri: str, names: Sequence[str], keep: str, log: Log = print) -> tuple[SavedCheckpoint, ...]:
    """Those of the named checkpoints that are whole and, for `keep` best, whose best one is among them."""
    whole: list[SavedCheckpoint] = []
    for name in names:
        uri = storage.join(run_uri, name)
        reason = damage_of(uri)
        if reason is None:
            whole.append(SavedCheckpoint(name, uri, **storage.read_json(storage.join(uri, STATE_FILE))))
        else:
            log(f"checkpoint {uri} is not used: {reason}; training goes on from the one before it")
    whole.sort(key=lambda one: (one.step, one.name))
    while keep == "best" and whole and whole[-1].best_miou > max(one.val_miou for one in whole):
        lost = whole.pop()
        log(f"checkpoint {lost.uri} is not used: the best one before it is lost; training finds it again")
    return tuple(whole)


def chosen_checkpoint(checkpoints: Sequence[SavedCheckpoint], keep: str) -> SavedCheckpoint:
    """The one to publish: the best, of equals the latest, or the last."""
    return max(checkpoints, key=lambda one: (one.val_miou if keep == "best" else 0.0, one.step))


def _write_list(run_uri: str, checkpoints: Sequence[SavedCheckpoint]) -> None:
    if not checkpoints:
        storage.remove_files(run_uri, [RAY_LIST])
        return
    results: list[dict[str, Any]] = [
        {
            "version": 0,
            "checkpoint_dir_name": one.name,
            "metrics": {"step": float(one.step), "val_miou": one.val_miou},
        }
        for one in checkpoints
    ]
    # Ray's list runs from worst to best, and tells the order in time by the index.
    worst_first = sorted(range(len(results)), key=lambda index: (checkpoints[index].val_miou, index))
    state = {
        "ray_version": ray.__version__,
        "checkpoint_results": [results[index] for index in worst_first],
        "checkpoint_report_indices": worst_first,
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    storage.publish_bytes(storage.join(run_uri, RAY_LIST), json.dumps(state).encode())


def _remove_folder(uri: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.rm(path, recursive=True)
