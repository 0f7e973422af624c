"""From the rewards a source gives to those that are learned from: penalty, running scale, bounds. Knows numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zhibei.config.policy import PolicySection

SAME_REWARD = 1e-8
"""Rewards of a group that differ by less are equal."""


@dataclass
class RunningScale:
    """Mean and deviation of all rewards so far, put together batch by batch (Chan, Golub and LeVeque 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, values: Sequence[float]) -> None:
        new = len(values)
        if not new:
            return
        mean = math.fsum(values) / new
        squares = math.fsum((value - mean) ** 2 for value in values)
        both, gap = self.count + new, mean - self.mean
        self.squares += squares + gap * gap * self.count * new / both
        self.mean += gap * new / both
        self.count = both

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def shaped(
    scores: Sequence[float], was_cut: Sequence[bool], section: PolicySection, scale: RunningScale
) -> torch.Tensor:
    """The rewards to learn from, [B] float32: penalty for answers that were cut off, then the running scale (which
    takes this batch in first), then the bounds."""
    values = [score - section.missing_terminator_penalty * cut for score, cut in zip(scores, was_cut, strict=True)]
    if section.normalize_rewards:
        scale.add(values)
        values = [(value - scale.mean) / (scale.deviation + 1e-8) for value in values]
    if section.reward_clip:
        values = [min(max(value, -section.reward_clip), section.reward_clip) for value in values]
    return torch.tensor(values, dtype=torch.float32)


def less_kl(rewards_B: torch.Tensor, kl_BT: torch.Tensor, mask_BT: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Rewards of answers with the KL of the whole answer taken off (arXiv:2402.14740, eq. 3)."""
    return rewards_B - coefficient * (kl_BT * mask_BT).sum(dim=1)


def differs(rewards_QG: torch.Tensor) -> torch.Tensor:
    """Whether the answers of each group have different rewards, [Q]."""
    return rewards_QG.amax(dim=1) - rewards_QG.amin(dim=1) > SAME_REWARD
