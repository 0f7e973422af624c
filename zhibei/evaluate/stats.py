"""How sure a difference of shares or a ratio is. Knows counts, not models, tasks or files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions. `difference` is the second's share less the first's."""

    gained: int
    """Questions only the second answers rightly."""
    lost: int
    """Questions only the first answers rightly."""
    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, exact McNemar: how likely a split at least this uneven is if neither is better."""


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p-value of McNemar's test in its exact form: a fair coin decides each discordant question.

    McNemar 1947, Psychometrika 12:153-157; the binomial form after Mosteller 1952, Biometrics 8:220-226.
    """
    num_discordant = gained + lost
    if num_discordant == 0:
        return 1.0
    tail = sum(math.comb(num_discordant, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**num_discordant)


def compare_paired(
    first: Sequence[bool], second: Sequence[bool], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Paired:
    """Second model against first on the same questions: difference of shares, paired bootstrap interval, p-value.

    The bootstrap draws questions with replacement and takes percentiles (Efron 1979, Ann. Statist. 7:1-26). Only the
    three outcomes gained, lost and equal matter, so a resample is a draw of their counts.

    Raises ValueError when the two differ in length or are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be paired")
    total = len(first)
    outcomes = [int(after) - int(before) for before, after in zip(first, second, strict=True)]
    gained, lost = outcomes.count(1), outcomes.count(-1)
    random = Random(seed)
    weights = (gained, lost, total - gained - lost)
    drawn = sorted(sum(random.choices((1, -1, 0), weights, k=total)) / total for _ in range(num_resamples))
    cut = (1 - confidence) / 2
    low, high = _quantile(drawn, cut), _quantile(drawn, 1 - cut)
    return Paired(gained, lost, (gained - lost) / total, low, high, mcnemar_exact(gained, lost))


def ratio_interval(
    sums: Sequence[float], counts: Sequence[int], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """sum(sums) / sum(counts), such as a loss per token over rows of unequal length, with low and high.

    Rows, not tokens, are what is independent; so rows are drawn with replacement and percentiles are taken (Efron
    1979, Ann. Statist. 7:1-26). Raises ValueError when there is nothing to divide by, or the two differ in length.
    """
    if len(sums) != len(counts) or sum(counts) <= 0:
        raise ValueError(f"{len(sums)} sums and {len(counts)} counts give no ratio")
    rows, random = range(len(sums)), Random(seed)
    drawn = []
    for _ in range(num_resamples):
        chosen = random.choices(rows, k=len(sums))
        num_drawn = sum(counts[row] for row in chosen)
        if num_drawn:
            drawn.append(sum(sums[row] for row in chosen) / num_drawn)
    drawn.sort()
    cut = (1 - confidence) / 2
    return sum(sums) / sum(counts), _quantile(drawn, cut), _quantile(drawn, 1 - cut)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the neighbours, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
