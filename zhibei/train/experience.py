"""Answers with what is learned from each of their tokens, cut into forward passes. Knows grids and batches, no rewards.

Dimensions: B answers, T tokens of the longest answer, N positions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from zhibei.config.errors import UserError
from zhibei.data.batches import (
    NOT_LEARNED,
    Batch,
    BatchPlan,
    collate_packed,
    collate_padded,
    shares_of,
    split_packed,
    split_padded,
)
from zhibei.data.prepared import PreparedRows
from zhibei.generate.rollouts import Rollout
from zhibei.model.ranks import current
from zhibei.model.score_model import last_tokens


@dataclass(frozen=True)
class Experience:
    """What one iteration learns from.

    `rows`: prompt and answer of each, of which the answer is supervised. `figures_BT`: numbers per answer token by
    name, on a grid whose row b belongs to answer b. `weights_BT`: how much a token counts; `units_B`: how much an
    answer adds to what a step is the mean over.
    """

    rows: PreparedRows
    mask_BT: torch.Tensor
    figures_BT: Mapping[str, torch.Tensor]
    weights_BT: torch.Tensor
    units_B: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def passes(self, numbers: Sequence[int], plan: BatchPlan) -> list[Batch]:
        """Forward passes over some answers that belong to one optimiser step. Each carries `figures_BT`, `weights` and
        `share` (so that sums of it are means over the step's tokens) as one number per position.

        How they are cut into passes, and where the padding is, changes neither a figure nor its place.
        """
        num_units = sum(self.units_B[number] for number in numbers)
        num_tokens = int(self.mask_BT[list(numbers)].sum())
        shares_BT = self.mask_BT * (num_units / max(1, num_tokens))
        named = {**self.figures_BT, "weights": self.weights_BT, "share": shares_BT}
        found = []
        for batch in passes_of(self.rows, numbers, plan):
            columns = {name: to_positions(batch, values_BT, self.mask_BT) for name, values_BT in named.items()}
            units = sum(self.units_B[number] for number in batch.row_numbers)
            found.append(replace(batch, columns_I=columns, num_units=units))
        return found


def rows_of(rollout: Rollout) -> PreparedRows:
    """Prompts with their answers as rows, of which the answers are supervised."""
    rows = rollout.rows
    supervised = [
        [False] * len(prompt) + [True] * len(answer)
        for prompt, answer in zip(rollout.prompts, rollout.answers, strict=True)
    ]
    return PreparedRows(
        tokens=np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
        supervised=np.concatenate([np.asarray(row, dtype=bool) for row in supervised]),
        borders=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        row_ids=[str(number) for number in range(len(rows))],
    )


def passes_of(rows: PreparedRows, numbers: Sequence[int], plan: BatchPlan) -> list[Batch]:
    """These rows as forward passes within the token budget; with several ranks, those of one of them (`plan.rank`),
    each as many as the others. Raises UserError for a row that is longer than the budget."""
    chosen = np.asarray(numbers, dtype=np.int64)
    if len(chosen) == 0:
        return []
    lengths = rows.lengths[chosen]
    if int(lengths.max()) > plan.micro_batch_tokens:
        raise UserError(
            f"prompt and answer together have {int(lengths.max())} tokens, one forward pass has room for "
            f"{plan.micro_batch_tokens}",
            expected="micro_batch_tokens of at least the longest prompt and answer together",
            fix="raise micro_batch_tokens, or lower max_new_tokens or data.max_tokens",
            where="micro_batch_tokens",
        )
    split, collate = (split_packed, collate_packed) if plan.packing else (split_padded, collate_padded)
    groups = shares_of(split(lengths, plan.micro_batch_tokens), rank=plan.rank, world=plan.world)
    return [collate(rows, chosen[group], plan) for group in groups]


def to_positions(batch: Batch, values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Numbers per answer token at the positions that predict these tokens, [N], 0 elsewhere.

    Both sides list the answers of a batch in one order, so the k-th learned position is the k-th token of the mask.
    """
    learned_N = batch.targets_BT.flatten() != NOT_LEARNED
    numbers = list(batch.row_numbers)
    values_N = torch.zeros(learned_N.shape, dtype=torch.float32)
    values_N[learned_N] = values_BT[numbers][mask_BT[numbers]].float()
    return values_N


def from_positions(batch: Batch, values_N: torch.Tensor, into_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
    """The way back: put the numbers at learned positions of a batch onto the grid."""
    learned_N = batch.targets_BT.flatten() != NOT_LEARNED
    numbers = torch.tensor(batch.row_numbers)
    part_BT = into_BT[numbers]
    part_BT[mask_BT[numbers]] = values_N.cpu()[learned_N.cpu()].float()
    into_BT[numbers] = part_BT


def on_grid(
    rows: PreparedRows, mask_BT: torch.Tensor, plan: BatchPlan, compute: Callable[[Batch], torch.Tensor]
) -> torch.Tensor:
    """`compute` gives a number per position [N] of a batch on its device; here they are per answer token, [B, T], also
    those that other ranks computed."""
    return on_grid_with_ends(rows, mask_BT, plan, compute)[0]


def on_grid_with_ends(
    rows: PreparedRows, mask_BT: torch.Tensor, plan: BatchPlan, compute: Callable[[Batch], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the number at the last token of each row [B]: what is known once the whole answer is there."""
    found_BT, ends_B = torch.zeros(mask_BT.shape), torch.zeros(len(rows))
    is_known_B = torch.zeros(len(rows))
    with torch.no_grad():
        for batch in passes_of(rows, range(len(rows)), plan):
            values_N = compute(batch)
            from_positions(batch, values_N, found_BT, mask_BT)
            last_R = last_tokens(batch, len(batch.row_numbers))
            ends_B[list(batch.row_numbers)] = values_N.cpu()[last_R].float()
            is_known_B[list(batch.row_numbers)] = 1
    ranks = current()
    known_BT = is_known_B[:, None].expand(mask_BT.shape)
    return ranks.put_together(found_BT, known_BT), ranks.put_together(ends_B, is_known_B)


def minibatches(numbers: Iterable[int], count: int, *, seed: int) -> list[list[int]]:
    """Answers in a new order, cut into so many nearly equal parts; empty parts are left out."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**63, 1]))
    order = random.permutation(np.asarray(list(numbers), dtype=np.int64))
    return [[int(number) for number in part] for part in np.array_split(order, count) if len(part)]
