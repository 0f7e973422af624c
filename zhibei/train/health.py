"""The health board: figures of one iteration that show a policy going wrong before its reward does. Knows numbers.

Dimensions: B answers, T tokens of the longest answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from zhibei.losses.policy import kl_k1, kl_k3

if TYPE_CHECKING:
    from zhibei.train.collect import Collected

NGRAM = 4
"""Tokens of the pieces whose repetition is counted."""


def board(
    *,
    answers: Sequence[Sequence[int]],
    ended: Sequence[bool],
    scores: Sequence[float],
    mask_BT: torch.Tensor,
    logps_BT: torch.Tensor,
    reference_BT: torch.Tensor | None,
) -> dict[str, Any]:
    """What an iteration's answers say of the policy that wrote them.

    KL in nats per token and per answer; `length_correlation` is None where rewards or lengths do not vary.
    """
    lengths = [len(answer) for answer in answers]
    figures: dict[str, Any] = {
        "reward_mean": mean(scores),
        "reward_std": deviation(scores),
        "reward_min": min(scores),
        "reward_max": max(scores),
        "length_mean": mean(lengths),
        "length_max": max(lengths),
        "ended_share": mean([float(one) for one in ended]),
        "repeated_share": mean([repeated_share(answer) for answer in answers]),
        "length_correlation": correlation(scores, lengths),
    }
    if reference_BT is not None:
        figures["kl"] = float(kl_k1(logps_BT, reference_BT)[mask_BT].mean())
        figures["kl_k3"] = float(kl_k3(logps_BT, reference_BT)[mask_BT].mean())
        figures["kl_per_answer"] = float((kl_k1(logps_BT, reference_BT) * mask_BT).sum(dim=1).mean())
    return figures


def board_of(collected: Collected) -> dict[str, Any]:
    """The board of an iteration, with the gap between sampler and learner (nats per token)."""
    gap_BT = (collected.engine_logps_BT - collected.old_logps_BT).abs()
    found = board(
        answers=collected.rollout.answers,
        ended=[reason == "stop" for reason in collected.rollout.finish],
        scores=collected.scores,
        mask_BT=collected.mask_BT,
        logps_BT=collected.old_logps_BT,
        reference_BT=collected.reference_BT,
    )
    gaps = gap_BT[collected.mask_BT]
    return {**found, "sampler_gap": float(gaps.mean()), "sampler_gap_max": float(gaps.max())}


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    spread = deviation(a) * deviation(b)
    if spread < 1e-12:
        return None
    centre_a, centre_b = mean(a), mean(b)
    return mean([(x - centre_a) * (y - centre_b) for x, y in zip(a, b, strict=True)]) / spread


def repeated_share(tokens: Sequence[int], size: int = NGRAM) -> float:
    """Share of an answer's pieces of `size` tokens that occurred in it before; 0 for answers shorter than that."""
    pieces = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def explained_variance(values_BT: torch.Tensor, returns_BT: torch.Tensor, mask_BT: torch.Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that only knows the mean; None where the
    returns do not vary."""
    returns, values = returns_BT[mask_BT].double(), values_BT[mask_BT].double()
    spread = float(returns.var(unbiased=False))
    if spread < 1e-12:
        return None
    return 1 - float((returns - values).var(unbiased=False)) / spread
