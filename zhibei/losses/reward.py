"""The loss of a reward model over pairs of answers. Knows scores, not models.

Dimensions: P pairs.
"""

from __future__ import annotations

import torch


def pair_loss_sum(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, margin_P: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over pairs of softplus(r_rejected - r_chosen + margin), in fp32.

    The Bradley-Terry likelihood of arXiv:2203.02155, eq. 1, with the margin of arXiv:2307.09288, eq. 2. Coati's
    `log_sig`, -log sigmoid(c - r), and `log_exp`, log(1 + exp(r - c)), are this same function.
    """
    gap_P = rejected_P.float() - chosen_P.float()
    return torch.nn.functional.softplus(gap_P if margin_P is None else gap_P + margin_P.float()).sum()


def tie_loss_sum(first_P: torch.Tensor, second_P: torch.Tensor) -> torch.Tensor:
    """Sum over pairs judged equal: the mean of the loss in both orders (cross-entropy with target 1/2), in fp32."""
    gap_P = first_P.float() - second_P.float()
    both_P = torch.nn.functional.softplus(gap_P) + torch.nn.functional.softplus(-gap_P)
    return both_P.sum() / 2


def centring_sum(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
    """Sum over pairs of (r_chosen + r_rejected)^2, in fp32: arXiv:2312.09244, eq. 2. The pair loss sees differences
    only, so without it the scores may drift together."""
    return (chosen_P.float() + rejected_P.float()).square().sum()
