"""All figures that go to Prometheus, by the step that has them; docs/monitoring.md explains them, a test compares."""

from __future__ import annotations

from pipeline.workflow.exported import STEP_METRICS, STEP_TAGS, Metric

WITH_SPLIT = (*STEP_TAGS, "split")
WITH_WORKER = (*STEP_TAGS, "worker")

PREPARED_SAMPLES = Metric("segvit_prepared_samples", "counter", "Samples that prepare has looked at.", WITH_SPLIT)
REJECTED_SAMPLES = Metric("segvit_rejected_samples", "counter", "Samples that prepare has refused.", WITH_SPLIT)
PREPARE_RATE = Metric("segvit_prepare_samples_per_s", "gauge", "Samples a second that prepare gets through.")

TRAIN_STEP = Metric("segvit_train_step", "gauge", "The last optimizer step.")
TRAIN_LOSS = Metric("segvit_train_loss", "gauge", "The total loss, of one step, mean over the workers.")
TRAIN_RATE = Metric("segvit_train_images_per_s", "gauge", "Images a second, all workers together.")
TRAIN_MFU = Metric(
    "segvit_train_mfu", "gauge", "Model FLOPs utilisation: share of the GPUs' peak that the model's operations take."
)
TRAIN_VAL_MIOU = Metric("segvit_val_miou", "gauge", "The last validation's mIoU, 0 to 1.", WITH_SPLIT)
TRAIN_WORKERS = Metric("segvit_train_workers", "gauge", "Training workers that reported last.")
DATA_WAIT_SHARE = Metric(
    "segvit_data_wait_share",
    "gauge",
    "Share of its time that a training worker waits for images.",
    WITH_WORKER,
)
GPU_MEMORY = Metric(
    "segvit_gpu_memory_gib", "gauge", "The most GPU memory that a training worker's tensors took, in GiB.", WITH_WORKER
)
GPU_UTILISATION = Metric(
    "segvit_gpu_utilisation_percent",
    "gauge",
    "Share of time that the worker's GPU computes, in percent.",
    WITH_WORKER,
)
WORKER_FAILURES = Metric("segvit_train_worker_failures", "counter", "Training workers that failed or were lost.")

TRIALS = Metric("segvit_trials", "gauge", "Trials of a search, by state.", (*STEP_TAGS, "state"))
BEST_TRIAL_MIOU = Metric("segvit_best_trial_miou", "gauge", "The best trial's mIoU so far, 0 to 1.")

EVALUATED_IMAGES = Metric("segvit_evaluated_images", "gauge", "Images that are scored.", WITH_SPLIT)
EVALUATE_RATE = Metric("segvit_evaluate_images_per_s", "gauge", "Images a second that are scored.", WITH_SPLIT)

ALL = (
    *STEP_METRICS,
    PREPARED_SAMPLES,
    REJECTED_SAMPLES,
    PREPARE_RATE,
    TRAIN_STEP,
    TRAIN_LOSS,
    TRAIN_RATE,
    TRAIN_MFU,
    TRAIN_VAL_MIOU,
    TRAIN_WORKERS,
    DATA_WAIT_SHARE,
    GPU_MEMORY,
    GPU_UTILISATION,
    WORKER_FAILURES,
    TRIALS,
    BEST_TRIAL_MIOU,
    EVALUATED_IMAGES,
    EVALUATE_RATE,
)
