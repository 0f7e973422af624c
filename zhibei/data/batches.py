"""Which rows make up an optimiser step, and the tensors of its micro-batches. Knows tokens, not text or models.

Dimensions: B sequences (1 when packed), T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from zhibei.data.prepared import PreparedRows
from zhibei.data.steps import num_steps_of, require_steps, total_rows_of

NOT_LEARNED = -100
LENGTH_GROUP_STEPS = 50


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    `targets_BT` holds the next token where it is learned, else -100; the shift by one happens here and nowhere else.
    Packed batches (B = 1) have `borders` (int32, cumulative row lengths from 0); rows beyond `row_numbers` are padding.
    Padded batches have a `mask_BT` of real tokens instead. `num_units` counts what the loss is a mean of: learned
    tokens, or items (pairs, judged answers); `num_learned` counts learned tokens in any case. `columns_I` holds figures
    of the items, [I] each.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_BT: torch.Tensor | None
    borders: torch.Tensor | None
    row_lengths: tuple[int, ...]
    row_numbers: tuple[int, ...]
    num_units: int
    num_learned: int = 0
    columns_I: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of real rows, padding not counted."""
        return sum(self.row_lengths[: len(self.row_numbers)])

    @property
    def longest(self) -> int:
        return max(self.row_lengths)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy does not wait when the memory is pinned."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None or device.type == "cpu":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        moved = {name: move(getattr(self, name)) for name in ("tokens_BT", "targets_BT", "positions_BT")}
        columns_I = {name: column.to(device) for name, column in self.columns_I.items()}
        return replace(self, **moved, mask_BT=move(self.mask_BT), borders=move(self.borders), columns_I=columns_I)


@dataclass(frozen=True)
class BatchPlan:
    """How rows become steps and steps become micro-batches.

    `pad_multiple`: token counts are padded up to a multiple, so that compiled kernels see few shapes.
    `rows_per_item`: so many rows in sequence are one item, never torn apart (2: chosen and rejected of a pair); the
    global batch counts items. `unit`: what the loss is a mean of. `rank`, `world`: with several ranks, these are the
    passes of one of them.
    """

    global_batch: int
    micro_batch_tokens: int
    packing: bool = True
    shuffle: bool = True
    group_by_length: bool = False
    seed: int = 0
    pad_multiple: int = 1
    pad_token: int = 0
    rows_per_item: int = 1
    unit: Literal["tokens", "items"] = "tokens"
    rank: int = 0
    """Which part of every step these passes are."""
    world: int = 1
    """How many parts a step has; every part has equally many passes, because ranks wait for one another in each."""


class Batches:
    """Steps over prepared rows. Which items (rows, or pairs of them) a step has is a pure function of (seed, step),
    whatever the ranks. `columns_I` holds figures of the items, which travel with them."""

    def __init__(
        self,
        rows: PreparedRows,
        plan: BatchPlan,
        *,
        epochs: float = 1,
        max_steps: int | None = None,
        columns_I: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.rows, self.plan, self.columns_I = rows, plan, columns_I or {}
        lengths_IK = rows.lengths.reshape(-1, plan.rows_per_item)
        # What an item takes of a forward pass: padded rows are all as long as the longest.
        self._lengths = lengths_IK.sum(axis=1) if plan.packing else lengths_IK.max(axis=1, initial=0)
        self.num_items = len(lengths_IK)
        require_steps(
            self.num_items,
            int(self._lengths.max(initial=0)) * (1 if plan.packing else plan.rows_per_item),
            global_batch=plan.global_batch,
            micro_batch_tokens=plan.micro_batch_tokens,
        )
        length = {"global_batch": plan.global_batch, "epochs": epochs, "max_steps": max_steps}
        self.num_steps = num_steps_of(self.num_items, **length)
        self._total_items = max(total_rows_of(self.num_items, **length), 1)
        self._order_of_epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def item_lengths(self) -> np.ndarray:
        """Tokens that each item takes of a forward pass: packed rows add up, padded ones are as long as the longest."""
        return self._lengths

    def epoch_at(self, step: int) -> float:
        """Passes over the data once `step` steps are done."""
        return min(step * self.plan.global_batch, self._total_items) / self.num_items

    def items_of_step(self, step: int) -> np.ndarray:
        """Item numbers of step `step` (from 0). The stream runs over epoch borders: only the last step may be short."""
        first = step * self.plan.global_batch
        last = min(first + self.plan.global_batch, self._total_items)
        positions = np.arange(first, last)
        epochs = positions // self.num_items
        parts = [self._order(int(e))[positions[epochs == e] % self.num_items] for e in np.unique(epochs)]
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of_epoch[0] != epoch:
            self._order_of_epoch = (epoch, epoch_order(self._lengths, self.plan, epoch))
        return self._order_of_epoch[1]

    def micro_batches(self, step: int) -> list[Batch]:
        """The step's items as forward passes within the token budget."""
        return self._passes(self.items_of_step(step))

    def _passes(self, items: np.ndarray) -> list[Batch]:
        plan = self.plan
        if plan.packing:
            groups = split_packed(self._lengths[items], plan.micro_batch_tokens)
        else:
            groups = split_padded(self._lengths[items], plan.micro_batch_tokens // plan.rows_per_item)
        return [self._pass(items[group]) for group in shares_of(groups, rank=plan.rank, world=plan.world)]

    def _pass(self, items: np.ndarray) -> Batch:
        plan = self.plan
        numbers = (items[:, None] * plan.rows_per_item + np.arange(plan.rows_per_item)).reshape(-1)
        batch = (collate_packed if plan.packing else collate_padded)(self.rows, numbers, plan)
        columns_I = {name: torch.from_numpy(column[items]) for name, column in self.columns_I.items()}
        num_units = batch.num_units if plan.unit == "tokens" else len(items)
        return replace(batch, columns_I=columns_I, num_units=num_units)

    def batch_of(self, items: Sequence[int] | np.ndarray) -> Batch:
        """One forward pass over these items, whatever the token budget."""
        return self._pass(np.asarray(items))

    def with_columns(self, columns_I: Mapping[str, np.ndarray]) -> Batches:
        """The same steps, whose items carry these figures too."""
        other = copy.copy(self)
        other.columns_I = {**self.columns_I, **columns_I}
        return other

    def steps(self, first: int = 0) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches) from step `first` on; the next step is put together while this one is computed."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as ahead:
            pending = ahead.submit(self.micro_batches, first) if first < self.num_steps else None
            for step in range(first, self.num_steps):
                assert pending is not None
                current = pending.result()
                pending = ahead.submit(self.micro_batches, step + 1) if step + 1 < self.num_steps else None
                yield step, current

    def all_rows(self, limit: int | None = None) -> Iterator[Batch]:
        """Every item once, in file order, for held-out evaluation."""
        end = min(self.num_items, limit or self.num_items)
        for start in range(0, end, self.plan.global_batch):
            yield from self._passes(np.arange(start, min(start + self.plan.global_batch, end)))


def shares_of(groups: list[list[int]], *, rank: int, world: int) -> list[list[int]]:
    """The groups of one rank, dealt out in turn; where they do not come out even, the largest are halved.

    With fewer items than ranks there is no fair share, and every rank takes all groups: means stay what they are.
    """
    if world == 1 or sum(len(group) for group in groups) < world:
        return groups
    even = list(groups)
    while len(even) % world:
        largest = max(range(len(even)), key=lambda i: (len(even[i]), -i))
        group = even.pop(largest)
        middle = len(group) // 2
        even[largest:largest] = [group[:middle], group[middle:]]
    return even[rank::world]


def epoch_order(lengths: np.ndarray, plan: BatchPlan, epoch: int) -> np.ndarray:
    """Row numbers in the order of one epoch: a pure function of (seed, epoch, lengths)."""
    num_rows = len(lengths)
    if not plan.shuffle:
        return np.arange(num_rows)
    random = np.random.Generator(np.random.Philox(key=[plan.seed, epoch]))
    order = random.permutation(num_rows)
    if not plan.group_by_length:
        return order
    window = LENGTH_GROUP_STEPS * plan.global_batch
    grouped = []
    for start in range(0, num_rows, window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        steps = [part[i : i + plan.global_batch] for i in range(0, len(part), plan.global_batch)]
        # The short remainder stays last, or every later step would straddle two length groups.
        full, short = (
            [s for s in steps if len(s) == plan.global_batch],
            [s for s in steps if len(s) < plan.global_batch],
        )
        grouped += [full[i] for i in random.permutation(len(full))] + short
    return np.concatenate(grouped)


def split_packed(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """Fewest nearly equal groups whose token sums stay within the budget (longest row first, lightest group)."""
    by_length = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    num_groups = max(1, -(-int(lengths.sum()) // budget))
    while True:
        groups: list[list[int]] = [[] for _ in range(num_groups)]
        sums = [0] * num_groups
        for i in by_length:
            lightest = sums.index(min(sums))
            groups[lightest].append(i)
            sums[lightest] += int(lengths[i])
        if max(sums) <= budget:
            return [sorted(group) for group in groups if group]
        num_groups += 1


def split_padded(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """Rows of similar length together, each group at most `budget` tokens including its padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        longest = int(lengths[groups[-1][0]]) if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _row(rows: PreparedRows, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and next-token targets of one row; the last token has no target."""
    part = slice(int(rows.borders[number]), int(rows.borders[number + 1]))
    tokens = np.asarray(rows.tokens[part], dtype=np.int64)
    targets = np.full(len(tokens), NOT_LEARNED, dtype=np.int64)
    targets[:-1] = np.where(rows.supervised[part][1:], tokens[1:], NOT_LEARNED)
    return tokens, targets


def collate_packed(rows: PreparedRows, numbers: Sequence[int] | np.ndarray, plan: BatchPlan) -> Batch:
    """Rows end to end in one sequence; positions restart at each row, padding at the end is rows of its own."""
    pairs = [_row(rows, int(number)) for number in numbers]
    lengths = [len(tokens) for tokens, _ in pairs]
    padding, longest = -sum(lengths) % plan.pad_multiple, max(lengths)
    # Padding is cut into rows no longer than the longest real one: kernels are told that as their upper bound.
    for size in [longest] * (padding // longest) + [padding % longest]:
        if size:
            pairs.append((np.full(size, plan.pad_token), np.full(size, NOT_LEARNED)))
            lengths.append(size)
    targets = np.concatenate([t for _, t in pairs])
    return Batch(
        tokens_BT=torch.from_numpy(np.concatenate([t for t, _ in pairs]))[None],
        targets_BT=torch.from_numpy(targets)[None],
        positions_BT=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        mask_BT=None,
        borders=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        row_lengths=tuple(lengths),
        row_numbers=tuple(int(number) for number in numbers),
        num_units=int((targets != NOT_LEARNED).sum()),
        num_learned=int((targets != NOT_LEARNED).sum()),
    )


def collate_padded(rows: PreparedRows, numbers: Sequence[int] | np.ndarray, plan: BatchPlan) -> Batch:
    """Rows side by side, padded on the right to the longest."""
    pairs = [_row(rows, int(number)) for number in numbers]
    lengths = [len(tokens) for tokens, _ in pairs]
    width = max(lengths) + (-max(lengths) % plan.pad_multiple)
    tokens_BT = np.full((len(pairs), width), plan.pad_token, dtype=np.int64)
    targets_BT = np.full((len(pairs), width), NOT_LEARNED, dtype=np.int64)
    for index, (tokens, targets) in enumerate(pairs):
        tokens_BT[index, : len(tokens)] = tokens
        targets_BT[index, : len(targets)] = targets
    positions_T = np.arange(width)
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT),
        targets_BT=torch.from_numpy(targets_BT),
        positions_BT=torch.from_numpy(np.broadcast_to(positions_T, tokens_BT.shape).copy()),
        mask_BT=torch.from_numpy((positions_T[None] < np.asarray(lengths)[:, None]).astype(np.int64)),
        borders=None,
        row_lengths=tuple(lengths),
        row_numbers=tuple(int(number) for number in numbers),
        num_units=int((targets_BT != NOT_LEARNED).sum()),
        num_learned=int((targets_BT != NOT_LEARNED).sum()),
    )


def padded_passes(
    texts: Sequence[Sequence[int]], *, pad_token: int, tokens_at_once: int
) -> Iterator[tuple[list[int], Batch]]:
    """(numbers of the texts, their batch) for token ids of which nothing is learned, texts of like length together."""
    lengths = np.array([len(tokens) for tokens in texts], dtype=np.int64)
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.asarray(text, dtype=np.int32) for text in texts])
    rows = PreparedRows(tokens, np.zeros(len(tokens), dtype=bool), borders, [""] * len(texts))
    plan = BatchPlan(len(texts), tokens_at_once, packing=False, shuffle=False, pad_token=pad_token)
    for group in split_padded(lengths, max(tokens_at_once, int(lengths.max()))):
        yield group, collate_padded(rows, group, plan)
