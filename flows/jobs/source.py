"""The folder that travels with a job: the experiment, the caller's variables, and the source that runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import flows
import pipeline
import segvit
from flows.jobs import start
from flows.jobs.code import Code
from flows.recipes import RECIPES
from pipeline.errors import UserError
from segvit.decoders import DECODERS
from segvit.losses import LOSS_TERMS
from segvit.optimizers import OPTIMIZERS
from segvit.schedules import SCHEDULES

EXPERIMENT_FILE = "experiment.yaml"
# Ray takes 512 MiB; source of a fifth of that is no source.
MAX_SOURCE_BYTES = 100 << 20
PACKAGES = tuple(Path(package.__path__[0]) for package in (segvit, pipeline, flows))
PLUGIN_GROUPS = frozenset(registry.group for registry in (DECODERS, LOSS_TERMS, OPTIMIZERS, SCHEDULES, RECIPES))
_COMPILED = (".so", ".pyd", ".dylib")


class Source(NamedTuple):
    """What a job runs.

    Attributes:
        files: path in the job's folder -> file here.
        information: path in the job's folder -> text by which a plugin's entry points are known.
        packages: names of what travels, for people.
        digest: of the files' paths and contents; empty where none travels.
        version: the release that the cluster must have installed; None where the source travels.
        left_out: names of plugins that lie here and cannot travel: they have compiled code, or are no one folder.
    """

    files: Mapping[str, Path]
    information: Mapping[str, str]
    packages: tuple[str, ...]
    digest: str
    version: str | None
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        sent = f"source {self.digest[:8]} of {', '.join(self.packages)}" if self.packages else ""
        used = f"installed {start.DISTRIBUTION} {self.version}" if self.version else ""
        return "; ".join(part for part in (sent, used) if part)


def find_source(code: Code) -> Source:
    """What travels; nothing is copied yet. Raises UserError for more than MAX_SOURCE_BYTES."""
    files: dict[str, Path] = {}
    information: dict[str, str] = {}
    packages: list[str] = []
    left_out: list[str] = []
    version: str | None = None
    if _travels(PACKAGES[0].parent, code):
        packages.append(start.DISTRIBUTION)
        for package in PACKAGES:
            files.update(_files_of(package))
    else:
        version = release()
    for distribution, modules in _plugins():
        found = _plugin_files(modules, code)
        if found is None:
            left_out.append(distribution.name)
        elif found:
            packages.append(distribution.name)
            files.update(found)
            information.update(_information(distribution))
    _check_size(files)
    return Source(files, information, tuple(packages), _digest(files) if files else "", version, tuple(left_out))


def release() -> str:
    """The installed release; raises UserError where it is not installed, so that nothing could be compared."""
    try:
        return metadata.version(start.DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise UserError(f"{start.DISTRIBUTION} is not installed here; send the source along: --code source") from None


def write_folder(folder: Path, source: Source, experiment: bytes, environment: Mapping[str, str]) -> None:
    """Fill a folder with all that travels; the variables are readable by this user alone."""
    for name, file in source.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    for name, text in source.information.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(start.__file__, folder / f"{start.MODULE}.py")
    (folder / EXPERIMENT_FILE).write_bytes(experiment)
    job_file = folder / start.JOB_FILE
    job_file.touch(mode=0o600)
    job_file.write_text(json.dumps({"version": source.version, "environment": dict(environment)}), encoding="utf-8")


def _travels(folder: Path, code: Code) -> bool:
    """Whether what lies in a folder of the import path travels."""
    if code is Code.AUTO:
        return not {"site-packages", "dist-packages"} & set(folder.resolve().parts)
    return code is Code.SOURCE


def _plugins() -> Iterator[tuple[metadata.Distribution, list[str]]]:
    """The packages whose entry points add parts, with the names of the modules that they are loaded from."""
    seen = {start.DISTRIBUTION}
    for distribution in metadata.distributions():
        points = [point for point in distribution.entry_points if point.group in PLUGIN_GROUPS]
        if points and distribution.name not in seen:
            seen.add(distribution.name)
            yield distribution, sorted({point.module.partition(".")[0] for point in points})


def _plugin_files(modules: Sequence[str], code: Code) -> dict[str, Path] | None:
    """The files of modules that travel; None where they cannot."""
    files: dict[str, Path] = {}
    for module in modules:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            return None
        place = Path(spec.origin)
        is_package = spec.submodule_search_locations is not None
        if _travels(place.parents[1] if is_package else place.parent, code):
            files.update(_files_of(place.parent) if is_package else {place.name: place})
    return None if any(name.endswith(_COMPILED) for name in files) else files


def _information(distribution: metadata.Distribution) -> dict[str, str]:
    """A package's name and entry points, as an installation has them; an egg-info calls the first PKG-INFO."""
    folder = f"{distribution.name.replace('-', '_')}-{distribution.version}.dist-info"
    texts = {
        "METADATA": distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "",
        "entry_points.txt": distribution.read_text("entry_points.txt") or "",
    }
    return {f"{folder}/{name}": text for name, text in texts.items()}


def _files_of(package: Path) -> Iterator[tuple[str, Path]]:
    """Path from the package's parent -> file, of all that is neither hidden nor a cache."""
    for folder, names, files in os.walk(package):
        names[:] = sorted(name for name in names if name != "__pycache__" and not name.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and not file.endswith((".pyc", ".pyo")):
                path = Path(folder) / file
                yield path.relative_to(package.parent).as_posix(), path


def _check_size(files: Mapping[str, Path]) -> None:
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if sum(sizes.values()) > MAX_SOURCE_BYTES:
        largest: Sequence[str] = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        listed = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise UserError(
            f"the source is {sum(sizes.values()) / 2**20:.0f} MiB, more than {MAX_SOURCE_BYTES >> 20} MiB travel with "
            f"a job; move out of the packages what is no source: {listed}"
        )


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
