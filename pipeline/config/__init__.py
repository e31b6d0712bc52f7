"""The experiment file: strict models for every section, read and checked as a whole."""

from pipeline.config.data import (
    CocoConfig,
    DataConfig,
    DigitsConfig,
    DrawnSplit,
    FolderConfig,
    LabelmeConfig,
    LabelStudioConfig,
    ParquetConfig,
    SplitFoldersConfig,
)
from pipeline.config.evaluate import EvaluateConfig, InferenceConfig
from pipeline.config.experiment import ExperimentConfig
from pipeline.config.policy import PromotionPolicy
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.section import Section
from pipeline.config.train import AugmentationConfig, ScheduleConfig, TrainConfig
from pipeline.config.tune import SearchRange, TuneConfig
from pipeline.config.variant import DistillConfig, LossConfig, ModelSection, VariantConfig, VariantSettings

__all__ = [
    "AugmentationConfig",
    "CocoConfig",
    "DataConfig",
    "DigitsConfig",
    "DistillConfig",
    "DrawnSplit",
    "EvaluateConfig",
    "ExperimentConfig",
    "FolderConfig",
    "InferenceConfig",
    "LabelStudioConfig",
    "LabelmeConfig",
    "LossConfig",
    "ModelSection",
    "ParquetConfig",
    "PromotionPolicy",
    "RuntimeConfig",
    "ScheduleConfig",
    "SearchRange",
    "Section",
    "SplitFoldersConfig",
    "TrainConfig",
    "TuneConfig",
    "VariantConfig",
    "VariantSettings",
]
