"""Preference losses, one function per equation. Know log-probabilities of whole answers, not models or tokens.

Dimensions: P pairs, A judged answers. Every function returns a sum over pairs or answers in fp32 and never divides.
`gain` is log pi(y|x) - log pi_ref(y|x) of an answer, summed over its tokens.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def dpo_loss_sum(
    chosen_gain_P: torch.Tensor, rejected_gain_P: torch.Tensor, *, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log sigmoid(beta (gain_w - gain_l)): arXiv:2305.18290, eq. 7.

    `label_smoothing` e is the chance that a pair is labelled the wrong way round (conservative DPO):
    (1 - e) times the loss plus e times the loss of the exchanged pair.
    """
    logit_P = beta * (chosen_gain_P - rejected_gain_P).float()
    kept_P, exchanged_P = -logsigmoid(logit_P), -logsigmoid(-logit_P)
    return ((1 - label_smoothing) * kept_P + label_smoothing * exchanged_P).sum()


def ipo_loss_sum(mean_chosen_gain_P: torch.Tensor, mean_rejected_gain_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """(gain_w - gain_l - 1 / (2 beta))^2: arXiv:2310.12036, eq. 17. Gains are means over an answer's tokens, as the
    paper's authors ask of implementations, so that long answers do not need larger gaps."""
    return ((mean_chosen_gain_P - mean_rejected_gain_P).float() - 1 / (2 * beta)).square().sum()


def simpo_loss_sum(
    mean_chosen_logp_P: torch.Tensor, mean_rejected_logp_P: torch.Tensor, *, beta: float, gamma: float
) -> torch.Tensor:
    """-log sigmoid(beta (mean logp_w - mean logp_l) - gamma): arXiv:2405.14734, eq. 6. Needs no reference."""
    return -logsigmoid(beta * (mean_chosen_logp_P - mean_rejected_logp_P).float() - gamma).sum()


def orpo_odds_loss_sum(mean_chosen_logp_P: torch.Tensor, mean_rejected_logp_P: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(log odds_w - log odds_l), odds = p / (1 - p): arXiv:2403.07691, eq. 7. The other part of ORPO is the
    cross-entropy of the chosen answers; log p is the mean over an answer's tokens."""
    log_odds_P = _log_odds(mean_chosen_logp_P.float()) - _log_odds(mean_rejected_logp_P.float())
    return -logsigmoid(log_odds_P).sum()


def _log_odds(logp_P: torch.Tensor) -> torch.Tensor:
    """log p - log(1 - p), exact near 0 and near 1; a p of exactly 1, with infinite odds, is taken as 1 - 2^-24."""
    logp_P = logp_P.clamp(max=-(2.0**-24))
    return logp_P - torch.log(-torch.expm1(logp_P))


def kto_loss_sum(
    gain_A: torch.Tensor,
    is_good_A: torch.Tensor,
    *,
    baseline: torch.Tensor,
    beta: float,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> torch.Tensor:
    """Weights times 1 - sigmoid(beta (gain - z)) for good answers, 1 - sigmoid(beta (z - gain)) for bad ones:
    arXiv:2402.01306, eq. 8. `baseline` z estimates KL(pi || pi_ref) from mismatched answers (`kto_baseline`)."""
    distance_A = beta * (gain_A.float() - baseline.detach())
    good_A = good_weight * (1 - torch.sigmoid(distance_A))
    bad_A = bad_weight * (1 - torch.sigmoid(-distance_A))
    return torch.where(is_good_A, good_A, bad_A).sum()


def kto_baseline(mismatched_gain_A: torch.Tensor) -> torch.Tensor:
    """max(0, mean gain of answers put behind the wrong prompts): arXiv:2402.01306, section 4.2. No gradient."""
    return mismatched_gain_A.detach().float().mean().clamp(min=0)
