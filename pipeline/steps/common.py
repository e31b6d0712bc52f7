"""What several steps do with their context."""

from __future__ import annotations

from pipeline.config import RuntimeConfig
from pipeline.records import Evaluation
from pipeline.workflow.step import StepContext
from pipeline.workflow.tracking import MetricLog


def runtime_of(context: StepContext) -> RuntimeConfig:
    """The settings that change speed alone."""
    assert isinstance(context.runtime, RuntimeConfig), "flows give their runtime settings to every step"
    return context.runtime


def log_figures(context: StepContext, evaluation: Evaluation, checkpoint_step: int) -> None:
    """Put what an evaluation found into the step's MLflow run."""
    figures = {
        "miou": evaluation.miou,
        "macc": evaluation.macc,
        "aacc": evaluation.aacc,
        "gflops": evaluation.gflops,
        "latency_ms": evaluation.latency_ms,
    }
    MetricLog(context.tracking, context.run_id).metrics(figures, checkpoint_step)
