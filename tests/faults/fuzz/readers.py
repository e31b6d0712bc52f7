"""Every reader of files and requests, by name."""

from __future__ import annotations

from tests.faults.fuzz import annotation_files, containers, models, pictures, stored, to_shards
from tests.faults.fuzz.case import MakeCase

READERS: dict[str, MakeCase] = {
    "coco": annotation_files.coco,
    "labelme": annotation_files.labelme,
    "label_studio": annotation_files.label_studio,
    "pascal_detail": annotation_files.pascal_detail,
    "split_list": annotation_files.split_list,
    "class_file": annotation_files.class_file,
    "mat": annotation_files.mat,
    "jpeg": pictures.jpeg,
    "png": pictures.png,
    "tiff": pictures.tiff,
    "webp": pictures.webp,
    "bmp": pictures.bmp,
    "shard_label": pictures.shard_label,
    "large_file": pictures.large_file,
    "tar": containers.tar,
    "zip": containers.zipped,
    "parquet": containers.parquet,
    "folder_tree": containers.folder_tree,
    "prepare": to_shards.prepare,
    "shards": stored.shards,
    "record": stored.record,
    "experiment": stored.experiment,
    "policy": stored.policy,
    "checkpoint": models.checkpoint,
    "backbone_weights": models.backbone_weights,
    "training_state": models.training_state,
    "published": models.published,
    "serving_request": models.serving_request,
}
