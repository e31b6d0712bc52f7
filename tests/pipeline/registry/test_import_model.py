"""Models from elsewhere as checkpoints of the workspace, known by their content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import segvit
from pipeline.errors import UserError
from pipeline.records import Checkpoint
from pipeline.registry.import_model import import_folder, import_published_start
from pipeline.registry.model_source import source_digests
from pipeline.workflow.lease import take_lease

CONFIG = segvit.ModelConfig(
    backbone="vit_tiny_patch16_224",
    image_size=(64, 64),
    out_layers=(1, 3),
    decoder_layers=1,
    class_token=False,
    backbone_options={"embed_dim": 48, "depth": 4, "num_heads": 3},
)


def imported(folder: Path, target: Path) -> Checkpoint:
    digests = source_digests(str(folder))
    return import_folder(str(folder), *digests, str(target), take_lease(str(target / "lease"), "test"))


def test_import_folder__its_classes_are_part_of_what_it_is(tmp_path: Path) -> None:
    model = segvit.build_model(CONFIG, 2)
    records = []
    for place, names in (("one", ["a", "b"]), ("two", ["a", "b"]), ("three", ["a", "c"])):
        segvit.save_checkpoint(tmp_path / place, model, {"class_names": names, "variant": "full"})
        records.append(imported(tmp_path / place, tmp_path / f"target-{place}"))
    first, moved, other = (one.content_digest() for one in records)
    assert first == moved != other
    assert records[0].digest == records[2].digest
    assert records[0].origin == str(tmp_path / "one")
    assert segvit.load_checkpoint(records[2].uri)[1]["class_names"] == ["a", "c"]


def test_import_folder__a_change_meanwhile_is_refused(tmp_path: Path) -> None:
    segvit.save_checkpoint(tmp_path / "one", segvit.build_model(CONFIG, 2), {})
    lease = take_lease(str(tmp_path / "lease"), "test")
    with pytest.raises(UserError, match=r"one/config.json has changed meanwhile; run again"):
        import_folder(
            str(tmp_path / "one"), source_digests(str(tmp_path / "one")).weights, "0", str(tmp_path / "t"), lease
        )
    assert not (tmp_path / "t").exists()


def test_import_published_start__keeps_weights_and_class_names(tmp_path: Path) -> None:
    model = segvit.build_model(CONFIG, 2).eval()
    file = tmp_path / "model.pth"
    torch.save({"meta": {"CLASSES": ["a", "b"]}, "state_dict": segvit.published_state_dict(model)}, file)
    digest, lease = source_digests(str(file)).weights, take_lease(str(tmp_path / "lease"), "test")
    record = import_published_start(str(file), digest, CONFIG.to_dict(), str(tmp_path / "target"), lease)
    assert (record.source_digest, record.origin, record.step) == (digest, str(file), 0)
    found, metadata = segvit.load_checkpoint(record.uri)
    assert metadata["class_names"] == ["a", "b"]
    assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())
    wider = CONFIG.replace(backbone_options={"embed_dim": 96, "depth": 4, "num_heads": 3})
    with pytest.raises(UserError, match="is no model to start from: its backbone has width 48"):
        import_published_start(str(file), digest, wider.to_dict(), str(tmp_path / "other"), lease)
