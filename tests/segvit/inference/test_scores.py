from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from segvit.inference import scores
from segvit.inference.scores import ScoreMap, bands, resize_rows, semantic_labels, semantic_scores, source_rows
from segvit.output import SegmentationOutput


def some_output(
    size: tuple[int, int] = (21, 30),
    padded: tuple[int, int] = (24, 32),
    num_classes: int = 5,
    linear: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SegmentationOutput:
    class_logits = None if linear else 2 * torch.randn(2, num_classes, num_classes + 1, dtype=dtype)
    return SegmentationOutput(class_logits, 3 * torch.randn(2, num_classes, 3, 4, dtype=dtype), (), size, padded)


def test_semantic_scores__class_times_mask_summed_over_queries() -> None:
    output = some_output()
    scores = semantic_scores(output, (21, 30))
    assert output.class_logits is not None
    classes = output.class_logits.softmax(-1)
    masks = F.interpolate(output.mask_logits, size=(24, 32), mode="bilinear").sigmoid()
    expected = sum(classes[1, q, 3] * masks[1, q, 20, 29] for q in range(5))
    torch.testing.assert_close(scores[1, 3, 20, 29], expected)


def test_semantic_scores__linear_head_softmax_of_resized_logits() -> None:
    output = some_output(linear=True)
    resized = F.interpolate(output.mask_logits, size=(24, 32), mode="bilinear")[..., :21, :30]
    torch.testing.assert_close(semantic_scores(output, (21, 30)), resized.softmax(1))
    assert torch.equal(semantic_labels(output), resized.argmax(1))


def test_semantic_scores__another_size_resizes_the_scores() -> None:
    output = some_output()
    expected = F.interpolate(semantic_scores(output, (21, 30)), size=(42, 50), mode="bilinear")
    torch.testing.assert_close(semantic_scores(output, (42, 50)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semantic_scores__of_half_precision_computed_in_float32(dtype: torch.dtype) -> None:
    output = some_output(dtype=dtype)
    assert output.class_logits is not None
    raised = output._replace(class_logits=output.class_logits.float(), mask_logits=output.mask_logits.float())
    expected = semantic_scores(raised, (21, 30))
    assert torch.equal(semantic_scores(output, (21, 30)), expected)
    assert torch.equal(semantic_labels(output), semantic_labels(raised))
    rows = ScoreMap.of(output, 1).rows(0, 21).permute(2, 0, 1)
    torch.testing.assert_close(rows, expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(semantic_labels(output), semantic_labels(raised))


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    num_classes=st.integers(1, 4),
    data=st.data(),
)
def test_resize_rows__equal_the_rows_of_the_whole(
    source: tuple[int, int], size: tuple[int, int], num_classes: int, data: st.DataObject
) -> None:
    top = data.draw(st.integers(0, size[0] - 1))
    bottom = data.draw(st.integers(top + 1, size[0]))
    maps = torch.randn(*source, num_classes, dtype=torch.float64)
    first, end = source_rows(source[0], size[0], top, bottom)
    whole = F.interpolate(maps.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    found = resize_rows(maps[first:end], first, source[0], size, top, bottom)
    torch.testing.assert_close(found, whole[:, top:bottom].permute(1, 2, 0))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 24), st.integers(1, 32)),
    num_classes=st.integers(1, 7),
    linear=st.booleans(),
    elements=st.sampled_from([1, 200, 10**9]),
    seed=st.integers(0, 2**31),
)
def test_semantic_labels__equal_argmax_of_scores(
    size: tuple[int, int], num_classes: int, linear: bool, elements: int, seed: int
) -> None:
    torch.manual_seed(seed)
    output = some_output(size, (24, 32), num_classes, linear, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "CACHED_ELEMENTS", elements)
        labels = semantic_labels(output)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, semantic_scores(output, size).argmax(1))


@pytest.mark.parametrize("linear", [False, True])
def test_score_map__rows_do_not_change_the_prediction(linear: bool) -> None:
    # The mask grid is the pixel grid: nothing is resized, nothing copied on the way.
    output = some_output((3, 4), (3, 4), linear=linear)
    expected = semantic_scores(output, (3, 4))[0].permute(1, 2, 0)
    score_map = ScoreMap.of(output, 0)
    for _ in range(2):
        torch.testing.assert_close(score_map.rows(0, 3), expected)


def test_score_map__keeps_only_its_own_image_alive() -> None:
    kept = ScoreMap.of(some_output(dtype=torch.bfloat16), 1)
    assert kept.mask_logits.untyped_storage().nbytes() == 5 * 3 * 4 * 2
    assert kept.classes is not None
    assert kept.classes.untyped_storage().nbytes() == 5 * 16 * 4


def test_bands__cover_all_rows_once() -> None:
    assert bands(3, 10, 3) == [(3, 6), (6, 9), (9, 10)]
    assert bands(3, 3, 2) == []
    assert bands(3, 1, 2) == []


MEASURE = """
import torch
from segvit.output import SegmentationOutput
from segvit.inference.scores import semantic_labels
output = SegmentationOutput(torch.randn(1, 150, 151), torch.randn(1, 150, 128, 128), (), (2048, 2048), (2048, 2048))
assert semantic_labels(output).unique().numel() > 1
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_semantic_labels__150_classes_at_2048_stay_under_2_gb() -> None:
    # Not ru_maxrss: a new process starts with its parent's.
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 2e9
