"""The checksums on a step's outputs: sums of all files it left, kept with its record and checked before every reuse.

One flipped byte breaks it, with or without a change of the file's times (pipeline.storage.file_sums says what is
guaranteed); outputs that did not change cost a listing. A shard set is not summed here, its manifest does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from pipeline import storage
from pipeline.records import Record, ShardSet
from pipeline.storage.file_stamps import file_stamps
from pipeline.storage.file_sums import FileSums


def output_checksums(record: Record, output_uri: str) -> dict[str, str]:
    """A sum for each file or folder that the record names at or below `output_uri`, by its URI.

    What lies elsewhere is not the step's own: it may change without any damage.
    """
    inside = f"{output_uri.rstrip('/')}/"
    return {uri: _sum_of(uri) for uri in sorted(set(_named(record))) if f"{uri.rstrip('/')}/".startswith(inside)}


def changed_outputs(checksums: Mapping[str, str]) -> str | None:
    """Which outputs are not those that were summed, or None. Raises OSError where they cannot be read."""
    for uri, expected in checksums.items():
        changed: list[str] = []
        if _sum_of(uri, changed) != expected:
            return f"{changed[0] if len(changed) == 1 else uri} has changed"
    return None


def _named(record: Record) -> Iterator[str]:
    if isinstance(record, ShardSet):
        return
    for name in type(record).model_fields:
        value = getattr(record, name)
        if isinstance(value, Record):
            yield from _named(value)
        elif isinstance(value, str) and (name == "uri" or name.endswith("_uri")) and not value.startswith("models:"):
            yield value


def _sum_of(uri: str, changed: list[str] | None = None) -> str:
    """One sum over the names and sums of all files; `changed` gets those that differ from when they were read."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    stamps = file_stamps(uri, recursive=True)
    if not stamps:
        beside = file_stamps(folder)
        uri, stamps = (folder, {name: beside[name]}) if name in beside else (uri, {})
    stamps = {name: stamp for name, stamp in stamps.items() if not name.endswith(storage.PARTIAL)}
    memory = FileSums(uri)
    known = {name: memory.last_known(name) for name in stamps}
    sums = memory.sums(stamps)
    if changed is not None:
        changed += [storage.join(uri, name) for name in stamps if known[name] not in (None, sums[name])]
    memory.save()
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
