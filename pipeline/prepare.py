"""From a raw data set to a shard set: one task a shard, then index and manifest from the rows they left.

Nothing but a summary of each shard comes back to the caller's process, however many samples there are.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, RawSample, open_dataset
from pipeline.datasets.raw import digest_of
from pipeline.decode import IGNORE_INDEX
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.shard_task import (
    ROWS,
    ShardPlan,
    ShardResult,
    explain_rejection,
    prepare_shard,
    publish_parquet,
    read_rows,
    remove_files,
    rows_name,
)
from pipeline.shards import (
    FORMAT_VERSION,
    INDEX,
    INDEX_SCHEMA,
    MANIFEST,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    Manifest,
    ShardEntry,
    ShardSetError,
    read_manifest,
    spread,
    verify_shard_set,
)

PROGRESS_INTERVAL_S = 2.0


def prepare_shards(
    config: DataConfig,
    target: str,
    *,
    max_tasks: int = 8,
    progress: Callable[[str], None] | None = None,
) -> ShardSet:
    """Write the shard set that `config` describes to the folder `target`; what is there and valid is kept.

    Runs as Ray tasks, `max_tasks` at a time, where Ray is initialised, and in this process where it is not.
    `progress` gets a line every few seconds; None prints them. Raises UserError for a missing data root, for
    a bad sample under the policy `fail`, and for more of them than the policy `quarantine` allows.
    """
    report = progress or (lambda line: print(line, flush=True))
    if storage.is_local(target):
        # Tasks on other processes resolve relative paths against folders of their own.
        target = str(storage.local_path(target))
    dataset = open_dataset(config)
    samples = {split: _choose_samples(dataset, split, config) for split in dataset.splits()}
    plans = [plan for split in samples for plan in _plan_shards(dataset, split, samples[split], config)]
    plan_digest = digest_of([plan.name, plan.digest] for plan in plans)
    current = _find_current(target, plan_digest, config)
    if current is not None:
        report(f"prepare {dataset.name}: the shard set at {target} is up to date")
        return current
    remove_files(target, [MANIFEST])
    meter = _Meter(dataset.name, plans, report)
    results: dict[str, ShardResult] = {}
    rejected: list[dict[str, str]] = []
    with contextlib.closing(_run_shards(dataset, plans, target, config, max_tasks)) as finished:
        for result in finished:
            results[result.name] = result
            rejected += result.rejected
            meter.advance(result)
            _apply_policy(config, rejected, meter.num_samples)
    ordered = {split: [results[plan.name] for plan in plans if plan.split == split] for split in samples}
    return _publish_set(dataset, target, ordered, plan_digest)


def _choose_samples(dataset: RawDataset, split: str, config: DataConfig) -> Sequence[RawSample]:
    samples = dataset.samples(split)
    if not samples:
        place = f" below {config.root}" if config.root else ""
        raise UserError(f"dataset {dataset.name} has no images in split {split!r}{place}; check data.root")
    keys: set[str] = set()
    for sample in samples:
        if sample.key in keys:
            raise UserError(f"{sample.image}: another image in split {split!r} has this name; rename one")
        keys.add(sample.key)
    return [samples[int(place)] for place in spread(len(samples), config.max_samples_per_split)]


def _plan_shards(
    dataset: RawDataset, split: str, samples: Sequence[RawSample], config: DataConfig
) -> Iterator[ShardPlan]:
    for number, start in enumerate(range(0, len(samples), config.samples_per_shard)):
        chosen = samples[start : start + config.samples_per_shard]
        identity = [FORMAT_VERSION, dataset.name, dataset.class_names]
        digest = digest_of([*identity, *([sample.key, sample.stamp] for sample in chosen)])
        yield ShardPlan(split, f"{split}-{number:05d}.tar", chosen, digest)


def _run_shards(
    dataset: RawDataset, plans: Sequence[ShardPlan], target: str, config: DataConfig, max_tasks: int
) -> Generator[ShardResult]:
    """The results as they come, with at most `max_tasks` tasks submitted at any time."""
    fail = config.on_bad_sample == "fail"
    # Whoever initialised Ray has imported it; importing it here would cost a second for nothing.
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        yield from (prepare_shard(dataset, plan, target, fail) for plan in plans)
        return
    import ray

    task, shared = ray.remote(prepare_shard), ray.put(dataset)
    waiting, running = deque(plans), list[Any]()
    try:
        while waiting or running:
            while waiting and len(running) < max_tasks:
                running.append(task.remote(shared, waiting.popleft(), target, fail))
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        for reference in running:
            ray.cancel(reference)


def _publish_set(
    dataset: RawDataset,
    target: str,
    results: dict[str, list[ShardResult]],
    plan_digest: str,
) -> ShardSet:
    """Index, quarantine and, last, the manifest."""
    for split, shards in results.items():
        if not any(shard.num_samples for shard in shards):
            raise UserError(f"no sample of split {split!r} is good; mend the data set {dataset.name}")
    every = [shard for shards in results.values() for shard in shards]
    _sweep(target, {name for shard in every for name in (shard.name, rows_name(shard.name))})
    tables = (read_rows(target, shard.name) for shard in every)
    publish_parquet(storage.join(target, INDEX), tables, INDEX_SCHEMA)
    _publish_quarantine(target, [row for shard in every for row in shard.rejected])
    manifest = Manifest(
        name=dataset.name,
        classes=dataset.class_names,
        palette=dataset.palette,
        ignore_index=IGNORE_INDEX,
        splits={
            split: tuple(
                ShardEntry(
                    name=shard.name,
                    sha256=shard.sha256,
                    num_bytes=shard.num_bytes,
                    num_samples=shard.num_samples,
                )
                for shard in shards
            )
            for split, shards in results.items()
        },
        num_quarantined=sum(len(shard.rejected) for shard in every),
        source_digest=dataset.source_digest(),
        plan_digest=plan_digest,
        index_sha256=storage.file_digest(storage.join(target, INDEX)),
        quarantine_sha256=storage.file_digest(storage.join(target, QUARANTINE)),
    )
    storage.publish_json(storage.join(target, MANIFEST), manifest.model_dump(mode="json"))
    return manifest.to_record(target)


def _apply_policy(config: DataConfig, rejected: Sequence[dict[str, str]], num_samples: int) -> None:
    if not rejected:
        return
    if config.on_bad_sample == "fail":
        raise UserError(explain_rejection(rejected[0]))
    if len(rejected) > config.max_quarantined_fraction * num_samples:
        raise UserError(
            f"{len(rejected)} of {num_samples} samples are bad, more than data.max_quarantined_fraction "
            f"{config.max_quarantined_fraction:g} allows; mend them or raise it. "
            f"The first: {explain_rejection(rejected[0])}"
        )


def _find_current(target: str, plan_digest: str, config: DataConfig) -> ShardSet | None:
    """The shard set at `target` where it is whole and was made by the same plan."""
    try:
        manifest = read_manifest(target)
        if manifest.plan_digest != plan_digest:
            return None
        shard_set = verify_shard_set(target, deep=True)
    except ShardSetError:
        return None
    if manifest.num_quarantined:
        with storage.open_uri(storage.join(target, QUARANTINE)) as file:
            rejected = pq.read_table(file).to_pylist()
        num_good = sum(split.num_samples for split in shard_set.splits.values())
        _apply_policy(config, rejected, num_good + len(rejected))
    return shard_set


def _publish_quarantine(target: str, rejected: Sequence[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(list(rejected), QUARANTINE_SCHEMA)
    publish_parquet(storage.join(target, QUARANTINE), [table], QUARANTINE_SCHEMA)


def _sweep(target: str, keep: set[str]) -> None:
    """Remove shards and rows of former plans, and what killed tasks left half written."""
    tars = [name for name in storage.list_names(target) if ".tar" in name]
    rows = [f"{ROWS}/{name}" for name in storage.list_names(storage.join(target, ROWS))]
    remove_files(target, [name for name in [*tars, *rows] if name not in keep])


class _Meter:
    """Counts what is done and reports it with the rate and the time left."""

    def __init__(self, dataset: str, plans: Sequence[ShardPlan], report: Callable[[str], None]) -> None:
        self.dataset = dataset
        self.num_shards = len(plans)
        self.num_samples = sum(len(plan.samples) for plan in plans)
        self._report = report
        self._start = self._last = time.monotonic()
        self._shards = self._good = self._rejected = 0

    def advance(self, result: ShardResult) -> None:
        """Count a finished shard; report when it is the last, or enough time has passed."""
        self._shards += 1
        self._good += result.num_samples
        self._rejected += len(result.rejected)
        now = time.monotonic()
        if self._shards < self.num_shards and now - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = now
        done = self._good + self._rejected
        rate = done / max(now - self._start, 1e-9)
        left = round((self.num_samples - done) / max(rate, 1e-9))
        self._report(
            f"prepare {self.dataset}: {self._shards}/{self.num_shards} shards, "
            f"{done}/{self.num_samples} images, {self._rejected} rejected, "
            f"{rate:.0f} images/s, ETA {left // 60}:{left % 60:02d}"
        )
