"""Keys and values of answers under way: one row of columns per slot, column t holding position t. Knows no model.

Dimensions: S slots, B rows that a step runs on (the first B slots), K key heads, C columns, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class SlotCache:
    """`slots` rows of at most `columns` positions. Grows by doubling up to that, and never beyond.

    Nothing of a former answer is ever seen: a step looks at columns up to its row's position only, all of which the
    present answer has written.
    """

    def __init__(self, slots: int, columns: int, *, at_first: int = 64) -> None:
        self.slots, self.most_columns, self._at_first = slots, columns, at_first
        self.columns = 0
        self.moves = 0
        """How often its tensors came to lie elsewhere."""
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns <= self.columns:
            return
        wanted = min(self.most_columns, max(columns, 2 * self.columns, self._at_first))
        self.keys = [_widened(tensor, wanted) for tensor in self.keys]
        self.values = [_widened(tensor, wanted) for tensor in self.values]
        self.columns = wanted
        self.moves += 1

    def write_prompts(self, slots: Sequence[int], layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put keys and values [B, K, T, D] of whole prompts, layer by layer, into these slots, from column 0 on."""
        if not self.keys:
            # Zeros: what was never written has weight 0 in a mixture, and 0 times an arbitrary NaN would be NaN.
            for keys, values in layers:
                self.keys.append(keys.new_zeros(self.slots, keys.shape[1], self.columns, keys.shape[3]))
                self.values.append(values.new_zeros(self.slots, values.shape[1], self.columns, values.shape[3]))
        width = layers[0][0].shape[2]
        where: Any = list(slots)
        if where == list(range(where[0], where[0] + len(where))):
            where = slice(where[0], where[0] + len(where))
        for index, (keys, values) in enumerate(layers):
            self.keys[index][where, :, :width] = keys
            self.values[index][where, :, :width] = values

    def move(self, source: int, target: int, *, num_tokens: int) -> None:
        """The answer in one slot goes on in another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [S, K, C, D] of each layer."""
        return list(zip(self.keys, self.values, strict=True))

    def num_bytes(self) -> int:
        """What it holds now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


def _widened(tensor: torch.Tensor, columns: int) -> torch.Tensor:
    wide = tensor.new_zeros(*tensor.shape[:2], columns, tensor.shape[3])
    wide[:, :, : tensor.shape[2]] = tensor
    return wide


class StepView:
    """What transformers' layers see as their cache during one step: each row writes its own column and looks at all.

    Made for one forward pass. `columns` bounds what is looked at; the mask says what of it counts.
    """

    is_compileable = False

    def __init__(self, cache: SlotCache, positions_B: torch.Tensor, *, columns: int) -> None:
        self._cache, self._positions_B, self._columns = cache, positions_B, columns
        self._rows_B = torch.arange(positions_B.shape[0], device=positions_B.device)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column of each row; the rows' columns so far."""
        num_rows = keys.shape[0]
        held_keys, held_values = self._cache.keys[layer_idx], self._cache.values[layer_idx]
        held_keys[self._rows_B, :, self._positions_B] = keys[:, :, 0]
        held_values[self._rows_B, :, self._positions_B] = values[:, :, 0]
        return held_keys[:num_rows, :, : self._columns], held_values[:num_rows, :, : self._columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that are looked at."""
        del layer_idx
        return self._columns
