"""The hardest passes of a run: most tokens, longest row, most passes in one step. Knows rows and cuts, not models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zhibei.data.batches import Batch, Batches, collate_packed, collate_padded, split_packed, split_padded

MOST_STEPS = 3000
MOST_PASSES = 8


@dataclass(frozen=True)
class Worst:
    """`first`: the passes with the most tokens and the longest row. `second`: a step of the most passes.

    `tokens` counts padding; `passes` is the most passes of any step, of which `second` holds at most MOST_PASSES.
    """

    first: list[Batch]
    second: list[Batch]
    tokens: int
    longest: int
    passes: int

    @property
    def text(self) -> str:
        return f"{self.tokens:,} tokens in one pass, a row of {self.longest:,} tokens, {self.passes} passes in one step"


def worst_of(batches: Batches) -> Worst:
    """Looked for in every step of the run, or in MOST_STEPS steps spread over it."""
    lengths, plan = batches.rows.lengths, batches.plan
    split = split_packed if plan.packing else split_padded
    heaviest: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
    longest, most = heaviest, (0, 0)
    steps = range(batches.num_steps)
    looked_at = steps if len(steps) <= MOST_STEPS else np.linspace(0, len(steps) - 1, MOST_STEPS).astype(int)
    for step in looked_at:
        numbers = batches.items_of_step(int(step))
        groups = [numbers[group] for group in split(lengths[numbers], plan.micro_batch_tokens)]
        most = max(most, (len(groups), int(step)))
        for group in groups:
            row_lengths = lengths[group]
            width = int(row_lengths.max())
            tokens = int(row_lengths.sum()) if plan.packing else width * len(group)
            heaviest = heaviest if heaviest[0] >= tokens else (tokens, group)
            longest = longest if longest[0] >= width else (width, group)
    collate = collate_packed if plan.packing else collate_padded
    first = [collate(batches.rows, heaviest[1], plan)]
    if not np.array_equal(heaviest[1], longest[1]):
        first.append(collate(batches.rows, longest[1], plan))
    second = batches.micro_batches(most[1])[:MOST_PASSES]
    return Worst(first, second, heaviest[0], longest[0], most[0])


def worst_heldout(heldout: Batches) -> Batch:
    """The held-out rows that are longest, as one evaluation pass takes them."""
    lengths, plan = heldout.rows.lengths, heldout.plan
    longest_first = np.argsort(-lengths, kind="stable")[: plan.global_batch]
    split, collate = (split_packed, collate_packed) if plan.packing else (split_padded, collate_padded)
    groups = split(lengths[longest_first], plan.micro_batch_tokens)
    group = max(groups, key=lambda group: int(lengths[longest_first[group]].max()))
    return collate(heldout.rows, longest_first[group], plan)
