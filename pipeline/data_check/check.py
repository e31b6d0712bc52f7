"""Everything that a raw data set holds and everything that is wrong with it: one pass over its files, nothing written.

Samples pass the very checks that they pass on their way into shards (`pipeline.shards.sample_check`); here the first
bad one does not end it.
"""

from __future__ import annotations

import functools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DataConfig
from pipeline.data_check.look import Look, look_at
from pipeline.data_check.near_duplicates import find_matches, stack
from pipeline.datasets import RawDataset, RawSample, list_splits, open_dataset
from pipeline.records import Record
from pipeline.shards.balance import ClassCounts, missing_classes
from pipeline.shards.shard_task import clashing_colours
from pipeline.shards.shards import evenly_spaced
from segvit.grey_range import GreyRange, join_ranges

NUM_EXAMPLES = 3
PROGRESS_INTERVAL_S = 2.0
_BATCH = 64

Report = Callable[[str], None]


class Problem(Record):
    """One thing that is wrong, however often; `example` is the whole message for the first file."""

    count: int
    example: str
    files: tuple[str, ...]


class SplitFacts(Record):
    """One split; `num_checked` of its samples were read, `num_good` of these can be used.

    `num_pixels` are those of good samples, `ignored_share` of these have no class.
    `sizes`: (height, width), pixels, of the smallest, the middle and the largest image by area.
    `class_pixels`, `class_images`: by class. `unknown`: ids or colours that no class has, with their pixels.
    """

    name: str
    num_samples: int
    num_checked: int
    num_good: int
    num_pixels: int
    ignored_share: float
    sizes: tuple[tuple[int, int], ...]
    kinds: dict[str, int]
    class_pixels: tuple[int, ...]
    class_images: tuple[int, ...]
    unknown: dict[str, int]


class SourceCheck(Record):
    """What `check_source` found; data with a problem cannot be prepared as they are.

    `grey_range`: of images with more than 8 bits a channel, the values that become black and white.
    """

    dataset: str
    root: str | None
    layout: tuple[str, ...]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    grey_range: tuple[float, float] | None
    splits: tuple[SplitFacts, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


class _Seen(NamedTuple):
    """The samples of a split that were looked at, and how many there are."""

    num_samples: int
    looks: list[Look]


def check_source(
    config: DataConfig, layout: Sequence[str] = (), max_samples: int | None = None, progress: Report = lambda _: None
) -> SourceCheck:
    """Read the samples of a raw data set, at most `max_samples` of each split and evenly spread, and judge them.

    `layout`: why it is taken for the data set that it is, a line each. Raises UserError where there is no data set
    of that layout at all.
    """
    dataset = open_dataset(config)
    seen: dict[str, _Seen] = {}
    with ThreadPoolExecutor() as pool:
        for split, samples in list_splits(dataset, config):
            chosen = [samples[index] for index in evenly_spaced(len(samples), max_samples).tolist()]
            looks = list(_look_at_all(pool, dataset, config, split, chosen, progress))
            seen[split] = _Seen(len(samples), looks)
    facts = {split: _facts_of(split, one, len(dataset.class_names)) for split, one in seen.items()}
    problems = [*_problems_of(seen), *_equal_images(config, seen)]
    warnings = [*_look_alike(seen)]
    classes = _missing_classes(dataset, config, facts)
    if classes and max_samples is not None:
        warnings.append(f"{classes}, in the samples that were looked at")
    elif classes:
        problems.append(Problem(count=1, example=classes, files=()))
    return SourceCheck(
        dataset=dataset.name,
        root=config.root,
        layout=tuple(layout),
        class_names=dataset.class_names,
        palette=dataset.palette,
        grey_range=_grey_range(config, seen),
        splits=tuple(facts.values()),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def _look_at_all(
    pool: ThreadPoolExecutor,
    dataset: RawDataset,
    config: DataConfig,
    split: str,
    samples: Sequence[RawSample],
    progress: Report,
) -> Iterator[Look]:
    start = last = time.monotonic()
    done = num_bad = 0
    for first in range(0, len(samples), _BATCH):
        batch = samples[first : first + _BATCH]
        for look in pool.map(lambda sample: look_at(dataset, sample, config), batch):
            num_bad += look.rejected is not None
            yield look
        done += len(batch)
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S or (done == len(samples) and now - start >= PROGRESS_INTERVAL_S):
            last = now
            left = round((len(samples) - done) * (now - start) / done)
            progress(f"check {split}: {done}/{len(samples)} images, {num_bad} bad, ETA {left // 60}:{left % 60:02d}")


def _facts_of(split: str, seen: _Seen, num_classes: int) -> SplitFacts:
    good = [look for look in seen.looks if look.rejected is None]
    pixels = np.array([look.class_pixels for look in good], np.int64).reshape(len(good), num_classes)
    num_pixels = sum(look.num_pixels for look in good)
    by_area = sorted((look.size for look in seen.looks if look.size[0]), key=lambda size: (size[0] * size[1], size))
    unknown: Counter[str] = Counter()
    for look in seen.looks:
        unknown.update(look.unknown)
    return SplitFacts(
        name=split,
        num_samples=seen.num_samples,
        num_checked=len(seen.looks),
        num_good=len(good),
        num_pixels=num_pixels,
        ignored_share=1 - int(pixels.sum()) / max(num_pixels, 1) if good else 0.0,
        sizes=tuple(by_area[index] for index in sorted({0, len(by_area) // 2, len(by_area) - 1}) if by_area),
        kinds=dict(Counter(look.kind for look in seen.looks if look.kind).most_common()),
        class_pixels=tuple(pixels.sum(axis=0).tolist()),
        class_images=tuple((pixels > 0).sum(axis=0).tolist()),
        unknown=dict(unknown.most_common()),
    )


def _problems_of(seen: dict[str, _Seen]) -> Iterator[Problem]:
    """Rejected samples by what is wrong with them, the most frequent first."""
    kinds: defaultdict[str, list[Look]] = defaultdict(list)
    for one in seen.values():
        for look in one.looks:
            if look.rejected is not None:
                kinds[_kind_of(look)].append(look)
    for looks in sorted(kinds.values(), key=len, reverse=True):
        files = tuple(look.rejected.file for look in looks[:NUM_EXAMPLES] if look.rejected is not None)
        yield Problem(count=len(looks), example=str(looks[0].rejected), files=files)
    colours: dict[str, tuple[list[int], str]] = {}
    for one in seen.values():
        for look in one.looks:
            found = {str(index): (list(colour), look.sample.label) for index, colour in look.index_colours.items()}
            clash = clashing_colours(colours, found)
            if clash is not None:
                yield Problem(count=1, example=str(clash), files=(clash.file,))
                return
            colours |= found


def _kind_of(look: Look) -> str:
    """What is wrong with a sample without what is its own: file names and figures."""
    assert look.rejected is not None
    text = f"{look.rejected.reason}; {look.rejected.remedy}"
    for own in (look.sample.image, look.sample.label):
        text = text.replace(own, "FILE")
    return re.sub(r"\d+", "N", text)


def _equal_images(config: DataConfig, seen: dict[str, _Seen]) -> Iterator[Problem]:
    """Images that are there twice, byte for byte: samples to be quarantined, like the bad ones."""
    first: dict[bytes, tuple[str, str]] = {}
    copies: list[tuple[str, str]] = []
    # Like the pass that leaves them out: what is scored stays.
    for split, one in sorted(seen.items(), key=lambda item: item[0] == "train"):
        for look in one.looks:
            if look.rejected is not None:
                continue
            file, its_split = first.setdefault(look.image_sha256, (look.sample.image, split))
            if file != look.sample.image:
                copies.append((look.sample.image, f"{file} of split {its_split}"))
    if copies:
        remedy = "remove one of them"
        if config.on_bad_sample == "fail":
            remedy += ", or set data.on_bad_sample: quarantine, which leaves copies out"
        example = f"{copies[0][0]} is the same image, byte for byte, as {copies[0][1]}; {remedy}"
        files = tuple(file for file, _ in copies[:NUM_EXAMPLES])
        yield Problem(count=len(copies), example=example, files=files)


def _look_alike(seen: dict[str, _Seen]) -> Iterator[str]:
    """Splits with images that look like images of train: what is learnt there is measured here."""
    if "train" not in seen:
        return
    train = [look for look in seen["train"].looks if look.frequencies is not None]
    hashes = _hashes(train)
    for split, one in seen.items():
        if split == "train":
            continue
        others = [look for look in one.looks if look.frequencies is not None]
        matches = list(find_matches(_hashes(others), hashes))
        pairs = [
            (others[match.first], train[match.second])
            for match in matches
            if others[match.first].image_sha256 != train[match.second].image_sha256
        ]
        if pairs:
            mine, its = pairs[0]
            yield (
                f"{len(pairs)} of {len(one.looks)} images of {split} look like images of train, such as "
                f"{mine.sample.image} like {its.sample.image}: scores on {split} will flatter. Keep frames of one "
                "video, and copies of one image, in one split (data.folder.group)"
            )


def _hashes(looks: Sequence[Look]) -> NDArray[np.float32]:
    return stack([look.frequencies for look in looks if look.frequencies is not None])


def _grey_range(config: DataConfig, seen: dict[str, _Seen]) -> GreyRange | None:
    """As `prepare` will have it, where all samples of train were looked at."""
    train = [look.grey_range for look in seen["train"].looks if look.grey_range] if "train" in seen else []
    return config.grey_range or functools.reduce(join_ranges, train, None) if train else None


def _missing_classes(dataset: RawDataset, config: DataConfig, facts: dict[str, SplitFacts]) -> str | None:
    counts = {
        split: ClassCounts(one.num_good, one.num_pixels, np.array(one.class_pixels), np.array(one.class_images))
        for split, one in facts.items()
    }
    return missing_classes(dataset.name, dataset.class_names, config, counts)
