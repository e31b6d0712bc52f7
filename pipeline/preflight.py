"""Before anything starts: does the experiment fit its data set, its models and the machine?

A misfit that would show in a worker, minutes or hours later, is found here, all of them at once and each with value,
rule and remedy. Nothing is decoded, no weight is read or allocated, and nothing is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.config import ExperimentConfig, SearchRange, VariantSettings
from pipeline.config.experiment import MODEL_SCHEME
from pipeline.datasets.summary import SourceSummary, describe_source
from pipeline.errors import UserError
from pipeline.registry.gate import policy_problems
from pipeline.registry.model_source import start_config
from pipeline.training.job import job_schedule
from pipeline.tuning.space import NOT_SEARCHED
from segvit.config import ModelConfig
from segvit.distillation import distillation_problem
from segvit.flops import count_parameters, model_gflops, outline_model
from segvit.model_check import model_problems
from segvit.optimizers import optimizer_problem
from segvit.presets import find_preset
from segvit.weights.pretrained import WEIGHTS_VARIABLE, is_of_other_backbone, weights_problem
from segvit.weights.start import start_problem

# Weights and AdamW's two moments, float32.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
_SOME_CLASSES = 2
WORTHWHILE_SHARE = 0.8
"""Of the cost of the variant that another starts from: above it, `find_warnings` warns."""


class Machine(NamedTuple):
    """What this machine offers to a local Ray."""

    num_cpus: int
    num_gpus: int

    @classmethod
    def here(cls) -> Machine | None:
        """None beside a cluster, whose machines may come with the work."""
        if os.environ.get("RAY_ADDRESS"):
            return None
        import torch

        return cls(os.cpu_count() or 1, torch.cuda.device_count())


def find_problems(config: ExperimentConfig, workspace: str | None) -> list[str]:
    """Everything that does not fit, a line each; empty where the experiment can start.

    Without a `workspace` it will run elsewhere: data, weights and machine are not looked at.
    """
    source: SourceSummary | None = None
    problems: list[str] = []
    if workspace is not None:
        try:
            source = describe_source(config.data)
        except UserError as error:
            problems.append(f"data: {error}")
    num_classes = len(source.class_names) if source else _SOME_CLASSES
    problems += _of_variants(config, num_classes)
    problems += _of_starts(config)
    problems += _of_search(config, num_classes)
    if source is not None:
        problems += _of_data(config, source)
    if workspace is not None:
        problems += _of_weights(config)
        problems += _of_start_files(config)
        problems += _of_machine(config, Machine.here())
        problems += _of_notify(config)
        if not problems and source is not None:
            problems += _of_disk(config, source, workspace)
    return problems


def _of_notify(config: ExperimentConfig) -> Iterator[str]:
    """A hook whose program is not there would be missed when the flow has ended."""
    notify = config.runtime.notify
    if isinstance(notify, tuple) and shutil.which(notify[0]) is None:
        yield f"runtime.notify: there is no program {notify[0]}; correct the first word, or give its whole path"


def _of_variants(config: ExperimentConfig, num_classes: int) -> list[str]:
    found: dict[str, list[str]] = {}
    for name in config.variants:
        for problem in _of_settings(config, name, num_classes):
            found.setdefault(problem, []).append(name)
    everywhere = len(config.variants)
    return [
        f"variants.{', '.join(names)}: {problem}" if len(names) < everywhere or everywhere == 1 else problem
        for problem, names in found.items()
    ]


def _of_starts(config: ExperimentConfig) -> Iterator[str]:
    for name, _, source in _starts(config):
        if problem := start_problem_of(config, name, source):
            yield f"variants.{name}.start_from {config.start_from(name)}: {problem}"


def start_problem_of(config: ExperimentConfig, name: str, source: ModelConfig) -> str | None:
    """Why a variant cannot start from a model of that configuration, or None."""
    model = ModelConfig.from_dict(config.variant_settings(name).model)
    return distillation_problem(model, source) if config.variants[name].distill else start_problem(model, source)


def _of_start_files(config: ExperimentConfig) -> Iterator[str]:
    """Folders and files to start from; registered versions are looked up where the steps are named."""
    for name in config.variants:
        start = config.start_from(name)
        if start is None or start in config.variants or start.startswith(MODEL_SCHEME):
            continue
        try:
            source = start_config(start, ModelConfig.from_dict(config.variant_settings(name).model))
            problem = source and start_problem_of(config, name, source)
        except UserError as error:
            problem = str(error)
        except ValueError:
            continue  # told of the variant
        if problem:
            yield f"variants.{name}.start_from {start}: {problem}"


def _starts(config: ExperimentConfig) -> Iterator[tuple[str, ModelConfig, ModelConfig]]:
    """Each variant that starts from another one, its model, and the other's; those that are wrong are told of apart."""
    for name in config.variants:
        start = config.start_from(name)
        if start in config.variants:
            try:
                models = [ModelConfig.from_dict(config.variant_settings(one).model) for one in (name, start)]
            except (UserError, ValueError):
                continue
            yield name, models[0], models[1]


def variant_models(config: ExperimentConfig) -> dict[str, tuple[ModelConfig, int]]:
    """The model of every variant and its number of classes: the data's, or the preset's where the data are elsewhere.

    Raises UserError for settings that do not fit one another, and where nothing tells the classes.
    """
    num_classes, missing = None, None
    try:
        num_classes = len(describe_source(config.data).class_names)
    except UserError as error:
        missing = error
    models = {}
    for name, variant in config.variants.items():
        try:
            model = ModelConfig.from_dict(config.variant_settings(name).model)
        except ValueError as error:
            raise UserError(f"variants.{name}: {error}") from error
        preset = variant.preset or config.model.preset
        known = num_classes or (find_preset(preset).num_classes if preset else None)
        if known is None:
            raise UserError(f"variants.{name}: the data tell how many classes there are, but {missing}") from missing
        models[name] = (model, known)
    return models


def find_warnings(config: ExperimentConfig) -> list[str]:
    """What runs but may not be worth it: a variant that is hardly cheaper than the one that it starts from."""
    warnings = []
    for name, model, source in _starts(config):
        if model == source:
            continue  # trained on, not made cheaper
        costs = [model_gflops(one, _SOME_CLASSES, model.image_size) for one in (model, source)]
        share = costs[0] / costs[1]
        if share > WORTHWHILE_SHARE:
            height, width = model.image_size
            warnings.append(
                f"variants.{name} costs {share:.2f} of {config.start_from(name)}, from which it starts "
                f"({costs[0]:.1f} of {costs[1]:.1f} GFLOPs at {height} x {width}); above {WORTHWHILE_SHARE} it is "
                "hardly worth its loss: shrink earlier, or keep fewer patches"
            )
    return warnings


def _of_settings(config: ExperimentConfig, name: str, num_classes: int) -> list[str]:
    try:
        settings = config.variant_settings(name)
    except UserError as error:
        return [str(error)]
    try:
        found = _model_problems(settings, ModelConfig.from_dict(settings.model), num_classes)
    except ValueError as error:
        found = [str(error)]
    return [*found, *_schedule_problems(settings), *_optimizer_problems(settings)]


def _model_problems(settings: VariantSettings, model: ModelConfig, num_classes: int) -> list[str]:
    return model_problems(
        model,
        num_classes,
        freeze_blocks=settings.train.freeze_blocks,
        loss=settings.loss.resolved(),
    )


def _schedule_problems(settings: VariantSettings) -> list[str]:
    try:
        job_schedule(settings.train)
    except (ValueError, TypeError) as error:
        return [f"train.schedule: {error}"]
    return []


def _optimizer_problems(settings: VariantSettings) -> list[str]:
    optimizer = settings.train.optimizer
    problem = optimizer_problem(optimizer.name, optimizer.options)
    return [f"train.optimizer: {problem}"] if problem else []


def _of_search(config: ExperimentConfig, num_classes: int) -> Iterator[str]:
    tune = config.tune
    if not tune.num_trials:
        return
    if tune.report_every_steps > tune.steps:
        yield (
            f"tune.report_every_steps {tune.report_every_steps} exceeds tune.steps {tune.steps}: no trial would have a "
            "score; lower it"
        )
    try:
        settings = config.variant_settings(tune.variant)
        ModelConfig.from_dict(settings.model)
    except (UserError, ValueError):
        return  # told of the variant
    if not tune.space and not any(settings.loss.resolved().values()):
        yield "tune.space is empty and the variant has no loss term to search; give a path with its range"
    for path, wanted in tune.space.items():
        for value in _extremes(wanted):
            problem = _search_problem(settings, path, value, num_classes)
            if problem:
                yield f"tune.space.{path}: {problem}"
                break


def _search_problem(settings: VariantSettings, path: str, value: Any, num_classes: int) -> str | None:
    if path in NOT_SEARCHED:
        return f"it cannot be searched, as {NOT_SEARCHED[path]}; remove it"
    try:
        changed = settings.with_values({path: value})
        if path.startswith("model."):
            found = _model_problems(changed, ModelConfig.from_dict(changed.model), num_classes)
            known = _model_problems(settings, ModelConfig.from_dict(settings.model), num_classes)
            return next((f"with {value}: {one}" for one in found if one not in known), None)
    except ValueError as error:
        return str(error)
    return None


def _extremes(wanted: SearchRange) -> tuple[Any, ...]:
    if wanted.choice is not None:
        return wanted.choice
    bounds = wanted.log_uniform or wanted.uniform or wanted.int_uniform
    assert bounds is not None
    return bounds


def _of_data(config: ExperimentConfig, source: SourceSummary) -> Iterator[str]:
    splits = ", ".join(source.splits)
    needed = {"train": "training reads", "val": "validation reads"}
    for split, reader in needed.items():
        if split not in source.splits:
            yield f"data: {source.name} has no split {split!r}, which {reader}; it has {splits}"
    if config.evaluate.split not in (*source.splits, "train", "val"):
        yield f"evaluate.split {config.evaluate.split!r} is no split of {source.name}; choose from {splits}"
    for problem in policy_problems(config.promote, source.class_names):
        yield f"promote.{problem}"


def _of_weights(config: ExperimentConfig) -> Iterator[str]:
    asked: set[tuple[Any, ...]] = set()
    for name in config.variants:
        try:
            model = ModelConfig.from_dict(config.variant_settings(name).model)
        except (UserError, ValueError):
            continue
        weights, grid = config.backbone_weights(name), config.source_grid(name)
        key = "model.weights"
        if weights == "auto":
            weights, key = os.environ.get(WEIGHTS_VARIABLE, ""), WEIGHTS_VARIABLE
        one = (model.backbone, *sorted(model.backbone_options.items()), model.image_size, weights, grid)
        if one in asked:
            continue
        asked.add(one)
        if weights in ("", "random"):
            if grid is not None:
                yield f"model.source_grid {list(grid)} is that of a weights file, and there is none; leave it out"
        elif not storage.exists(weights):
            yield f"{key}: no weights file at {weights}; correct the path, or use weights: auto without it"
        elif key == WEIGHTS_VARIABLE and is_of_other_backbone(weights, model.backbone):
            continue  # weights of another backbone in the variable are passed over
        elif (problem := weights_problem(model, weights, grid)) is not None:
            yield f"{key} {weights}: {problem}"


def _of_machine(config: ExperimentConfig, machine: Machine | None) -> Iterator[str]:
    runtime = config.runtime
    if machine is None:
        return
    if runtime.use_gpu and not machine.num_gpus:
        yield "runtime.use_gpu is true, and this machine has no GPU; set it to false, or run on a cluster that has"
    use_gpu = machine.num_gpus > 0 if runtime.use_gpu is None else runtime.use_gpu
    least = runtime.min_workers
    if least * runtime.cpus_per_worker > machine.num_cpus:
        yield (
            f"runtime.num_workers {least} x runtime.cpus_per_worker {runtime.cpus_per_worker} exceed the "
            f"{machine.num_cpus} CPUs of this machine, and would be waited for for ever; lower one of them"
        )
    if use_gpu and machine.num_gpus and least > machine.num_gpus:
        yield f"runtime.num_workers {least}, one a GPU, exceed the {machine.num_gpus} GPUs of this machine; lower it"


def _of_disk(config: ExperimentConfig, source: SourceSummary, workspace: str) -> Iterator[str]:
    if not storage.is_local(workspace):
        return
    folder = storage.local_path(workspace).absolute()
    while not folder.exists():
        folder = folder.parent
    needed = source.num_bytes or 0
    for name in config.variants:
        model = ModelConfig.from_dict(config.variant_settings(name).model)
        kept = config.train.keep_checkpoints + 2  # the last one, and the one that is being written
        parameters = count_parameters(outline_model(model, len(source.class_names)))
        needed += parameters * _CHECKPOINT_BYTES_PER_PARAMETER * kept
    free = shutil.disk_usage(Path(folder)).free
    if needed > free:
        yield (
            f"workspace {workspace} has {free / 1e9:.1f} GB free, shards and checkpoints need about "
            f"{needed / 1e9:.1f} GB; free some space or choose another workspace"
        )
