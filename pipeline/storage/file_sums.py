"""sha256 sums of files, cached on this machine: a file is read again only when it may have changed.

Whether it may have is told by its stamp (`file_stamps`). Locally that holds size, inode, and the times of
change of content and of attributes: the last is the kernel's own and follows every write, also one whose
modification time was set back. In an object store it holds the ETag or the like. What a sum cannot tell: bytes that
a disk flips under a file without a write.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import storage
from pipeline.storage.file_stamps import FileStamp

SUMS_AT_ONCE = 4


class FileSums:
    """Sums of the files below one folder, kept in one small file of the user's cache.

    Args:
        uri: the folder.
        cache_folder: where sums are kept; None: `segvit/sums` in the user's cache folder.
    """

    def __init__(self, uri: str, cache_folder: Path | None = None) -> None:
        if cache_folder is None:
            cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "segvit" / "sums"
        self.uri = uri
        canonical_uri = str(storage.local_path(uri)) if storage.is_local(uri) else uri
        self._file = cache_folder / f"{hashlib.sha256(canonical_uri.encode()).hexdigest()[:32]}.json"
        self._sums: dict[str, list[object]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):
            known = storage.read_json(str(self._file))
            self._sums = known if isinstance(known, dict) else {}

    def cached(self, name: str, stamp: FileStamp) -> str | None:
        """The sum of the file while it is as it was when it was read."""
        row = self._row(name)
        return str(row[2]) if row and row[:2] == list(stamp) else None

    def last_known(self, name: str) -> str | None:
        """The sum that the file had when it was read last, whatever became of it."""
        row = self._row(name)
        return str(row[2]) if row else None

    def add(self, name: str, stamp: FileStamp, digest: str) -> None:
        """Keep the sum of a file; one that storage gives no stamp is read every time."""
        if stamp.stamp:
            self._sums[name] = [*stamp, digest]
            self._changed = True

    def sums(self, stamps: dict[str, FileStamp], names: Sequence[str] | None = None) -> dict[str, str]:
        """Sums of `names` (None: of all in `stamps`); what is not cached is read, and then cached.

        Raises OSError for a file that cannot be read.
        """
        wanted = list(stamps) if names is None else list(names)
        unknown = [name for name in wanted if self.cached(name, stamps[name]) is None]
        uris = [storage.join(self.uri, name) for name in unknown]
        with ThreadPoolExecutor(SUMS_AT_ONCE) as pool:
            found = dict(zip(unknown, pool.map(storage.file_digest, uris), strict=True))
        for name, digest in found.items():
            self.add(name, stamps[name], digest)
        return {name: found.get(name) or str(self.cached(name, stamps[name])) for name in wanted}

    def save(self) -> None:
        """Write the cache; a machine without room for it reads again."""
        if self._changed:
            with contextlib.suppress(OSError):
                storage.publish_json(str(self._file), self._sums)

    def _row(self, name: str) -> list[object] | None:
        row = self._sums.get(name)
        return row if isinstance(row, list) and len(row) == 3 else None
