"""Demonstrations as people write them: some end in a needless hedge. Knows answers, no model.

What people show is not always what they like to read. The tuned model learns to hedge from its demonstrations, the
checker does not count a hedged answer, and the preference pairs say which answer is better.
"""

from __future__ import annotations

from random import Random

HEDGES = (", or so", ", I say", ", so I say")
"""In words that the world has anyway: one more word in the vocabulary is another random start of pre-training, and some
starts learn to copy late."""
HEDGED_SHARE = 0.5
PLAIN_SHARE = 2 / 3
"""So many of the demonstrations come first, from writers who do not hedge."""


def as_demonstrated(random: Random, answer: str) -> str:
    """The answer as a writer gives it who hedges every second time."""
    return answer + random.choice(HEDGES) if random.random() < HEDGED_SHARE else answer


def without_hedge(answer: str) -> str:
    for hedge in HEDGES:
        answer = answer.removesuffix(hedge)
    return answer
