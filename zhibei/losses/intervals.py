"""How sure a share is. Knows counts, not models, tasks or files; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Share:
    """`right` of `total` (a tie may count as half), with the interval that holds the true share so surely."""

    right: float
    total: int
    low: float
    high: float

    @property
    def score(self) -> float:
        return self.right / self.total


def wilson(right: float, total: int, *, confidence: float = 0.95) -> Share:
    """A share with its score interval (Wilson 1927, JASA 22:209-212), which stays within 0 and 1 and has a width
    even when none or all are right.

    Raises ValueError when `right` is not within 0 and `total`, or `total` is 0.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no share")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At the ends the formula is exact; without the clamp rounding would leave 1e-17 or 1 + 1e-16.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == total else min(1.0, middle + half)
    return Share(right, total, low, high)
