"""The range of values that 8 bits stand for: measured, joined, applied."""

from __future__ import annotations

import numpy as np
import pytest

from segvit.grey_range import join_ranges, measure_range, scale_values


def test_measure_range__a_few_hot_and_dead_pixels_do_not_count() -> None:
    values = np.linspace(1000, 3000, 100_000).astype(np.uint16)
    assert measure_range(values) == (1001, 2997)
    values[:50], values[50:90] = 60_000, 3
    assert measure_range(values) == (1002, 2998)


def test_measure_range__what_marks_missing_and_saturated_pixels_does_not_count() -> None:
    values = np.repeat(np.array([0, 29_000, 31_000, 65_535], np.uint16), 25)
    assert measure_range(values) == (29_000, 31_000)
    # Unless there is nothing else.
    assert measure_range(np.array([0, 65_535], np.uint16)) == (0, 65_535)
    assert measure_range(np.zeros(3, np.uint16)) == (0, 0)


def test_measure_range__integers_and_floats() -> None:
    assert measure_range(np.array([[-5, 0], [7, 70_000]], np.int32)) == (-5, 70_000)
    assert measure_range(np.array([np.nan, 20.5, -np.inf, 36.25], np.float32)) == (20.5, 36.25)
    assert measure_range(np.array([np.nan], np.float32)) is None


def test_join_ranges__smallest_that_holds_both() -> None:
    assert join_ranges((1, 5), (3, 9)) == (1, 9)
    assert join_ranges(None, (3, 9)) == (3, 9)
    assert join_ranges((3, 9), None) == (3, 9)
    assert join_ranges(None, None) is None


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_scale_values__by_hand(dtype: type[np.generic]) -> None:
    values = np.array([[0, 1000, 1001, 1002], [1255, 1510, 1511, 9000]], dtype)
    # 2 values a level, halves up: 1001 is level 0.5.
    expected = [[0, 0, 1, 1], [128, 255, 255, 255]]
    np.testing.assert_array_equal(scale_values(values, (1000, 1510)), expected)


def test_scale_values__no_number_is_black_and_many_rows_are_as_one() -> None:
    assert scale_values(np.array([[np.nan, np.inf, -np.inf]], np.float32), (0, 1)).tolist() == [[0, 255, 0]]
    values = np.repeat(np.arange(3000, dtype=np.int32)[:, None], 2, axis=1)
    np.testing.assert_array_equal(scale_values(values, (0, 2999)), scale_values(values.astype(np.uint16), (0, 2999)))
