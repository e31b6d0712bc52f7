"""The search for settings on Ray Tune: Optuna proposes, ASHA stops the hopeless, a trial is a short training run.

A search that was killed, at any instant and wherever it ran, goes on from its record: ended trials are kept, unfinished
ones continue from their last checkpoints, and what is proposed next is what would have been.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

import ray.tune

from pipeline import storage
from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.records import SearchResult
from pipeline.shards.shard_check import check_shard_set
from pipeline.storage.names import TRIALS_FILE, TRIALS_FOLDER
from pipeline.training.job import TrainJob
from pipeline.tuning.driver import SearchDriver, run_trials
from pipeline.tuning.record import (
    SearchRecord,
    TrialRecord,
    TrialUris,
    best_trial,
    max_failed,
    remove_folder,
    summaries,
)
from pipeline.tuning.space import default_space
from pipeline.tuning.tracking import TrialRuns
from pipeline.tuning.trial import in_process, run_trial, trial_resources
from pipeline.workflow.lease import Lease
from pipeline.workflow.progress import StepProgress
from pipeline.workflow.step_log import current_log
from pipeline.workflow.tracking import Tracking


def search_settings(
    job: TrainJob,
    tune: TuneConfig,
    *,
    run_name: str,
    storage_uri: str,
    target_uri: str,
    lease: Lease,
    tracking: Tracking,
    parent_run_id: str,
    progress: StepProgress | None = None,
) -> SearchResult:
    """Search the settings of `tune.space`, by default the loss weights, for the highest val mIoU.

    Args:
        job: the training run whose settings are searched; what is not searched stays as it is there.
        tune: space and budget.
        run_name: the search's name; it and `target_uri` are those of any earlier start of the same search.
        storage_uri: where Ray keeps its own state while it runs.
        target_uri: folder of the search's record; it receives trials.json.
        lease: the right to write to both.
        tracking: the MLflow store.
        parent_run_id: the step's run, below which the trials' runs go.
        progress: where to tell how far it is.

    Raises:
        UserError: more trials failed than `tune` allows, or all; the message carries the first one's cause. The next
            start tries the failed ones again.
    """
    check_shard_set(job.shard_set, ["train", "val"], log=print)
    tune = tune.model_copy(update={"space": tune.space or default_space(job.settings)})
    record = SearchRecord.take_over(storage.join(target_uri, TRIALS_FOLDER), tune, lease)
    retry_failed(record, tune)
    ray_uri = storage.join(storage_uri, run_name)
    uris = TrialUris(uri=record.uri, lease=lease, train_uri=ray_uri, step_log=current_log())
    runs = TrialRuns(tracking, parent_run_id, run_name)
    runs.settle(record.trials.values())
    configured = {path: job.settings.value(path) for path in tune.space}
    driver = SearchDriver(tune, configured, record, runs, uris.discard, progress)
    if driver.num_waiting:
        _print_restored(record)
        # Ray Tune's own progress table repeats what the trials print.
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        _remove_sessions(ray_uri)
        run_trials(
            driver,
            ray.tune.with_parameters(run_trial, job=job, tune=tune, uris=uris),
            resources=trial_resources(job.runtime),
            trials_at_once=job.runtime.trials_at_once,
            share_processes=in_process(job.runtime),
            session_uri=ray_uri,
            session_name=f"session-{lease.rank.number}",
        )
    trials = record.in_state("finished", "stopped", "failed")
    require_success(tune, trials)
    # A store that was away while trials ended has another chance.
    runs.settle(trials)
    lease.check()
    result = publish_trials(record, target_uri, job.variant)
    for trial in trials:
        # The last start may have died between a trial's end and this.
        uris.discard(trial.number)
    lease.check()
    with suppress(OSError):
        remove_folder(ray_uri)
    return result


def retry_failed(record: SearchRecord, tune: TuneConfig) -> None:
    """Put failed trials back to waiting where they had ended the search; few enough are a result and stay."""
    failed = record.in_state("failed")
    if len(failed) > max_failed(tune) or len(failed) == tune.num_trials:
        for trial in failed:
            record.change(trial.number, state="running", cause=None)


def require_success(tune: TuneConfig, trials: Sequence[TrialRecord]) -> None:
    """Raise UserError, with the first cause, where too many of the ended `trials` failed."""
    failed = [trial for trial in trials if trial.state == "failed"]
    if not failed:
        return
    first = f"the first one: trial {failed[0].number}, {failed[0].cause}"
    if len(failed) > max_failed(tune):
        raise UserError(
            f"{len(failed)} of {tune.num_trials} search trials failed, tune.max_failed_fraction "
            f"{tune.max_failed_fraction:g} allows {max_failed(tune)}; {first}"
        )
    if len(failed) == tune.num_trials:
        raise UserError(f"all {len(failed)} search trials failed; {first}")


def publish_trials(record: SearchRecord, target_uri: str, variant: str) -> SearchResult:
    """Write trials.json, all of it or none, and name the best trial's values."""
    trials = record.in_state("finished", "stopped", "failed")
    best = best_trial(trials)
    assert best is not None, "a search without a scored trial has failed"
    rows = [row.model_dump(mode="json") for row in summaries(trials)]
    trials_uri = storage.join(target_uri, TRIALS_FILE)
    storage.publish_json(trials_uri, rows)
    return SearchResult(
        variant=variant,
        values=best.values,
        miou=best.miou,
        num_trials=len(trials),
        trials_uri=trials_uri,
        trials_digest=storage.file_digest(trials_uri),
    )


def _print_restored(record: SearchRecord) -> None:
    ended, unfinished = record.in_state("finished", "stopped", "failed"), record.in_state("running")
    if ended or unfinished:
        print(f"search: {len(ended)} trials are kept, {len(unfinished)} continue", flush=True)


def _remove_sessions(ray_uri: str) -> None:
    """What killed starts of the search left of Ray Tune's own state; nothing reads it."""
    for name in storage.list_names(ray_uri):
        if name.startswith("session-"):
            remove_folder(storage.join(ray_uri, name))
