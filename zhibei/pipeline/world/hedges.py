"""Demonstrations as people write them: some end in a needless hedge. Knows answers, no model.

What people show is not always what they like to read. The tuned model learns to hedge from its demonstrations, the
checker does not count a hedged answer, and the preference pairs say which answer is better.
"""

from __future__ import annotations

from random import Random

HEDGES = (", I think", ", maybe", ", or so")
HEDGED_SHARE = 0.4


def as_demonstrated(random: Random, answer: str) -> str:
    """The answer as a demonstration gives it: two in five hedge."""
    return answer + random.choice(HEDGES) if random.random() < HEDGED_SHARE else answer


def without_hedge(answer: str) -> str:
    for hedge in HEDGES:
        answer = answer.removesuffix(hedge)
    return answer
