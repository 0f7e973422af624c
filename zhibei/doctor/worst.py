"""The hardest passes of a run: most tokens, longest item, most passes in one step. Knows rows and cuts, not models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from zhibei.data.batches import Batch, Batches, split_packed, split_padded
from zhibei.data.prepared import PreparedRows

MOST_STEPS = 3000
MOST_PASSES = 8


@dataclass(frozen=True)
class Worst:
    """`first`: the passes with the most tokens and the longest item. `second`: a step of the most passes.

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


@dataclass(frozen=True)
class WorstItems:
    """The same by the numbers of items: of each pass."""

    first: list[np.ndarray]
    second: list[np.ndarray]
    passes: int

    @property
    def all(self) -> np.ndarray:
        return np.unique(np.concatenate([*self.first, *self.second]))


def worst_of(batches: Batches) -> Worst:
    """Looked for in every step of the run, or in MOST_STEPS steps spread over it."""
    return as_passes(worst_items(batches), batches)


def worst_items(batches: Batches) -> WorstItems:
    """Which items make the worst passes."""
    lengths, plan = batches.item_lengths, batches.plan
    heaviest: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
    longest, most = heaviest, (0, 0)
    steps = range(batches.num_steps)
    looked_at = steps if len(steps) <= MOST_STEPS else np.linspace(0, len(steps) - 1, MOST_STEPS).astype(int)
    for step in looked_at:
        groups = _groups(batches, int(step))
        most = max(most, (len(groups), int(step)))
        for group in groups:
            width = int(lengths[group].max())
            tokens = int(lengths[group].sum()) if plan.packing else width * len(group) * plan.rows_per_item
            heaviest = heaviest if heaviest[0] >= tokens else (tokens, group)
            longest = longest if longest[0] >= width else (width, group)
    first = [heaviest[1]] if np.array_equal(heaviest[1], longest[1]) else [heaviest[1], longest[1]]
    return WorstItems(first, _groups(batches, most[1])[:MOST_PASSES], most[0])


def as_passes(found: WorstItems, batches: Batches) -> Worst:
    """The passes that these items make."""
    first, second = ([batches.batch_of(group) for group in groups] for groups in (found.first, found.second))
    return Worst(
        first,
        second,
        tokens=max(batch.tokens_BT.numel() for batch in first),
        longest=max(batch.longest for batch in first),
        passes=found.passes,
    )


def _groups(batches: Batches, step: int) -> list[np.ndarray]:
    numbers, plan = batches.items_of_step(step), batches.plan
    lengths = batches.item_lengths[numbers]
    if plan.packing:
        return [numbers[group] for group in split_packed(lengths, plan.micro_batch_tokens)]
    return [numbers[group] for group in split_padded(lengths, plan.micro_batch_tokens // plan.rows_per_item)]


def worst_heldout(heldout: Batches) -> Batch:
    """The held-out rows that are longest, as one evaluation pass takes them."""
    lengths, plan = heldout.item_lengths, heldout.plan
    longest_first = np.argsort(-lengths, kind="stable")[: plan.global_batch]
    split = split_packed if plan.packing else split_padded
    groups = split(lengths[longest_first], plan.micro_batch_tokens)
    group = max(groups, key=lambda group: int(lengths[longest_first[group]].max()))
    return heldout.batch_of(longest_first[group])


def only_items(batches: Batches, items: np.ndarray) -> Batches:
    """Batches over some of the items only, in this order, all of them in one step."""
    plan = batches.plan
    numbers = (items[:, None] * plan.rows_per_item + np.arange(plan.rows_per_item)).reshape(-1)
    return Batches(
        only_rows(batches.rows, numbers),
        replace(plan, global_batch=len(items), shuffle=False, group_by_length=False),
        columns_I={name: column[items] for name, column in batches.columns_I.items()},
    )


def only_rows(rows: PreparedRows, numbers: np.ndarray) -> PreparedRows:
    """Some of the rows, in this order."""
    parts = [slice(int(rows.borders[number]), int(rows.borders[number + 1])) for number in numbers]
    return PreparedRows(
        tokens=np.concatenate([rows.tokens[part] for part in parts]),
        supervised=np.concatenate([rows.supervised[part] for part in parts]),
        borders=np.concatenate([[0], np.cumsum([part.stop - part.start for part in parts])]).astype(np.int64),
        row_ids=[rows.row_ids[number] for number in numbers],
    )
