"""From logits to the distribution a token is drawn from. Knows no model; the formulas are those of transformers."""

from __future__ import annotations

import torch

from zhibei.generate.options import SamplingOptions


def penalize_repetition(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make seen tokens less likely: positive logits are divided by `penalty`, others multiplied (arXiv:1909.05858)."""
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(scores_BV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Only the k best scores of each row, and those equal to the k-th; the others become -inf."""
    k = min(top_k, scores_BV.shape[-1])
    kth_B1 = scores_BV.topk(k, dim=-1).values[:, -1:]
    return scores_BV.masked_fill(scores_BV < kth_B1, -torch.inf)


def keep_top_p(scores_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Only the smallest set of tokens that holds probability `top_p`, at least one (arXiv:1904.09751).

    A token goes when it and all less likely ones together hold no more than 1 - top_p.
    """
    sorted_BV, order_BV = scores_BV.sort(dim=-1)
    gone_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    gone_BV[:, -1] = False
    return scores_BV.masked_fill(gone_BV.scatter(-1, order_BV, gone_BV), -torch.inf)


def keep_min_p(scores_BV: torch.Tensor, min_p: float) -> torch.Tensor:
    """Only tokens at least `min_p` times as likely as the most likely one (arXiv:2407.01082)."""
    probs_BV = scores_BV.softmax(dim=-1)
    gone_BV = probs_BV < min_p * probs_BV.amax(dim=-1, keepdim=True)
    gone_BV.scatter_(-1, scores_BV.argmax(dim=-1, keepdim=True), False)
    return scores_BV.masked_fill(gone_BV, -torch.inf)


def shape_scores(logits_BV: torch.Tensor, options: SamplingOptions, seen_BV: torch.Tensor | None) -> torch.Tensor:
    """Logits after penalty, temperature and filters, in that order; softmax of it is the sampling distribution.

    With temperature 0 only the penalty applies, since the rest cannot change which token is the best.
    """
    scores_BV = logits_BV
    if seen_BV is not None:
        scores_BV = penalize_repetition(scores_BV, seen_BV, options.repetition_penalty)
    if options.temperature == 0:
        return scores_BV
    scores_BV = scores_BV / options.temperature
    if options.top_k > 0:
        scores_BV = keep_top_k(scores_BV, options.top_k)
    if options.top_p < 1:
        scores_BV = keep_top_p(scores_BV, options.top_p)
    if options.min_p > 0:
        scores_BV = keep_min_p(scores_BV, options.min_p)
    return scores_BV


def draw(scores_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Token ids whose cumulative probability is the first above `uniform` (float64 in [0, 1)): inverse sampling.

    Scores of -inf are never drawn.
    """
    cumulative_BV = scores_BV.double().softmax(dim=-1).cumsum(dim=-1)
    # The sum may round to just below 1, and the product up to the sum; both would point behind the last token.
    target_B1 = (uniform_B.clamp(max=1 - 2.0**-50) * cumulative_BV[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1).clamp(max=scores_BV.shape[-1] - 1)
