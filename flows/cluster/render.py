"""From options as given to the texts of the files, and those into a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.cluster.manifests import cluster_files, job_files
from flows.cluster.options import JobOptions, KubernetesOptions, SlurmOptions, parse_options
from flows.cluster.slurm import batch_script
from flows.experiment import Experiment, parse_experiment
from pipeline import storage
from pipeline.config.file import read_tree
from pipeline.errors import UserError

_CONFIG_MAP_BYTES = 1_000_000
_JOB_NAME_CHARS = 47  # what the operator allows


def cluster_manifests(config: Path | None, overrides: Sequence[str], given: dict[str, Any]) -> dict[str, str]:
    """A cluster that stays; raises UserError for wrong options, and for an experiment, which it does not run."""
    if config is not None or overrides:
        raise UserError(
            f"--kind kuberay renders a cluster, and {config or '--set'} is of an experiment; submit that with "
            "segvit submit, or render --kind rayjob"
        )
    return cluster_files(parse_options("kuberay", KubernetesOptions, given))


def job_manifests(config: Path | None, overrides: Sequence[str], given: dict[str, Any]) -> dict[str, str]:
    """One experiment with its cluster; raises UserError for wrong options or a wrong experiment."""
    options = parse_options("rayjob", JobOptions, given)
    experiment = _checked("rayjob", config, overrides)
    text = Path(experiment.source).read_text(encoding="utf-8")
    if len(text.encode()) > _CONFIG_MAP_BYTES:
        raise UserError(f"config {config} has more than {_CONFIG_MAP_BYTES} bytes, which no config map holds")
    return job_files(options, _job_name(options.name, experiment.config.name), text, overrides)


def slurm_script(config: Path | None, overrides: Sequence[str], given: dict[str, Any]) -> dict[str, str]:
    """One experiment as a batch script; raises UserError for wrong options or a wrong experiment."""
    options = parse_options("slurm", SlurmOptions, given)
    experiment = _checked("slurm", config, overrides)
    path = str(Path(experiment.source).resolve())
    return {f"{options.name}.sbatch": batch_script(options, path, overrides)}


def write_files(folder: Path, files: Mapping[str, str], overwrite: bool) -> list[Path]:
    """Write each file whole; raises UserError for files that exist, before any is written."""
    targets = {folder / name: text for name, text in files.items()}
    existing = [str(target) for target in targets if target.exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)} exist; give another --out, or --overwrite to replace")
    try:
        for target, text in targets.items():
            storage.publish_bytes(str(target), text.encode())
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror}); give another --out"
        ) from error
    return list(targets)


def _job_name(installation: str, experiment: str) -> str:
    """The job's own name, so that several experiments run at once: `segvit-camvid`."""
    own = re.sub(r"[^a-z0-9]+", "-", experiment.lower()).strip("-")
    return f"{installation}-{own}"[:_JOB_NAME_CHARS].rstrip("-")


def _checked(kind: str, config: Path | None, overrides: Sequence[str]) -> Experiment:
    if config is None:
        raise UserError(f"--kind {kind} runs an experiment; name its file, as flows/configs/camvid.yaml")
    # ${NAME} stands for the cluster's variables, not for this process's.
    experiment = parse_experiment(read_tree(config, overrides, expand=False), str(config))
    experiment.check(None)
    return experiment
