"""CamVid in the SegNet layout: {train,val,test}/*.png images, {train,val,test}annot/*.png label maps.

Label ids 0-10 are the classes and 11 means unlabelled. `test` may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import storage
from pipeline.datasets.raw import (
    LabelIds,
    Palette,
    RawPair,
    RawSample,
    RejectedSampleError,
    digest_of,
    list_files,
    load_facts,
    sample_key,
)
from pipeline.decode import DecodeError, decode_label
from pipeline.errors import UserError

REQUIRED_SPLITS = ("train", "val")
OPTIONAL_SPLITS = ("test",)


class CamVid:
    """The data set below `root`, a folder or any fsspec location."""

    name = "camvid"

    def __init__(self, root: str) -> None:
        self.root = root
        facts = load_facts("camvid")
        self.class_names: tuple[str, ...] = tuple(facts["classes"])
        self.palette: Palette = tuple((red, green, blue) for red, green, blue in facts["palette"])
        self._ids = LabelIds(
            {class_id: class_id for class_id in range(len(self.class_names))},
            ignored=facts["raw_ignored_ids"],
            rule=f"0-{len(self.class_names) - 1}, {facts['raw_ignored_ids'][0]} = unlabelled",
        )

    def splits(self) -> tuple[str, ...]:
        """The splits whose folders are there; raises UserError where train or val is not."""
        if not storage.exists(self.root):
            raise UserError(f"data root {self.root} does not exist; set data.root to the CamVid folder")
        missing = [
            folder
            for split in REQUIRED_SPLITS
            for folder in (split, f"{split}annot")
            if not storage.exists(storage.join(self.root, folder))
        ]
        if missing:
            raise UserError(
                f"data root {self.root} has no folder {', '.join(missing)}; "
                "the CamVid layout is {train,val}/*.png with {train,val}annot/*.png"
            )
        return REQUIRED_SPLITS + tuple(
            split for split in OPTIONAL_SPLITS if storage.exists(storage.join(self.root, split))
        )

    def samples(self, split: str) -> Sequence[RawSample]:
        """All images and label maps of `split` by name; one without the other too, to be rejected."""
        return _list_samples(self.root, split)

    def read(self, sample: RawSample) -> RawPair:
        """The image file's bytes and the label map as class ids; raises RejectedSampleError."""
        image = _read_file(sample.image, "image")
        try:
            raw = decode_label(_read_file(sample.label, "label map"))
        except DecodeError as error:
            raise RejectedSampleError(sample.label, str(error), "replace the file or remove the sample") from error
        return RawPair(image, self._ids.to_classes(raw, sample.label))

    def source_digest(self) -> str:
        """sha256 over names, sizes and times of the files of all splits."""
        rows = [[split, sample.key, sample.stamp] for split in self.splits() for sample in self.samples(split)]
        return digest_of([self.name, *rows])


def _list_samples(root: str, split: str) -> list[RawSample]:
    images = list_files(storage.join(root, split)) or {}
    labels = list_files(storage.join(root, f"{split}annot")) or {}
    names = sorted(name for name in images.keys() | labels.keys() if name.lower().endswith(".png"))
    return [
        RawSample(
            key=sample_key(name[: -len(".png")]),
            image=storage.join(root, split, name),
            label=storage.join(root, f"{split}annot", name),
            stamp=f"{images.get(name)} {labels.get(name)}",
        )
        for name in names
    ]


def _read_file(uri: str, what: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError as error:
        reason = f"is missing: there is no such {what}"
        raise RejectedSampleError(uri, reason, "add it or remove the sample") from error
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise RejectedSampleError(uri, reason, "check the file and its permissions") from error
