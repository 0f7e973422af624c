"""Curves: thinning keeps the extremes, what is drawn equals what was recorded, axes are round and sorted."""

from __future__ import annotations

import math
import random
import re

import pytest

from zhibei.report.curves import (
    Chart,
    Series,
    draw,
    linear_ticks,
    log_ticks,
    smooth,
    thin,
    tick_label,
    tick_labels,
)


def chart(steps: list[int], values: list[float], *, has_log_switch: bool = False) -> str:
    series = [Series("loss", "损失", "raw", steps, values)]
    return draw(Chart("Loss", "损失", "nats", "nats", series, has_log_switch=has_log_switch))


def test_a_short_curve_is_not_thinned() -> None:
    assert thin([1, 2, 3], [3.0, 1.0, 2.0]) == ([1, 2, 3], [3.0, 1.0, 2.0])


def test_thinning_keeps_minimum_maximum_and_both_ends() -> None:
    noise = random.Random(1)
    values = [noise.gauss(0, 1) for _ in range(100_000)]
    values[54_321], values[12_345] = 99.0, -99.0
    steps, kept = thin(range(100_000), values, num_buckets=400)
    assert len(kept) <= 802
    assert (max(kept), min(kept), kept[0], kept[-1]) == (99.0, -99.0, values[0], values[-1])
    assert steps == sorted(steps)
    assert all(values[step] == value for step, value in zip(steps, kept, strict=True))
    for bucket in range(400):
        stretch = values[bucket * 250 : (bucket + 1) * 250]
        assert {min(stretch), max(stretch)} <= set(kept)


def test_smoothing_is_the_bias_corrected_average() -> None:
    # alpha = 2 / (3 + 1) = 1/2: 1; (1/4 * 1 + 1/2 * 4) / (3/4) = 3; (1/8 * 1 + 1/4 * 4 + 1/2 * 2) / (7/8) = 17/7
    assert smooth([1.0, 4.0, 2.0], 3) == pytest.approx([1.0, 3.0, 17 / 7])
    assert smooth([5.0] * 50, 20) == pytest.approx([5.0] * 50)


def test_what_is_drawn_equals_what_was_recorded() -> None:
    drawn = chart([10, 20, 40], [3.0, 2.0, 1.0])
    assert 'data-steps="10 20 40" data-values="3 2 1"' in drawn
    match = re.search(r'points="([^"]+)"', drawn)
    assert match is not None
    points = [tuple(map(float, point.split(","))) for point in match[1].split()]
    # equal steps in value are equal heights, and twice the steps are twice as far
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.11)
    assert points[2][0] - points[1][0] == pytest.approx(2 * (points[1][0] - points[0][0]), abs=0.2)


def test_a_logarithmic_axis_gives_equal_ratios_equal_heights() -> None:
    drawn = chart([1, 2, 3], [100.0, 10.0, 1.0], has_log_switch=True)
    match = re.search(r'class="log".*?points="([^"]+)"', drawn)
    assert match is not None
    heights = [float(point.split(",")[1]) for point in match[1].split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)


def test_no_logarithmic_axis_where_a_value_is_not_positive() -> None:
    assert 'class="log"' not in chart([1, 2], [1.0, 0.0], has_log_switch=True)


def test_values_that_are_not_numbers_are_named_not_drawn() -> None:
    drawn = chart([1, 2, 3], [1.0, math.nan, math.inf])
    assert 'data-steps="1"' in drawn
    assert "loss: not a finite number at 2 step(s): 2, 3." in drawn


def test_thinning_is_said() -> None:
    assert "of 5,000 points are drawn" in chart(list(range(5000)), [math.sin(step / 9) for step in range(5000)])
    assert "points are drawn" not in chart([1, 2], [1.0, 2.0])


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_to_draw_is_said(values: list[float]) -> None:
    assert "nothing recorded yet" in chart(list(range(len(values))), values)


@pytest.mark.parametrize("values", [[0.0], [2.5], [-1.0, -1.0], [1e-9, 2e-9], [1e30, 2e30], [0.0, 0.0, 0.0]])
def test_any_range_can_be_drawn(values: list[float]) -> None:
    drawn = chart(list(range(len(values))), values, has_log_switch=True)
    assert "nan" not in drawn
    assert "<polyline" in drawn


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0.93, 3.2) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert linear_ticks(1, 400, about=9) == [50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]
    assert log_ticks(0.9, 110) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(1.1, 1.4) == linear_ticks(1.1, 1.4)


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (2e-5, "2e-5"), (1.5e-5, "1.5e-5"), (0.25, "0.25"), (12000, "12k"), (2.5e6, "2.5M")]
)
def test_tick_labels_are_short(value: float, label: str) -> None:
    assert tick_label(value) == label


def test_labels_of_one_axis_have_equal_decimals() -> None:
    assert tick_labels([1.0, 1.5, 2.0]) == ["1.0", "1.5", "2.0"]
    assert tick_labels([1.0, 2.0]) == ["1", "2"]
    assert tick_labels([0, 7.5e-4, 1e-3]) == ["0", "7.5e-4", "1e-3"]
    assert tick_labels([0, 5000, 10000]) == ["0", "5k", "10k"]
    assert tick_labels([0.0, 5e-6, 1e-5]) == ["0", "5e-6", "1e-5"]
