"""A copy in host memory of what a checkpoint holds, in buffers that are used again. Knows no files and no ranks.

From a GPU values pass through one pinned buffer of fixed size: pinning everything would take as much memory once more
than it needs (torch rounds pinned blocks up to powers of two), and memory that the system can no longer move.
"""

from __future__ import annotations

from typing import Any

import torch

from zhibei.store.checkpoint_files import Groups
from zhibei.store.parts import Part
from zhibei.store.shards import LazyTensor, Writable

STAGING_BYTES = 64 * 2**20


class Snapshot:
    """One copy at a time: `take` overwrites the one before."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], torch.Tensor] = {}
        self._staging: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Host memory that the copy takes."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def take(self, groups: Groups) -> dict[str, dict[str, Writable | Part]]:
        """The same groups with tensors of their own. What is one memory under several names stays one."""
        found: dict[str, dict[str, Writable | Part]] = {}
        for group, tensors in groups.items():
            seen: dict[tuple[Any, ...], torch.Tensor] = {}
            found[group] = {name: self._copied((group, name), tensor, seen) for name, tensor in tensors.items()}
        names = {(group, name) for group, tensors in found.items() for name in tensors}
        self._held = {key: held for key, held in self._held.items() if key in names}
        return found

    def _copied(
        self, key: tuple[str, str], tensor: Writable | Part, seen: dict[tuple[Any, ...], torch.Tensor]
    ) -> Writable | Part:
        if isinstance(tensor, Part):
            copy = self._copied(key, tensor.tensor, seen)
            assert not isinstance(copy, Part)
            return Part(copy, tensor.start, tensor.num_rows)
        value = (tensor.read() if isinstance(tensor, LazyTensor) else tensor).detach()
        same = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and same in seen:
            return seen[same]
        held = self._held.get(key)
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            held = torch.empty(value.shape, dtype=value.dtype)
            self._held[key] = held
        self._copy(value, held)
        seen[same] = held
        return held

    def _copy(self, value: torch.Tensor, held: torch.Tensor) -> None:
        if value.device.type != "cuda" or value.numel() == 0:
            held.copy_(value)
            return
        if self._staging is None:
            self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        source = value.contiguous().reshape(-1).view(torch.uint8)
        target = held.reshape(-1).view(torch.uint8)
        for start in range(0, len(source), STAGING_BYTES):
            part = source[start : start + STAGING_BYTES]
            staged = self._staging[: len(part)]
            staged.copy_(part)
            target[start : start + len(part)].copy_(staged)
