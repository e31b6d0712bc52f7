from __future__ import annotations

import copy
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from segvit.config import ModelConfig
from segvit.inference.predict import semantic_scores
from segvit.losses.segmentation_loss import SegmentationLoss
from segvit.model import SegViT, build_model
from segvit.weights.published import load_published, published_state_dict

# The tests are no package, so the module beside this one is imported by its place.
_spec = importlib.util.spec_from_file_location("segvit_reference", Path(__file__).parents[1] / "reference.py")
assert _spec is not None
assert _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

MakeModel = Callable[..., SegViT]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cascade": ("cascade", {}),
    "cascade of two, other scale": ("cascade", {"out_layers": (2, 4), "attention_scale": 0.7, "decoder_layers": 2}),
    "cascade without projection": ("cascade", {"input_projection": False, "decoder_width": 48}),
    "single": ("single", {"out_layers": (5,)}),
    "single of four layers, other widths": (
        "single",
        {"out_layers": (4,), "decoder_layers": 4, "decoder_width": 36, "hidden": 100, "num_classes": 3},
    ),
    "naive QD": ("naive_qd", {"out_layers": (5,), "shrink_at": 2}),
    "Shrunk": ("shrunk", {"out_layers": (1, 5), "shrink_at": 2}),
    "Shrunk, one QU, other scale": ("shrunk", {"out_layers": (5,), "shrink_at": 3, "attention_scale": 0.2}),
    "non-square crop": ("shrunk", {"out_layers": (1, 5), "shrink_at": 2, "image_size": (64, 96)}),
}


def make_reference(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = reference.ReferenceSegViT(kind, reference.Sizes(**settings))
    reference.randomize(model)
    return model.to(dtype).eval()


def load(model: Any, **changes: Any) -> SegViT:
    sizes = model.sizes
    arguments = {
        "num_heads": sizes.num_heads,
        "out_layers": sizes.out_layers,
        "shrink_at": sizes.shrink_at,
        "image_size": sizes.image_size,
        "attention_scale": sizes.attention_scale,
    }
    return load_published(model.state_dict(), **arguments | changes)


def labels_for(size: tuple[int, int], num_classes: int) -> Tensor:
    """Many classes with ignored pixels, one class only, none at all."""
    labels = torch.randint(0, num_classes - 1, (3, *size), generator=torch.Generator().manual_seed(1))
    labels[0, :9, :13] = 255
    labels[0, 20:, 5:] = num_classes - 1
    labels[1] = 2
    labels[2] = 255
    return labels


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "", floor: float = 1e-12) -> None:
    """Equal to within `tolerance` of the largest expected value, or of `floor` where that is larger."""
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype, name
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=floor)
    assert error.item() <= tolerance, f"{name}: {error.item():.2e}"


def gradients_by_published_name(model: SegViT) -> dict[str, Tensor]:
    """Gradients of our parameters: loaded in the parameters' place, and read under the published names."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    )
    return published_state_dict(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", [(64, 64), (80, 112)], ids=["even", "odd and non-square"])
@pytest.mark.parametrize("case", CASES)
def test_load_published__equals_an_independent_implementation(
    case: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    kind, settings = CASES[case]
    plain = make_reference(kind, dtype, **settings)
    model, tolerance = load(plain), TOLERANCE[dtype]
    stride = 32 if kind == "naive_qd" else 16
    images = torch.randn(3, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(2))
    labels = labels_for(size, plain.sizes.num_classes)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()

    out, expected = model(ours), plain(theirs)
    predictions = [*out.auxiliary, out]
    assert len(predictions) == len(expected.mask_logits) > 1
    for index, prediction in enumerate(predictions):
        assert_close(prediction.class_logits, expected.class_logits[index], tolerance, f"classes {index}")
        assert_close(prediction.mask_logits, expected.mask_logits[index], tolerance, f"masks {index}")
    assert_close(
        semantic_scores(out, size), reference.reference_scores(expected, size, stride), tolerance, "semantic scores"
    )

    losses = SegmentationLoss(plain.sizes.num_classes)(out, labels)
    wanted = reference.reference_total(expected, labels, stride)
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(losses[name], value, tolerance, name)

    losses["total"].backward()
    wanted["total"].backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert_close(ours.grad, theirs.grad, tolerance, "image gradient")
    found = gradients_by_published_name(model)
    wanted_gradients = {
        name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None
    }
    for name, parameter in plain.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert name not in found or not found[name].any(), name
        else:
            # The softmax cancels the keys' bias: its gradient is rounding error around zero, so to its layer's scale.
            floor = wanted_gradients.get(name.replace(".bias", ".weight"), parameter.grad).abs().max().item()
            assert_close(found[name], parameter.grad, tolerance, name, floor)


@pytest.mark.parametrize("case", ["cascade", "single", "naive QD", "Shrunk"])
def test_published_state_dict__is_the_inverse(case: str) -> None:
    kind, settings = CASES[case]
    plain = make_reference(kind, **settings | {"depth": max(settings.get("out_layers", (5,))) + 1})
    model = load(plain)
    state = published_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor, check_dtype=False)
    again = load_published(
        state,
        num_heads=3,
        out_layers=plain.sizes.out_layers,
        shrink_at=plain.sizes.shrink_at,
        image_size=64,
    )
    assert again.config == model.config
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


PUBLISHED: dict[str, dict[str, Any]] = {
    "vitb_ade512": {"num_heads": 12, "out_layers": (5, 7, 11), "image_size": 512},
    "vitl_ade640": {"num_heads": 16, "out_layers": (7, 15, 23), "image_size": 640},
    "vitl_ade640_shrunk": {"num_heads": 16, "out_layers": (7, 23), "shrink_at": 8, "image_size": 640},
}


def official_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The format of the published files, generated from its description."""
    width, depth, inner, patches = (768, 12, 384, 1024) if name == "vitb_ade512" else (1024, 24, 512, 1600)
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.cls_token": (1, 1, width),
        "backbone.pos_embed": (1, patches + 1, width),
        "backbone.patch_embed.projection.weight": (width, 3, 16, 16),
        "backbone.patch_embed.projection.bias": (width,),
    }

    def linear(key: str, rows: int, columns: int) -> None:
        shapes.update({f"{key}.weight": (rows, columns), f"{key}.bias": (rows,)})

    def norm(key: str, size: int) -> None:
        shapes.update({f"{key}.weight": (size,), f"{key}.bias": (size,)})

    def attention(key: str, size: int) -> None:
        shapes.update({f"{key}.in_proj_weight": (3 * size, size), f"{key}.in_proj_bias": (3 * size,)})
        linear(f"{key}.out_proj", size, size)

    def stage(head: str, number: int, *, atm: bool, projection: bool = True) -> None:
        if projection:
            linear(f"{head}.input_proj_{number}", inner, width)
            norm(f"{head}.proj_norm_{number}", inner)
        for index in range(3):
            key = f"{head}.decoder_{number}.layers.{index}"
            attention(f"{key}.self_attn", inner)
            for part in "qkv":
                if atm:
                    linear(f"{key}.multihead_attn.{part}", inner, inner)
            if atm:
                linear(f"{key}.multihead_attn.proj", inner, inner)
            else:
                attention(f"{key}.multihead_attn", inner)
            linear(f"{key}.linear1", 4 * inner, inner)
            linear(f"{key}.linear2", inner, 4 * inner)
            for number_of_norm in (1, 2, 3):
                norm(f"{key}.norm{number_of_norm}", inner)

    def classes(head: str) -> None:
        shapes[f"{head}.q.weight"] = (150, inner)
        linear(f"{head}.class_embed", 151, inner)

    for index in range(depth):
        key = f"backbone.layers.{index}"
        norm(f"{key}.ln1", width)
        attention(f"{key}.attn.attn", width)
        norm(f"{key}.ln2", width)
        linear(f"{key}.ffn.layers.0.0", 4 * width, width)
        linear(f"{key}.ffn.layers.1", width, 4 * width)
    shapes["decode_head.loss_decode.criterion.empty_weight"] = (151,)
    if name.endswith("shrunk"):
        stage("decode_head", 1, atm=False)
        stage("decode_head", 2, atm=False)
        shapes["decode_head.q.weight"] = (1600, inner)
        shapes["decode_head.atm.loss_decode.criterion.empty_weight"] = (151,)
        stage("decode_head.atm", 1, atm=True, projection=False)
        classes("decode_head.atm")
    else:
        for number in (1, 2, 3):
            stage("decode_head", number, atm=True)
        classes("decode_head")
    return shapes


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def on_meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_load_published__full_size_and_back(name: str) -> None:
    """Without memory: the tensors of the published files are on the meta device, and so is the model."""
    shapes = official_shapes(name)
    model = load_published(on_meta(shapes), **PUBLISHED[name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if not key.endswith("empty_weight")
    )
    assert model.num_classes == 150
    assert shapes_of(published_state_dict(model)) == shapes


@pytest.mark.skipif("SEGVIT_REFERENCE" not in os.environ, reason="SEGVIT_REFERENCE names no folder of published facts")
@pytest.mark.parametrize("name", PUBLISHED)
def test_official_shapes__are_those_of_the_published_files(name: str) -> None:
    path = Path(os.environ["SEGVIT_REFERENCE"]) / "official_checkpoint_keys.json"
    listed = json.loads(path.read_text(encoding="utf-8"))[name]
    assert official_shapes(name) == {key: tuple(shape) for key, shape in listed.items()}


def test_load_published__files_and_wrappings(tmp_path: Path) -> None:
    plain = make_reference("cascade")
    state = plain.state_dict()
    expected = load(plain).state_dict()
    wrapped = {"meta": {"epoch": 3}, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(wrapped, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "plain.safetensors")
    sources: list[Any] = [wrapped, *(tmp_path / name for name in ("zip.pth", "legacy.pt", "plain.safetensors"))]
    for source in [*sources, str(tmp_path / "zip.pth")]:
        model = load_published(source, num_heads=3, out_layers=(1, 3, 5), image_size=(64, 64))
        assert not model.training
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_load_published__half_precision_becomes_float32_and_float64_stays() -> None:
    plain = make_reference("single", out_layers=(5,))
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        state = {name: tensor.to(dtype) for name, tensor in plain.state_dict().items()}
        model = load_published(state, num_heads=3, out_layers=(5,), image_size=64)
        assert {parameter.dtype for parameter in model.parameters()} == {kept}
        assert model.mean.dtype == kept
        assert torch.equal(model.decoder.class_head.bias, state["decode_head.class_embed.bias"].to(kept))  # type: ignore[union-attr,arg-type]


def test_load_published__unused_blocks_and_final_norm_are_left_out() -> None:
    plain = make_reference("single", out_layers=(3,))
    state = plain.state_dict() | {"backbone.ln1.weight": torch.ones(48), "backbone.ln1.bias": torch.ones(48)}
    model = load_published(state, num_heads=3, out_layers=(3,), image_size=64)
    assert len(model.backbone.vit.blocks) == 4
    images = torch.randn(1, 3, 64, 64)
    assert_close(model(images).mask_logits, plain(images).mask_logits[-1], 1e-4)


def test_load_published__one_error_names_every_wrong_tensor() -> None:
    state = make_reference("cascade").state_dict()
    del state["backbone.layers.2.ln1.bias"], state["decode_head.decoder_2.layers.1.norm2.weight"]
    state["decode_head.strange"] = torch.zeros(1)
    state["decode_head.q.weight"] = torch.zeros(7, 23)
    state["decode_head.loss_decode.criterion.empty_weight"] = torch.ones(9)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_published(state, num_heads=3, out_layers=(1, 3, 5), image_size=64)
    assert str(caught.value).endswith(
        "missing: backbone.layers.2.ln1.bias, decode_head.decoder_2.layers.1.norm2.weight; "
        "unknown: decode_head.strange; of another shape: "
        "decode_head.loss_decode.criterion.empty_weight (9,) instead of (8,), "
        "decode_head.q.weight (7, 23) instead of (7, 24)"
    )


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("cascade", {"image_size": 80}, "image_size 80 x 80 does not fit .* 16 patches of 16 pixels; use 64 "),
        ("cascade", {"image_size": 70}, "image_size 70 x 70 does not fit"),
        ("non-square crop", {"image_size": 96}, r"24 patches of 16 pixels; use \(height, width\) of 24 patches"),
        ("cascade", {"num_heads": 5}, "num_heads 5 does not divide the backbone's width 48"),
        ("cascade", {"out_layers": (1, 5)}, r"out_layers \(1, 5\) are 2 blocks, the checkpoint has 3 stages"),
        ("cascade", {"out_layers": (1, 3, 6)}, r"out_layers \(1, 3, 6\) do not fit"),
        ("cascade", {"shrink_at": 2}, "shrink_at has no meaning for a cascade of 3 stages"),
        ("Shrunk", {"shrink_at": None}, "the checkpoint is of Shrunk, which downsamples; pass shrink_at"),
        ("Shrunk", {"out_layers": (5,)}, "1 blocks, the checkpoint has 2 upsampling stages"),
    ],
)
def test_load_published__arguments_that_do_not_fit(case: str, changes: dict[str, Any], message: str) -> None:
    kind, settings = CASES[case]
    with pytest.raises(ValueError, match=message):
        load(make_reference(kind, **settings), **changes)


class Foreign:
    """A class that a checkpoint has no business to bring along."""


def test_load_published__files_that_are_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"num_heads": 3, "out_layers": (5,), "image_size": 64}
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        load_published(tmp_path / "none.pth", **arguments)
    torch.save({"state_dict": {}, "extra": Foreign()}, tmp_path / "classes.pth")
    with pytest.raises(ValueError, match="needs pickled classes") as caught:
        load_published(tmp_path / "classes.pth", **arguments)
    assert "\n" not in str(caught.value)
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    torch.save({"state_dict": {"q": 3}}, tmp_path / "number.pth")
    torch.save({}, tmp_path / "empty.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    for name, message in {
        "text.pth": "is damaged or no checkpoint",
        "text.safetensors": "is damaged or no checkpoint",
        "list.pth": "holds a list, not tensors by name",
        "number.pth": "q hold no tensors",
        "empty.pth": "not a published SegViT checkpoint",
        "linear.pth": "not a published SegViT checkpoint: .* got bias, weight",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_published(tmp_path / name, **arguments)


def test_load_published__sizes_that_cannot_be_read() -> None:
    state = make_reference("single", out_layers=(5,)).state_dict()
    del state["decode_head.class_embed.weight"]
    with pytest.raises(ValueError, match=r"sizes cannot be read: decode_head\.class_embed\.weight missing"):
        load_published(state, num_heads=3, out_layers=(5,), image_size=64)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"class_token": True}, "class_token True"),
        ({"chain_stages": False, "share_queries": False}, "chain_stages False, share_queries False"),
        ({"accumulate_masks": False}, "accumulate_masks False"),
        ({"structure": "linear"}, "structure linear"),
        ({"structure": "naive_qd", "shrink_queries": "average", "out_layers": (5,)}, "shrink_queries average"),
        ({"out_layers": (3,)}, "a cascade of one stage"),
        ({"decoder_heads": 2}, "decoder_heads 2"),
        ({"backbone": "vit_small_patch14_dinov2", "image_size": (56, 56)}, r"ls1\.gamma"),
    ],
)
def test_published_state_dict__models_without_a_counterpart(settings: dict[str, Any], reason: str) -> None:
    base = ModelConfig(
        backbone="vit_tiny_patch16_224", image_size=(64, 64), out_layers=(1, 3), decoder_layers=1, class_token=False
    )
    with torch.device("meta"):
        model = build_model(base.replace(**settings), 4)
    with pytest.raises(ValueError, match=f"no place for .*{reason}.*; use segvit.save_checkpoint"):
        published_state_dict(model)


class Zeros:
    """Eight gigabytes once it is unpickled, in a few bytes of a file."""

    def __reduce__(self) -> Any:
        return bytearray, (1 << 33,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_load_published__files_that_swell_are_refused_before_they_do(tmp_path: Path, is_zip: bool) -> None:
    arguments: dict[str, Any] = {"num_heads": 3, "out_layers": (5,), "image_size": 64}
    file = tmp_path / "x.pth"
    state = {f"backbone.layers.{10**9}.x": torch.ones(1), "decode_head.decoder_1.x": torch.ones(1)}
    cases: dict[str, dict[str, Any]] = {
        "holds more than tensors by name, or is compressed": {"x": Zeros()},
        "says that x has the shape .*, which it cannot hold": {"x": torch.ones(1).expand(1 << 40)},
        "numbers up to 1000000001 parts and has 2 tensors": state,
    }
    for message, content in cases.items():
        torch.save({"state_dict": content}, file, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ValueError, match=message):
            load_published(file, **arguments)


def test_load_published__compressed_members_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(1 << 20))
    with pytest.raises(ValueError, match=r"or is compressed; save a state_dict by torch\.save"):
        load_published(tmp_path / "x.pth", num_heads=3, out_layers=(5,), image_size=64)
