"""The files of a training checkpoint, and whether they are whole; without the model that wrote them.

What leads a training, or looks at what one left, reads this and loads neither the model nor its libraries.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline import storage
from pipeline.storage.names import CONFIG_FILE, HISTORY_FILE, WEIGHTS_FILE

OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "state.json"
SUMS_FILE = "sums.json"
# Of averaged weights, where there are any.
TRAINED_FILE = "trained.safetensors"
AVERAGE_FILE = "average.safetensors"
BEST_FILE = "best.safetensors"
OPTIONAL_FILES = (TRAINED_FILE, AVERAGE_FILE, BEST_FILE)
FILES = (WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE, HISTORY_FILE)


def write_sums(folder: Path) -> None:
    """Vouch for the files that lie in a new checkpoint's folder."""
    written = [name for name in (*FILES, *OPTIONAL_FILES) if (folder / name).exists()]
    (folder / SUMS_FILE).write_text(json.dumps({name: sha256_of(folder / name) for name in written}))


def damage_of(uri: str) -> str | None:
    """Why the checkpoint folder at `uri` is not what training wrote, or None; reads all of it."""
    try:
        sums = storage.read_json(storage.join(uri, SUMS_FILE))
    except FileNotFoundError:
        return f"{SUMS_FILE} is missing"
    except ValueError:
        return f"{SUMS_FILE} is damaged"
    if not isinstance(sums, dict) or not set(FILES) <= set(sums) <= {*FILES, *OPTIONAL_FILES}:
        return f"{SUMS_FILE} is damaged"
    for name in sums:
        try:
            found = storage.file_digest(storage.join(uri, name))
        except FileNotFoundError:
            return f"{name} is missing"
        if found != sums[name]:
            return f"{name} has another sha256 than when it was written"
    return None


def sha256_of(path: Path) -> str:
    """Of a local file, as the sums name it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
