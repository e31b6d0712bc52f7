"""Which raw data set, and how it becomes shards; lengths are pixels."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Fraction, Positive, Section
from pipeline.masking import holds_password
from pipeline.workflow.step import NotFingerprinted


class DigitsConfig(Section):
    """The embedded data set: scenes of real handwritten digits on textured ground."""

    num_train: Positive = 480
    num_val: Positive = 96
    image_size: Annotated[int, Field(ge=88)] = 112
    max_digits: Annotated[int, Field(ge=1, le=6)] = 3
    digit_size: tuple[Positive, Positive] = (44, 80)
    ink_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.35

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.digit_size
        if not 8 <= low <= high <= self.image_size:
            raise ValueError(
                f"digit_size {low}-{high} must rise, from 8 to at most image_size {self.image_size}; "
                "lower digit_size or raise image_size"
            )
        return self


class DrawnSplit(Section):
    """How a val split is drawn where the data has none.

    `val_fraction`: share of the images that a hash of data.seed and their name draws for val, never none or all of
    them; None: the data says what is val.
    `group`: a regular expression whose first group, found in an image's name, is what is drawn instead of the image,
    so that the frames of one video stay on one side: `^(.*)_frame` or `^([^/]+)/`.
    """

    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    group: str | None = None

    @field_validator("group")
    @classmethod
    def _has_a_group(cls, group: str | None) -> str | None:
        try:
            if group is not None and not re.compile(group).groups:
                raise ValueError(f"group {group!r} has no group; put what frames of one video share into ( )")
        except re.error as error:
            raise ValueError(f"group {group!r} is no regular expression ({error}); correct it") from error
        return group

    @model_validator(mode="after")
    def _groups_what_is_drawn(self) -> Self:
        if self.group is not None and self.val_fraction is None:
            raise ValueError("group says what val_fraction draws; set val_fraction or remove group")
        return self


class SplitFoldersConfig(DrawnSplit):
    """Images and a label file each in folders; all paths are below data.root, and `.` is the root itself.

    `images`, `labels`: the folders. Below them, or around them (train/images), there may be one for each split: train,
    val or valid or validation, test.
    `label_suffix`: what label files have at the end of their name and images do not: `_mask` for a_mask.png with a.jpg.
    `splits`: the folder of the lists train.txt, val.txt and, if wanted, test.txt. With `val_fraction` images of
    trainval.txt, default.txt or a train.txt without val.txt are drawn from, where there is one, otherwise all.
    `val_fraction`: where there are folders for splits, it draws from train, and a folder for val is refused.
    """

    images: str
    labels: str
    label_suffix: str = ""
    splits: str = "splits"


class FolderConfig(SplitFoldersConfig):
    """Label maps as pictures. One folder for images and labels is told apart by `label_suffix`.

    `classes`: names a line in the order of their ids, or JSON or YAML with names and, if wanted, palette, ids and
    ignore_ids (255 by default); or a class file that a label tool wrote.
    """

    images: str = "images"
    labels: str = "labels"
    classes: str = "classes.txt"

    @model_validator(mode="after")
    def _tells_labels_from_images(self) -> Self:
        if self.images.strip("/") == self.labels.strip("/") and not self.label_suffix:
            raise ValueError(f"images and labels are both {self.images!r}; set label_suffix, such as _mask, or labels")
        return self


PerSplit = dict[Literal["train", "val", "test"], str]
Unlabelled = Literal["background", "ignore"]


class CocoConfig(DrawnSplit):
    """Objects in COCO's JSON; all paths are below data.root, and `.` is the root itself.

    `images`: the folder that file names are looked for in, or one a split: {train: train2017, val: val2017}.
    `annotations`: the JSON file, or one a split. One alone needs `val_fraction`, which also draws from train where
    none is for val.
    `unlabelled`: pixels without an object are class `background`, the first, or `ignore`d.
    `on_top`: where objects overlap, the `later` in the file is seen, or the `smaller`.
    """

    images: str | PerSplit = "images"
    annotations: str | PerSplit = "annotations.json"
    unlabelled: Unlabelled = "background"
    on_top: Literal["later", "smaller"] = "later"

    @model_validator(mode="after")
    def _holds_train(self) -> Self:
        if isinstance(self.annotations, dict):
            for name, given in (("annotations", self.annotations), ("images", self.images)):
                missing = {"train", *self.annotations} - given.keys() if isinstance(given, dict) else set()
                if missing:
                    raise ValueError(f"{name} has no path for {', '.join(sorted(missing))}; add it")
            if "val" in self.annotations and self.val_fraction is not None:
                raise ValueError("annotations has a path for val, and val_fraction would draw another; remove one")
        elif isinstance(self.images, dict):
            raise ValueError("images has a folder a split and annotations has not; give a path a split to both")
        return self


class LabelmeConfig(SplitFoldersConfig):
    """Objects in a JSON file of labelme's beside each image, or in a folder of their own.

    `classes`: a file with their names, such as labels.txt of labelme; left out, the names in all files, sorted.
    `unlabelled`: pixels without an object are class `background`, the first, or `ignore`d.
    """

    images: str = "."
    labels: str = "."
    classes: str | None = None
    unlabelled: Unlabelled = "background"


class LabelStudioConfig(DrawnSplit):
    """Objects in Label Studio's JSON export; all paths are below data.root, and `.` is the root itself.

    `images`: the folder that the tasks' images are looked for in, by the last part of their path or more of it.
    `tasks`: the JSON file. It needs `val_fraction`.
    `classes`: a file with their names; left out, the labels of all tasks, sorted.
    `unlabelled`: pixels without an object are class `background`, the first, or `ignore`d.
    """

    images: str = "images"
    tasks: str = "tasks.json"
    classes: str | None = None
    unlabelled: Unlabelled = "background"


class ParquetConfig(DrawnSplit):
    """Images and label maps in the rows of Parquet files below data.root, as Hugging Face writes them.

    `image`, `label`: the columns; left out, those called as such columns are (image, img or pixel_values; mask, label,
    labels, annotation or segmentation).
    `classes`: a file with their names; left out, id2label.json or classes.txt beside the data, or what the files'
    own metadata name.
    `val_fraction`: where no file is for val, it draws from those for train.
    """

    image: str | None = None
    label: str | None = None
    classes: str | None = None


class DataConfig(Section):
    """Which raw data set, and how it becomes shards.

    `root`: the data set's folder, the .zip or .tar that holds it, or a folder with the publisher's archives; a
    local path or any fsspec URL.
    `linked_folders`: absolute paths of folders elsewhere, such as a data disk, that links below a local root may lead
    to. Nothing else outside of the root is read: a link that leads out is refused.
    `on_bad_sample`: `fail` where a sample cannot be read or used, or an image is there twice; or
    `quarantine` them, at most `max_quarantined_fraction` of all.
    `classes_without_pixels`: `refuse` data whose train or val shows no labelled pixel of a class, which nothing could
    learn or measure; or `allow` it. Left out, it is refused, but for the embedded digits, whose scenes are drawn.
    `grey_range`: of images with more than 8 bits a channel, the two values of the files that become 0 and 255; what is
    between them in proportion, what is outside as the nearer end. Left out, it is measured: from the lowest 0.1 to the
    highest 99.9 percentile of an image in train (0 and 65535 of 16 bits aside, which mark what was not measured).
    Shards hold 8 bits; the range is kept with the shards and with the model, which scales images to predict by it.
    `max_long_side`: scale larger images and their label maps down to it, pixels; left out, images stay as they are, and
    more than 67 million pixels are refused. With it, JPEG (baseline) and PNG may have up to 1 << 30.
    """

    dataset: str
    root: str | None = None
    linked_folders: Annotated[tuple[str, ...], NotFingerprinted] = ()
    seed: int = 0
    samples_per_shard: Positive = 128
    max_samples_per_split: Positive | None = None
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    max_quarantined_fraction: Annotated[Fraction, NotFingerprinted] = 0.01
    classes_without_pixels: Literal["refuse", "allow"] | None = None
    grey_range: tuple[float, float] | None = None
    max_long_side: Positive | None = None
    digits: DigitsConfig = DigitsConfig()
    folder: FolderConfig = FolderConfig()
    coco: CocoConfig = CocoConfig()
    labelme: LabelmeConfig = LabelmeConfig()
    label_studio: LabelStudioConfig = LabelStudioConfig()
    parquet: ParquetConfig = ParquetConfig()

    @field_validator("root")
    @classmethod
    def _root_holds_no_password(cls, root: str | None) -> str | None:
        if root is not None and holds_password(root):
            raise ValueError(
                "root holds a password, which records and pages would show; give it to fsspec by its own variables or "
                "configuration file"
            )
        return root

    @field_validator("linked_folders")
    @classmethod
    def _linked_folders_are_whole(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        for folder in folders:
            if not folder.startswith("/"):
                raise ValueError(f"linked_folders holds {folder!r}, which is no absolute path; write it from / on")
        return folders

    @model_validator(mode="after")
    def _range_rises(self) -> Self:
        if self.grey_range is not None and not -math.inf < self.grey_range[0] < self.grey_range[1] < math.inf:
            raise ValueError(
                f"grey_range {list(self.grey_range)} must be two values that rise, the one that becomes black first"
            )
        return self
