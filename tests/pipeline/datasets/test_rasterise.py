"""Masks of the detail annotations: run-length codes and polygons."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.datasets.detail_masks import draw_label
from pipeline.datasets.rasterise import MAX_CORNERS, decode_counts, draw_polygon, draw_runs
from segvit.image_files import DecodeError


def test_decode_counts__known_strings() -> None:
    # One sign holds 0 to 15; 16 needs a second one, so that its top bit is no minus sign.
    assert decode_counts("0") == [0]
    assert decode_counts("?") == [15]
    assert decode_counts("`0") == [16]
    # 100 = 3 * 32 + 4; the fourth count is 2 less than the second: bits 11110.
    assert decode_counts("T3425N") == [100, 4, 2, 9, 0]


def test_draw_runs__down_the_columns() -> None:
    mask = draw_runs([1, 2, 3], 2, 3)
    np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 0, 0]])
    for wrong in ([1, 2, 4], [7, -1], []):
        with pytest.raises(DecodeError, match="do not fill 2x3"):
            draw_runs(wrong, 2, 3)


def test_draw_polygon__centres_inside() -> None:
    square = draw_polygon([1, 1, 4, 1, 4, 3, 1, 3], 5, 6)
    expected = np.zeros((5, 6), dtype=bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(square, expected)
    np.testing.assert_array_equal(draw_polygon([1.4, 0.6, 3.6, 0.6, 3.6, 2.4, 1.4, 2.4], 4, 5)[:, 1:4].sum(), 3)


def test_draw_polygon__neighbours_share_no_pixel_and_leave_none_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.uniform(0, 20, 2)
        corners = [(0, 0), (20, 0), (20, 16), (0, 16)]
        fan = [
            draw_polygon([*a, *b, x, y * 0.8], 16, 20) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)
        ]
        np.testing.assert_array_equal(np.sum(fan, axis=0), 1)


def test_draw_polygon__outside_the_image_and_self_crossing() -> None:
    assert draw_polygon([-50, -50, 70, -50, 70, 70, -50, 70], 4, 5).all()
    assert not draw_polygon([9, 9, 12, 9, 12, 12], 4, 5).any()
    # A bow tie: even-odd, so the middle of a doubled square is outside.
    twice = [0, 0, 4, 0, 4, 4, 0, 4, 0, 0, 4, 0, 4, 4, 0, 4]
    assert not draw_polygon(twice, 4, 4).any()
    with pytest.raises(DecodeError, match="at least three points"):
        draw_polygon([0, 0, float("nan"), 1, 2, 2], 4, 4)


@pytest.mark.parametrize("counts", [[2**62] * 4 + [20], [20 + 2**64], [-1, 21], [0] * 100 + [20], [19]])
def test_draw_runs__what_does_not_fill_the_image_takes_no_memory(counts: list[int]) -> None:
    with pytest.raises(DecodeError, match="run lengths that do not fill 4x5 pixels"):
        draw_runs(counts, 4, 5)


def test_draw_polygon__of_more_points_than_anyone_draws() -> None:
    with pytest.raises(DecodeError, match="a polygon of 65537 points, more than the 65536 allowed"):
        draw_polygon([0.0] * (2 * (MAX_CORNERS + 1)), 4, 4)


def test_draw_label__nested_without_end() -> None:
    image = b'{"image_id": 1, "height": 4, "width": 5}'
    with pytest.raises(DecodeError, match="not of the format"):
        draw_label([image, b'{"category_id": 1, "segmentation": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
