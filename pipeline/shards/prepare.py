"""From a raw data set to a shard set: one task a shard, then index and manifest from the rows they left.

Nothing but a summary of each shard and 8 bytes an image come back to the caller's process.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import exported_metrics, storage
from pipeline.config import DataConfig
from pipeline.datasets import RawDataset, open_dataset
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.shards.balance import allows_missing_classes, count_in_index, missing_classes
from pipeline.shards.duplicates import Position, find_duplicates
from pipeline.shards.grey_levels import common_range
from pipeline.shards.listing import Listing
from pipeline.shards.shard_check import check_shard_set
from pipeline.shards.shard_task import (
    ROWS,
    Duplicate,
    ShardResult,
    clashing_colours,
    explain_duplicate,
    explain_rejection,
    prepare_shard,
    publish_parquet,
    read_column,
    read_rows,
    revise_shard,
    rows_name,
)
from pipeline.shards.shards import INDEX_SCHEMA, QUARANTINE_SCHEMA, Manifest, ShardEntry, ShardSetError, read_manifest
from pipeline.storage.names import INDEX, MANIFEST, QUARANTINE
from pipeline.workflow.lease import Lease
from pipeline.workflow.progress import Progress, StepProgress, eta_text, percent_text
from segvit.grey_range import GreyRange
from segvit.image_files import IGNORE_INDEX

PROGRESS_INTERVAL_S = 2.0
ROW_GROUP_ROWS = 1 << 16
READ_THREADS = 8
MOST_NAMED = 4  # bad samples in a message

Report = Callable[[str], None]
Results = dict[str, ShardResult]  # by the shard's name


def prepare_shards(
    config: DataConfig,
    target: str,
    *,
    max_tasks: int = 8,
    progress: Report | None = None,
    lease: Lease | None = None,
    step: StepProgress | None = None,
) -> ShardSet:
    """Write the shard set that `config` describes to the folder `target`; what is there and valid is kept.

    Runs as Ray tasks, `max_tasks` at a time, where Ray is initialised, and in this process where it is not.
    `progress` gets a line every few seconds and one with the sums at the end; None prints them. Raises UserError
    for a missing data root, for a bad sample under the policy `fail`, for more of them than the policy `quarantine`
    allows, and for classes without a pixel unless these are allowed. A duplicate image is a bad sample, too. Where
    others may write to `target`, `lease` is the right to do so; raises LeaseLost where it went to another. Where a flow
    runs it, `step` is told how far it is.
    """
    report = progress or (lambda line: print(line, flush=True))
    if storage.is_local(target):
        # Tasks on other processes resolve relative paths against folders of their own.
        target = str(storage.local_path(target))
    dataset = open_dataset(config)
    with Listing(dataset, config) as listing:
        current = _find_current(target, dataset, listing, config, report)
        if current is not None:
            report(f"prepare {dataset.name}: the shard set at {target} is up to date")
            return current
        run = _Run(dataset, listing, target, config, max_tasks, lease)
        run.check_lease()
        storage.remove_files(target, [MANIFEST])
        results = _check_all(run, report, step)
        grey_range = common_range(dataset.name, config, results.values(), report)
        _revise_shards(run, results, grey_range, report)
        run.check_lease()
        shard_set = _publish_set(run, results, grey_range, report)
    num_good = sum(result.num_samples for result in results.values())
    report(
        f"prepare {dataset.name}: {listing.num_samples} images = {num_good} in {len(results)} shards "
        f"+ {shard_set.num_quarantined} in {QUARANTINE}; published {target}"
    )
    return shard_set


class _Run:
    """What is to be prepared, and where its tasks run."""

    def __init__(
        self,
        dataset: RawDataset,
        listing: Listing,
        target: str,
        config: DataConfig,
        max_tasks: int,
        lease: Lease | None,
    ) -> None:
        self.dataset = dataset
        self.listing = listing
        self.target = target
        self.config = config
        self._max_tasks = max_tasks
        self.check_lease: Callable[[], None] = lambda: None if lease is None else lease.check()

    def run_tasks(self, work: Callable[..., ShardResult], jobs: Iterable[tuple[Any, ...]]) -> Generator[ShardResult]:
        """The results of `work(dataset, plan, target, config, *rest)` as they come, for each (plan, *rest)."""
        # Whoever initialised Ray has imported it; importing it here would cost a second for nothing.
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            for plan, *rest in jobs:
                self.check_lease()
                yield work(self.dataset, plan, self.target, self.config, *rest)
            return
        import ray

        task, shared = ray.remote(work), ray.put(self.dataset)
        waiting, running = iter(jobs), list[Any]()
        try:
            while True:
                # Plans are read from disk when there is room for their task, never all at once.
                while len(running) < self._max_tasks and (job := next(waiting, None)) is not None:
                    self.check_lease()
                    running.append(task.remote(shared, job[0], self.target, self.config, *job[1:]))
                if not running:
                    return
                done, running = ray.wait(running, num_returns=1)
                yield ray.get(done[0])
        except (Exception, GeneratorExit) as error:
            # What is under way, a shard each, may end. Where Ray is asked to cancel a task that ends in that moment, it
            # aborts this process (2.60; a failed check in its task manager), and what is raised here would be lost.
            if running:
                ray.wait(running, num_returns=len(running))
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, UserError):
                raise error.cause from None
            raise


def _check_all(run: _Run, report: Report, step: StepProgress | None) -> Results:
    """All shards, checked sample by sample and published, duplicates still in them, images of 16 bits perhaps not."""
    meter = _Meter(run.dataset.name, run.listing, report, step)
    results: Results = {}
    bad: list[dict[str, str]] = []
    colours: dict[str, tuple[list[int], str]] = {}
    jobs = ((run.listing.load(shard),) for shard in run.listing.shards)
    with contextlib.closing(run.run_tasks(prepare_shard, jobs)) as finished:
        for result in finished:
            results[result.name] = result
            meter.advance(result)
            clash = clashing_colours(colours, result.index_colours)
            if clash is not None:
                # Which of the two is right, and so which samples would be quarantined, cannot be told.
                raise UserError(str(clash))
            colours |= result.index_colours
            if result.first_rejected is not None:
                bad.append(result.first_rejected)
                if run.config.on_bad_sample == "quarantine":
                    _apply_policy(run.config, meter.num_rejected, run.listing.num_samples, bad)
                elif len(bad) == 1:
                    report(f"prepare {run.dataset.name}: {explain_rejection(bad[0])}. Looking for others")
    if bad:
        order = {shard.name: number for number, shard in enumerate(run.listing.shards)}
        known = sorted(results.values(), key=lambda result: order[result.name])
        bad = [result.first_rejected for result in known if result.first_rejected is not None]
        _apply_policy(run.config, meter.num_rejected, run.listing.num_samples, bad)
    return results


def _revise_shards(run: _Run, results: Results, grey_range: GreyRange | None, report: Report) -> None:
    """Publish those shards again that hold an image which is elsewhere, too, or that wait for the grey range.

    Changes `results`.
    """
    ordered = [results[shard.name] for shard in run.listing.shards]
    found = find_duplicates(ordered, lambda shard: read_column(run.target, shard, "image_sha256"))
    wanted = _name_duplicates(run, found)
    if wanted:
        first = next(iter(wanted.values()))[0]
        num_bad = len(found) + sum(result.num_rejected for result in ordered)
        _apply_policy(run.config, num_bad, run.listing.num_samples, [explain_duplicate(first)])
    unlike = {name for name, one in results.items() if one.duplicates != tuple(wanted.get(name, ()))}
    if unlike:
        report(f"prepare {run.dataset.name}: {len(found)} duplicate images; writing {len(unlike)} shards without them")
    unscaled = {name for name, one in results.items() if one.num_deep and one.grey_range != grey_range}
    if unscaled:
        report(f"prepare {run.dataset.name}: writing {len(unscaled)} shards with their images scaled to 8 bits")
    changed = [shard for shard in run.listing.shards if shard.name in unlike | unscaled]
    jobs = ((run.listing.load(shard), wanted.get(shard.name, []), grey_range) for shard in changed)
    with contextlib.closing(run.run_tasks(revise_shard, jobs)) as finished:
        for result in finished:
            results[result.name] = result


def _name_duplicates(run: _Run, found: dict[Position, Position]) -> dict[str, list[Duplicate]]:
    """By shard, in the order of the data set: what to leave out, with the files' names."""
    rows: defaultdict[str, set[int]] = defaultdict(set)
    for position in {*found, *found.values()}:
        rows[position.shard].add(position.row)
    files: dict[Position, str] = {}
    splits: dict[str, str] = {}
    for shard in run.listing.shards:
        if shard.name in rows:
            splits[shard.name] = shard.split
            by_key = {sample.key: sample.image for sample in run.listing.load(shard).samples}
            keys = read_column(run.target, shard.name, "key")
            files |= {Position(shard.name, row): by_key[keys[row]] for row in rows[shard.name]}
    named: dict[str, list[Duplicate]] = {name: [] for name in splits}
    for position in sorted(found, key=lambda position: position.row):
        kept = found[position]
        same_as = f"{files[kept]} of split {splits[kept.shard]}"
        named[position.shard].append(Duplicate(position.row, files[position], same_as))
    return {name: duplicates for name, duplicates in named.items() if duplicates}


def _publish_set(run: _Run, results: Results, grey_range: GreyRange | None, report: Report) -> ShardSet:
    """Index, quarantine and, last, the manifest."""
    splits = {
        split: [results[shard.name] for shard in run.listing.shards if shard.split == split]
        for split in run.listing.splits
    }
    assert all(one.grey_range == grey_range for one in results.values() if one.num_deep), "images were left unscaled"
    for split, shards in splits.items():
        if not any(shard.num_samples for shard in shards):
            raise UserError(f"no sample of split {split!r} is good; mend the data set {run.dataset.name}")
    _sweep(run.target, {name for shard in results for name in (shard, rows_name(shard))})
    quarantined = [QUARANTINE_SCHEMA.empty_table()]
    index = (table for shards in splits.values() for table in _row_groups(run, shards, quarantined))
    index_uri, quarantine_uri = (storage.join(run.target, name) for name in (INDEX, QUARANTINE))
    num_good = publish_parquet(index_uri, index, INDEX_SCHEMA)
    num_bad = publish_parquet(quarantine_uri, [pa.concat_tables(quarantined)], QUARANTINE_SCHEMA)
    assert num_good + num_bad == run.listing.num_samples, (
        f"{run.listing.num_samples} samples went in, {num_good} + {num_bad} came out"
    )
    _check_classes(run.target, run.dataset, run.config, report)
    manifest = Manifest(
        name=run.dataset.name,
        classes=run.dataset.class_names,
        palette=run.dataset.palette,
        ignore_index=IGNORE_INDEX,
        grey_range=grey_range,
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
            for split, shards in splits.items()
        },
        num_quarantined=num_bad,
        source_digest=run.dataset.source_digest(),
        plan_digest=run.listing.digest,
        index_sha256=storage.file_digest(index_uri),
        quarantine_sha256=storage.file_digest(quarantine_uri),
    )
    storage.publish_json(storage.join(run.target, MANIFEST), manifest.model_dump(mode="json"))
    return manifest.to_record(run.target)


def _row_groups(run: _Run, shards: Sequence[ShardResult], quarantined: list[pa.Table]) -> Iterator[pa.Table]:
    """The index of one split in tables of some size; the quarantine's parts go to `quarantined`."""
    step = max(1, ROW_GROUP_ROWS // run.config.samples_per_shard)
    # Threads, because each file of a remote store keeps us waiting, and there is one a shard.
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for start in range(0, len(shards), step):
            names = [shard.name for shard in shards[start : start + step]]
            parts = list(pool.map(read_rows, [run.target] * len(names), names))
            quarantined += [rejected for _, rejected in parts if len(rejected)]
            yield pa.concat_tables([rows for rows, _ in parts])


def _check_classes(target: str, dataset: RawDataset, config: DataConfig, report: Report) -> None:
    """Raise UserError, or say it where it is allowed, for classes that train or val shows no pixel of."""
    counts = {split: count_in_index(target, len(dataset.class_names), split) for split in ("train", "val")}
    found = missing_classes(dataset.name, dataset.class_names, config, counts)
    if found is None:
        return
    if not allows_missing_classes(config):
        raise UserError(found)
    report(f"prepare {found}")


def _apply_policy(config: DataConfig, num_bad: int, num_samples: int, bad: Sequence[Mapping[str, str]]) -> None:
    """Raise UserError where the policy does not let `num_bad` of `num_samples` samples, `bad` among them, pass."""
    first = explain_rejection(bad[0])
    if config.on_bad_sample == "fail":
        if num_bad == 1:
            raise UserError(first)
        others = ", ".join(row["file"] for row in bad[1:MOST_NAMED])
        raise UserError(
            f"{num_bad} of {num_samples} samples are bad; segvit check lists all of them. The first: {first}"
            + (f"\nOthers: {others}" if others else "")
        )
    if num_bad > config.max_quarantined_fraction * num_samples:
        raise UserError(
            f"{num_bad} of {num_samples} samples are bad, more than data.max_quarantined_fraction "
            f"{config.max_quarantined_fraction:g} allows; mend them or raise it. The first: {first}"
        )


def _find_current(
    target: str, dataset: RawDataset, listing: Listing, config: DataConfig, report: Report
) -> ShardSet | None:
    """The shard set at `target` where it is whole and was made by the same plan."""
    try:
        manifest = read_manifest(target)
        if manifest.plan_digest != listing.digest:
            return None
        shard_set = check_shard_set(target).shard_set
    except ShardSetError:
        return None
    if manifest.num_quarantined:
        with storage.open_uri(storage.join(target, QUARANTINE)) as file:
            bad = next(pq.ParquetFile(file).iter_batches(MOST_NAMED)).to_pylist()
        _apply_policy(config, manifest.num_quarantined, listing.num_samples, bad)
    _check_classes(target, dataset, config, report)
    # A store without renaming may have kept the manifest's temporary copy when the last run was killed.
    _sweep(target, {name for shard in listing.shards for name in (shard.name, rows_name(shard.name))})
    return shard_set


def _sweep(target: str, keep: set[str]) -> None:
    """Remove shards and rows of former plans, and what killed tasks left half written."""
    names = [name for name in storage.list_names(target) if ".tar" in name or name.endswith(storage.PARTIAL)]
    rows = [f"{ROWS}/{name}" for name in storage.list_names(storage.join(target, ROWS))]
    storage.remove_files(target, [name for name in [*names, *rows] if name not in keep])


class _Meter:
    """Counts what is done and reports it with the rate and the time left; `step` is told more often."""

    def __init__(self, dataset: str, listing: Listing, report: Report, step: StepProgress | None) -> None:
        self.dataset = dataset
        self.num_shards = len(listing.shards)
        self.num_samples = listing.num_samples
        self.num_rejected = 0
        self._report = report
        self._step = step
        self._splits = {shard.name: shard.split for shard in listing.shards}
        self._start = self._last = time.monotonic()
        self._shards = self._done = 0

    def advance(self, result: ShardResult) -> None:
        """Count a finished shard; report when it is the last, or enough time has passed."""
        self._shards += 1
        self._done += result.num_samples + result.num_quarantined
        self.num_rejected += result.num_rejected
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        left = (self.num_samples - self._done) / max(rate, 1e-9)
        if self._step is not None:
            self._tell(self._step, result, rate, left)
        if self._shards < self.num_shards and now - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = now
        self._report(
            f"prepare {self.dataset}: {self._shards}/{self.num_shards} shards, "
            f"{self._done}/{self.num_samples} images ({percent_text(self._done / self.num_samples)}), "
            f"{self.num_rejected} rejected, {rate:.0f} images/s, ETA {eta_text(left)}"
        )

    def _tell(self, step: StepProgress, result: ShardResult, rate: float, seconds_left: float) -> None:
        split = {"split": self._splits[result.name]}
        step.export(exported_metrics.PREPARED_SAMPLES, result.num_samples + result.num_quarantined, split)
        step.export(exported_metrics.REJECTED_SAMPLES, result.num_rejected, split)
        step.export(exported_metrics.PREPARE_RATE, rate)
        rejected = f", {self.num_rejected} rejected" if self.num_rejected else ""
        step.tell(
            Progress(
                done=self._done,
                total=self.num_samples,
                unit="images",
                rate=rate,
                seconds_left=seconds_left,
                note=f"{self._shards}/{self.num_shards} shards{rejected}",
            )
        )
