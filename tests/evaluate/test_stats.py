"""Intervals and tests against known values and a few lines of numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zhibei.evaluate.stats import compare_paired, mcnemar_exact, ratio_interval
from zhibei.losses.intervals import wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_equals_the_published_table(right, total, low, high):
    share = wilson(right, total)
    assert (round(share.low, 4), round(share.high, 4)) == (low, high)
    assert share.score == right / total


def test_wilson_bounds_are_where_the_score_test_is_just_significant():
    """The definition: at the bounds p0, |share - p0| = z * sqrt(p0 (1 - p0) / n)."""
    z = 1.959963984540054
    for right, total in [(3, 10), (50, 90), (1, 300), (299, 300)]:
        share = wilson(right, total)
        for bound in (share.low, share.high):
            assert math.isclose(abs(right / total - bound), z * math.sqrt(bound * (1 - bound) / total), rel_tol=1e-9)


@pytest.mark.parametrize(("right", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_is_no_share(right, total):
    with pytest.raises(ValueError, match="is no share"):
        wilson(right, total)


def test_more_confidence_and_fewer_questions_widen():
    assert wilson(5, 10).low > wilson(5, 10, confidence=0.99).low
    assert wilson(50, 100).low > wilson(5, 10).low


def test_mcnemar_against_all_outcomes_counted():
    for gained, lost in [(0, 0), (1, 0), (5, 0), (2, 7), (4, 4), (10, 3)]:
        total = gained + lost
        counted = [bin(outcome).count("1") for outcome in range(2**total)]
        as_uneven = sum(abs(2 * k - total) >= abs(gained - lost) for k in counted)
        assert math.isclose(mcnemar_exact(gained, lost), as_uneven / 2**total)
        assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


def test_paired_comparison_counts_and_interval_against_numpy():
    random = np.random.default_rng(0)
    first = random.random(400) < 0.3
    second = random.random(400) < 0.6
    found = compare_paired(first.tolist(), second.tolist(), num_resamples=4000)
    assert found.gained == int((second & ~first).sum())
    assert found.lost == int((first & ~second).sum())
    assert math.isclose(found.difference, second.mean() - first.mean())
    differences = second.astype(int) - first.astype(int)
    resampled = differences[random.integers(0, 400, size=(4000, 400))].mean(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert abs(found.low - low) < 0.012
    assert abs(found.high - high) < 0.012
    assert found.p_value < 1e-6


def test_equal_models_do_not_differ():
    right = [True, False, True, True]
    found = compare_paired(right, right)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_answers_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_paired([True], [True, False])
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_paired([], [])


def test_ratio_interval_against_numpy():
    random = np.random.default_rng(1)
    counts = random.integers(1, 40, size=60)
    sums = counts * random.normal(2.0, 0.5, size=60)
    ratio, low, high = ratio_interval(sums.tolist(), counts.tolist())
    assert math.isclose(ratio, sums.sum() / counts.sum())
    rows = random.integers(0, 60, size=(4000, 60))
    wanted = np.quantile(sums[rows].sum(axis=1) / counts[rows].sum(axis=1), [0.025, 0.975])
    assert np.allclose([low, high], wanted, atol=0.02)


def test_equal_rows_leave_no_doubt_and_empty_ones_no_ratio():
    assert ratio_interval([3.0, 6.0], [1, 2]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="give no ratio"):
        ratio_interval([0.0], [0])
    with pytest.raises(ValueError, match="give no ratio"):
        ratio_interval([1.0], [1, 2])
