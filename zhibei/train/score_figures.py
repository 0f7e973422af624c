"""How good a reward model is on held-out pairs: accuracy, length bias, calibration. Knows scores, not models.

Dimensions: P pairs, A = 2 P answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.losses.intervals import Share, wilson

NUM_BINS = 10
PER_TOKENS = 100


@dataclass(frozen=True)
class Scored:
    """Scores and answer lengths (learned tokens) of pairs, and where each pair came from."""

    chosen_P: torch.Tensor
    rejected_P: torch.Tensor
    chosen_tokens_P: torch.Tensor
    rejected_tokens_P: torch.Tensor
    sources: Sequence[str]

    @property
    def gap_P(self) -> torch.Tensor:
        return self.chosen_P - self.rejected_P


def score_figures(scored: Scored) -> dict[str, Any]:
    """Named values for the record of an evaluation; plain numbers, and None where there is nothing to divide by.

    `accuracy` counts pairs whose chosen answer has the higher score, with its 95 % Wilson interval, also `by_source`.
    `score_mean` and `score_deviation` are over all answers. `length_correlation` is Pearson's, `length_slope` the
    change of the score per 100 tokens. `calibration_error`: arXiv:1706.04599, eq. 3, over ten bins of confidence.
    """
    gap_P = scored.gap_P
    right_P = gap_P > 0
    overall = _share(right_P)
    scores_A = torch.cat([scored.chosen_P, scored.rejected_P]).double()
    tokens_A = torch.cat([scored.chosen_tokens_P, scored.rejected_tokens_P]).double()
    correlation, slope = _linear(tokens_A, scores_A)
    shorter_P = scored.chosen_tokens_P < scored.rejected_tokens_P
    return {
        "pairs": overall.total,
        "accuracy": overall.score,
        "accuracy_low": overall.low,
        "accuracy_high": overall.high,
        "margin": float(gap_P.mean()),
        "score_mean": float(scores_A.mean()),
        "score_deviation": float(scores_A.std(unbiased=False)),
        "length_correlation": correlation,
        "length_slope": None if slope is None else slope * PER_TOKENS,
        "accuracy_chosen_shorter": float(right_P[shorter_P].float().mean()) if shorter_P.any() else None,
        "pairs_chosen_shorter": int(shorter_P.sum()),
        "calibration_error": calibration_error(gap_P),
        "by_source": _by_source(right_P, scored.sources),
    }


def calibration_error(gap_P: torch.Tensor) -> float:
    """Mean distance between how sure the scores are (sigmoid of the absolute gap, 0.5 to 1) and how often they are
    right, over bins of equal width weighted by their pairs."""
    sure_P = torch.sigmoid(gap_P.double().abs())
    right_P = (gap_P > 0).double()
    bin_P = ((sure_P - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    total = 0.0
    for number in range(NUM_BINS):
        in_bin_P = bin_P == number
        if in_bin_P.any():
            total += float((sure_P[in_bin_P].sum() - right_P[in_bin_P].sum()).abs())
    return total / len(gap_P)


def _share(right_P: torch.Tensor) -> Share:
    return wilson(int(right_P.sum()), len(right_P))


def _linear(x_A: torch.Tensor, y_A: torch.Tensor) -> tuple[float | None, float | None]:
    """Pearson's correlation and the slope of the least-squares line; None where one of the two is constant."""
    x_A, y_A = x_A - x_A.mean(), y_A - y_A.mean()
    xx, yy, xy = float((x_A * x_A).sum()), float((y_A * y_A).sum()), float((x_A * y_A).sum())
    if xx <= 0:
        return None, None
    return (xy / (xx * yy) ** 0.5 if yy > 0 else None), xy / xx


def _by_source(right_P: torch.Tensor, sources: Sequence[str]) -> dict[str, dict[str, float]]:
    found: dict[str, list[bool]] = {}
    for source, is_right in zip(sources, right_P.tolist(), strict=True):
        found.setdefault(source, []).append(is_right)
    shares = {source: wilson(sum(own), len(own)) for source, own in found.items()}
    return {
        source: {"right": share.right, "total": share.total, "low": share.low, "high": share.high}
        for source, share in shares.items()
    }
