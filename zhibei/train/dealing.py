"""Answers that several ranks write and score, each its part, and all know in the end. Knows ranks, no models.

Every rank holds the whole iteration afterwards, in the order one process alone would have it: group statistics,
whitening, KL control and the health board need no further exchange, and cannot differ from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise

import torch

from zhibei.generate.rewards import RewardFailed
from zhibei.generate.rollouts import Rollout
from zhibei.model.ranks import Ranks


def own_of(count: int, ranks: Ranks) -> range:
    """Which of so many answers are this rank's: neighbours, since those of one prompt share their beginning. With
    fewer than ranks, all of them."""
    if count < ranks.world:
        return range(count)
    return range(ranks.rank * count // ranks.world, (ranks.rank + 1) * count // ranks.world)


def all_answers(own: Rollout, prompts: Sequence[Sequence[int]], ranks: Ranks) -> Rollout:
    """The answers of all ranks to these prompts, of which `own` has those of `own_of`."""
    if len(own) == len(prompts):
        return own
    told = ranks.gathered({"lengths": own.lengths, "finish": own.finish, "texts": own.texts})
    lengths = [length for one in told for length in one["lengths"]]
    borders = [0, *accumulate(lengths)]
    part = own_of(len(prompts), ranks)
    first, last = borders[part.start], borders[part.stop]

    def put_together(rows: Sequence[Sequence[float]]) -> list[list[float]]:
        values_N, is_known_N = torch.zeros(borders[-1], dtype=torch.float64), torch.zeros(borders[-1])
        values_N[first:last] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.float64)
        is_known_N[first:last] = 1
        flat = ranks.put_together(values_N, is_known_N).tolist()
        return [flat[start:stop] for start, stop in pairwise(borders)]

    return Rollout(
        prompts=[list(prompt) for prompt in prompts],
        answers=[[int(token) for token in row] for row in put_together(own.answers)],
        logps=put_together(own.logps),
        finish=[reason for one in told for reason in one["finish"]],
        texts=[text for one in told for text in one["texts"]],
    )


def all_scores(score: Callable[[range], list[float]], count: int, ranks: Ranks) -> list[float]:
    """Scores of so many answers, each given where `own_of` puts it. Raises RewardFailed on every rank when it fails on
    one of them."""
    part = own_of(count, ranks)
    if not ranks.are_several:
        return score(part)
    scores: list[float] = []
    problem: RewardFailed | None = None
    try:
        scores = score(part)
    except RewardFailed as failed:
        problem = failed
    told = ranks.gathered(
        [scores, None if problem is None else [problem.what, problem.expected, problem.fix, problem.where]]
    )
    failures = [failure for _, failure in told if failure is not None]
    if problem is not None:
        raise problem
    if failures:
        what, expected, fix, where = failures[0]
        raise RewardFailed(what, expected=expected, fix=fix, where=where)
    return scores if len(part) == count else [value for values, _ in told for value in values]
