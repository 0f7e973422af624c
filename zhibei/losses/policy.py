"""Policy-gradient arithmetic: rewards per token, advantages, clipped losses, KL. Knows numbers per token, not models.

Dimensions: B answers, T tokens of an answer, G answers per prompt, Q prompts. `mask_BT` is true on an answer's tokens;
what lies outside of it never changes a result. Losses return sums and never divide by the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def kl_k1(logps_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """log pi - log ref: unbiased for KL(pi || ref) on tokens of pi, may be negative (Schulman 2020, kl-approx)."""
    return logps_BT - reference_BT


def kl_k2(logps_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """(log pi - log ref)^2 / 2: biased, low variance; its gradient is that of the KL (Schulman 2020)."""
    return (logps_BT - reference_BT).square() / 2


def kl_k3(logps_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d with d = log pi - log ref: unbiased and never negative on tokens of pi (Schulman 2020).

    Coati wrote exp(d) - 1 - d, which is not a KL on these tokens but explodes where pi raised a token.
    """
    difference_BT = logps_BT - reference_BT
    return torch.expm1(-difference_BT) + difference_BT


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def token_rewards(
    scores_B: torch.Tensor, kl_BT: torch.Tensor, mask_BT: torch.Tensor, *, kl_coefficient: float
) -> torch.Tensor:
    """-coefficient * KL at every token, plus the answer's score at its true last token (arXiv:2009.01325, section 3.4).

    An answer without tokens gets no reward.
    """
    rewards_BT = -kl_coefficient * kl_BT * mask_BT
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT, positions_T, -1).amax(dim=1)
    is_last_BT = (positions_T == last_B[:, None]) & mask_BT
    return rewards_BT + is_last_BT * scores_B[:, None]


def gae(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    after_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns) by generalised advantage estimation, arXiv:1506.02438, eq. 16, backwards in time.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return = A + V. `after_B` is the value after
    the last token of an answer: 0 where it ended (and everywhere by default), what the critic expects where it would
    have gone on (arXiv:1712.00378, eq. 6). Tokens outside of the mask are skipped, wherever the padding is.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = torch.zeros_like(rewards_BT[:, 0]) if after_B is None else after_B
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(rewards_BT.shape[1])):
        is_token_B = mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = torch.where(is_token_B, advantage_B, 0)
        next_advantage_B = torch.where(is_token_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(is_token_B, values_BT[:, t], next_value_B)
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor, *, keep_mean: bool = False) -> torch.Tensor:
    """Mean 0 and variance 1 over all tokens of the mask together; `keep_mean` only scales (for rewards)."""
    chosen = values_BT[mask_BT]
    if chosen.numel() < 2:
        return values_BT * mask_BT
    mean, deviation = chosen.mean(), chosen.std(unbiased=False)
    whitened_BT = (values_BT - mean) / (deviation + 1e-8)
    return (whitened_BT + mean if keep_mean else whitened_BT) * mask_BT


def truncated_importance(
    logps_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, *, most: float
) -> torch.Tensor:
    """min(exp(log pi - log mu), most) on tokens that an engine drew from mu although pi is what learns; 1 elsewhere.

    The loss of a token is multiplied by it: truncated importance sampling (arXiv:1802.01561, section 4.1), used for
    engines whose probabilities are not quite the trainer's by Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training". `most` 0 is off.
    """
    if not most:
        return torch.ones_like(logps_BT)
    return torch.where(mask_BT, torch.exp(logps_BT - engine_BT).clamp(max=most), 1.0)


@dataclass(frozen=True)
class Clip:
    """Bounds of the probability ratio: 1 - low to 1 + high (arXiv:1707.06347, eq. 7; unequal ones: arXiv:2503.14476).
    `dual`: with a negative advantage the loss is bounded by dual * |A| (arXiv:1912.09729, eq. 5); 0 is off."""

    low: float = 0.2
    high: float = 0.2
    dual: float = 0.0


def clipped_policy_loss(
    logps_BT: torch.Tensor, old_logps_BT: torch.Tensor, advantages_BT: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, was it clipped) of every token: -min(ratio A, clip(ratio) A), arXiv:1707.06347, eq. 7."""
    ratio_BT = torch.exp(logps_BT - old_logps_BT)
    free_BT = -ratio_BT * advantages_BT
    bound_BT = -ratio_BT.clamp(1 - clip.low, 1 + clip.high) * advantages_BT
    loss_BT = torch.maximum(free_BT, bound_BT)
    if clip.dual:
        limited_BT = torch.minimum(loss_BT, -clip.dual * advantages_BT)
        loss_BT = torch.where(advantages_BT < 0, limited_BT, loss_BT)
    return loss_BT, bound_BT > free_BT


def clipped_value_loss(
    values_BT: torch.Tensor, old_values_BT: torch.Tensor, returns_BT: torch.Tensor, *, clip: float
) -> torch.Tensor:
    """max((V - R)^2, (clip(V, V_old +- c) - R)^2) / 2 of every token; clip 0 is off (OpenAI baselines, ppo2)."""
    free_BT = (values_BT - returns_BT).square()
    if not clip:
        return free_BT / 2
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return torch.maximum(free_BT, (near_BT - returns_BT).square()) / 2


def group_relative(scores_QG: torch.Tensor) -> torch.Tensor:
    """(r - mean of the group) / (standard deviation + 1e-4): GRPO, arXiv:2402.03300, section 4.1.2."""
    centred_QG = scores_QG - scores_QG.mean(dim=1, keepdim=True)
    if scores_QG.shape[1] < 2:
        return centred_QG
    return centred_QG / (scores_QG.std(dim=1, keepdim=True) + 1e-4)


def group_centred(scores_QG: torch.Tensor) -> torch.Tensor:
    """r - mean of the group, not divided by its deviation: Dr. GRPO, arXiv:2503.20783, section 3.2."""
    return scores_QG - scores_QG.mean(dim=1, keepdim=True)


def leave_one_out(scores_QG: torch.Tensor) -> torch.Tensor:
    """r - mean of the OTHER answers of the group: RLOO, arXiv:2402.14740, eq. 8. A group of one has no baseline."""
    num_answers = scores_QG.shape[1]
    if num_answers < 2:
        return scores_QG
    return (scores_QG - scores_QG.mean(dim=1, keepdim=True)) * (num_answers / (num_answers - 1))


def batch_whitened(scores_QG: torch.Tensor) -> torch.Tensor:
    """(r - mean) / deviation over the whole batch: REINFORCE++ for outcome rewards, arXiv:2501.03262, section 3."""
    return (scores_QG - scores_QG.mean()) / (scores_QG.std(unbiased=False) + 1e-8)


GROUP_ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grpo": group_relative,
    "dr_grpo": group_centred,
    "rloo": leave_one_out,
    "reinforce++": batch_whitened,
}


@dataclass
class KlController:
    """The KL coefficient, fixed, or steered towards a target (arXiv:1909.08593, section 2.2).

    `update` multiplies it by 1 + clip(kl / target - 1, +-0.2) * answers / horizon.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl_per_answer: float, *, num_answers: int) -> None:
        """`kl_per_answer`: nats summed over an answer's tokens, mean over the answers just made."""
        if self.target is not None:
            error = min(max(kl_per_answer / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * num_answers / self.horizon
