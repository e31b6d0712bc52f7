"""Masks of the detail annotations: run-length codes and polygons."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.datasets.detail_masks import draw_label
from pipeline.datasets.rasterise import (
    MAX_CORNERS,
    MAX_WORK,
    Canvas,
    decode_counts,
    draw_circle,
    draw_polygon,
    draw_runs,
    draw_segmentation,
)
from segvit.image_files import DecodeError
from tests.pipeline.datasets.patches import on_image


def test_decode_counts__known_strings() -> None:
    # One sign holds 0 to 15; 16 needs a second one, so that its top bit is no minus sign.
    assert decode_counts("0") == [0]
    assert decode_counts("?") == [15]
    assert decode_counts("`0") == [16]
    # 100 = 3 * 32 + 4; the fourth count is 2 less than the second: bits 11110.
    assert decode_counts("T3425N") == [100, 4, 2, 9, 0]


def test_draw_runs__down_the_columns() -> None:
    mask = on_image(draw_runs([1, 2, 3], 2, 3), 2, 3)
    np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 0, 0]])
    for wrong in ([1, 2, 4], [7, -1], []):
        with pytest.raises(DecodeError, match="do not fill 2x3"):
            draw_runs(wrong, 2, 3)


def test_draw_polygon__centres_inside() -> None:
    square = on_image(draw_polygon([1, 1, 4, 1, 4, 3, 1, 3], 5, 6), 5, 6)
    expected = np.zeros((5, 6), dtype=bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(square, expected)
    small = on_image(draw_polygon([1.4, 0.6, 3.6, 0.6, 3.6, 2.4, 1.4, 2.4], 4, 5), 4, 5)
    np.testing.assert_array_equal(small[:, 1:4].sum(), 3)


def test_draw_polygon__neighbours_share_no_pixel_and_leave_none_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.uniform(0, 20, 2)
        corners = [(0, 0), (20, 0), (20, 16), (0, 16)]
        fan = [
            on_image(draw_polygon([*a, *b, x, y * 0.8], 16, 20), 16, 20)
            for a, b in zip(corners, corners[1:] + corners[:1], strict=True)
        ]
        np.testing.assert_array_equal(np.sum(fan, axis=0), 1)


def test_draw_polygon__outside_the_image_and_self_crossing() -> None:
    assert on_image(draw_polygon([-50, -50, 70, -50, 70, 70, -50, 70], 4, 5), 4, 5).all()
    assert not draw_polygon([9, 9, 12, 9, 12, 12], 4, 5).mask.any()
    # A bow tie: even-odd, so the middle of a doubled square is outside.
    twice = [0, 0, 4, 0, 4, 4, 0, 4, 0, 0, 4, 0, 4, 4, 0, 4]
    assert not draw_polygon(twice, 4, 4).mask.any()
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


def row_by_row(points: list[float], height: int, width: int) -> NDArray[np.bool_]:
    """The rule as it is written: a centre is inside where an odd number of sides lies to its left."""
    x0, y0 = np.array(points[0::2]), np.array(points[1::2])
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    mask = np.zeros((height, width), dtype=bool)
    for row in range(height):
        y = row + 0.5
        crosses = (y0 <= y) != (y1 <= y)
        x = x0[crosses] + (y - y0[crosses]) * (x1[crosses] - x0[crosses]) / (y1[crosses] - y0[crosses])
        mask[row] = (x[:, None] <= np.arange(width) + 0.5).sum(axis=0) % 2 == 1
    return mask


def test_draw_polygon__is_the_even_odd_rule_for_any_outline() -> None:
    rng = np.random.default_rng(1)
    for number in range(200):
        points = rng.uniform(-8, 30, 2 * rng.integers(3, 12))
        if number % 2:
            # On centres and borders of pixels, where a rule that is off by one shows.
            points = np.round(2 * points) / 2
        drawn = on_image(draw_polygon(points.tolist(), 17, 23), 17, 23)
        np.testing.assert_array_equal(drawn, row_by_row(points.tolist(), 17, 23))


def test_draw_runs__any_runs_of_an_image() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        mask = rng.random((7, 9)) < rng.choice([0.0, 0.02, 0.5, 1.0])
        flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
        counts = np.diff(np.flatnonzero(np.diff(flat.astype(int)) != 0), prepend=0)
        np.testing.assert_array_equal(on_image(draw_runs(counts.tolist(), 7, 9), 7, 9), mask)


def test_draw_circle__centres_within_the_radius_and_the_image() -> None:
    rows, columns = np.mgrid[:30, :40] + 0.5
    for x, y, radius in ((10.0, 12.5, 7.2), (-3.0, 29.0, 12.0), (500.0, 5.0, 3.0), (20.0, 15.0, 900.0)):
        expected = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
        np.testing.assert_array_equal(on_image(draw_circle(x, y, radius, 30, 40), 30, 40), expected)


def test_draw_polygon__that_takes_more_memory_than_an_image() -> None:
    zigzag = [value for number in range(MAX_CORNERS) for value in (number % 7, 8192 * (number % 2))]
    with pytest.raises(DecodeError, match="whose sides cross 536870912 rows of pixels, more than the 8388608 allowed"):
        draw_polygon(zigzag, 8192, 8192)


def test_canvas__refuses_more_objects_than_anyone_annotates() -> None:
    canvas = Canvas(np.zeros((4, 4), np.uint8))
    patch = draw_polygon([0, 0, 4, 0, 4, 4], 4, 4)
    canvas.paint([patch._replace(work=MAX_WORK // 2)], 1)
    with pytest.raises(DecodeError, match=f"more than the {MAX_WORK} that are drawn; scale the image down"):
        canvas.paint([patch, patch._replace(work=MAX_WORK // 2)], 1)


def test_canvas__area_is_that_of_the_union() -> None:
    polygons = [[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]]
    canvas = Canvas(np.zeros((8, 8), np.uint8))
    assert canvas.area(draw_segmentation(polygons, 8, 8)) == 16 + 16 - 4
    assert canvas.area(draw_segmentation(polygons[:1], 8, 8)) == 16
    assert canvas.area(draw_segmentation([], 8, 8)) == 0
