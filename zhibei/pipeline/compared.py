"""Scores of several models on the same rows and questions, each with its interval, and every pair of them compared.

Knows numbers, not models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zhibei.evaluate.stats import compare_paired, ratio_interval
from zhibei.losses.intervals import wilson

if TYPE_CHECKING:
    from zhibei.pipeline.evaluation import Measured


def compare_all(measured: Sequence[Measured]) -> dict[str, Any]:
    """{"scores": {metric: {model: {"score", "low", "high", "number"}}}, "paired": {metric: [...]}}; metrics without a
    figure of any model are left out. Every interval has 95 %."""
    scores: dict[str, dict[str, Any]] = {"loss": {}, "right": {}, "judge": {}}
    for one in measured:
        if one.loss_sums:
            scores["loss"][one.name] = _ratio(one.loss_sums, one.loss_tokens, number=len(one.loss_sums))
        if one.right:
            scores["right"][one.name] = _share(one.right) if _is_binary(measured) else _mean(one.right)
        if one.judged:
            scores["judge"][one.name] = _mean(one.judged)
    paired: dict[str, list[dict[str, Any]]] = {"loss": [], "right": [], "judge": []}
    for first, second in itertools.combinations(measured, 2):
        names = {"first": first.name, "second": second.name}
        if first.loss_sums and second.loss_sums:
            differences = [after - before for before, after in zip(first.loss_sums, second.loss_sums, strict=True)]
            paired["loss"].append({**names, **_difference(differences, first.loss_tokens)})
        if first.right and second.right:
            paired["right"].append({**names, **_answers_compared(first.right, second.right)})
        if first.judged and second.judged:
            paired["judge"].append({**names, **_wins(first.judged, second.judged)})
    return {
        "scores": {name: found for name, found in scores.items() if found},
        "paired": {name: found for name, found in paired.items() if found},
    }


def _is_binary(measured: Sequence[Measured]) -> bool:
    return all(value in (0.0, 1.0) for one in measured for value in one.right)


def _share(values: Sequence[float]) -> dict[str, Any]:
    found = wilson(round(sum(values)), len(values))
    return {"score": found.score, "low": found.low, "high": found.high, "number": found.total, "is_share": True}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return _ratio(values, [1] * len(values), number=len(values))


def _ratio(sums: Sequence[float], counts: Sequence[int], *, number: int) -> dict[str, Any]:
    score, low, high = ratio_interval(sums, counts)
    return {"score": score, "low": low, "high": high, "number": number, "is_share": False}


def _difference(differences: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    difference, low, high = ratio_interval(differences, counts)
    return {"difference": difference, "low": low, "high": high}


def _answers_compared(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Right answers by the exact McNemar test; figures that are no yes or no by their mean difference."""
    if all(value in (0.0, 1.0) for value in (*first, *second)):
        return asdict(compare_paired([bool(value) for value in first], [bool(value) for value in second]))
    differences = [after - before for before, after in zip(first, second, strict=True)]
    return _difference(differences, [1] * len(differences))


def _wins(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """How often the judge prefers the second's answer, ties left out, with its Wilson interval."""
    wins = sum(after > before for before, after in zip(first, second, strict=True))
    losses = sum(after < before for before, after in zip(first, second, strict=True))
    found = wilson(wins, wins + losses) if wins + losses else None
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(first) - wins - losses,
        "win_rate": found.score if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
    }
