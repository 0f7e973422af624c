"""A step as one CUDA graph for each number of rows: launched whole, so that the host is not waited for. Knows no model.

The graph reads and writes the same storage at every launch. Weights may change in place between launches; whoever moves
them or the cache must `forget`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens [B], positions [B]) -> logits [B, V]."""
Prove = Callable[[torch.Tensor, torch.Tensor], None]
"""Called before a graph for a new number of rows is captured; may change how `compute` computes."""
_STEPS_BEFORE_CAPTURE = 2


class CapturedStep:
    """Calls `compute` for up to `slots` rows, through a graph captured at the first call for that many rows.

    `compute` and `prove` are given at each call and not kept: they belong to whoever owns this, and a ring of
    references would hold the cache and the graphs' memory until Python looks for such rings, amidst training.
    """

    def __init__(self, *, slots: int, device: torch.device) -> None:
        self._slots = slots
        self._tokens_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._positions_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[Any, torch.Tensor] | None] = {}
        self._pool: Any = None

    def forget(self) -> None:
        """Drop all graphs: storage has moved."""
        self._graphs.clear()
        self._pool = None

    def __call__(
        self, tokens_B: torch.Tensor, positions_B: torch.Tensor, *, compute: Compute, prove: Prove
    ) -> torch.Tensor:
        """Logits of these rows, valid until the next call."""
        num_rows = len(tokens_B)
        size = min(self._slots, size_for(num_rows))
        self._tokens_S[:num_rows] = tokens_B
        self._positions_S[:num_rows] = positions_B
        # Idle rows of a graph write into the first column of their own, free slots.
        self._positions_S[num_rows:size] = 0
        if size not in self._graphs:
            self._graphs[size] = self._captured(size, compute, prove)
        found = self._graphs[size]
        if found is None:
            return compute(tokens_B, positions_B)
        graph, logits_BV = found
        graph.replay()
        return logits_BV[:num_rows]

    def _captured(self, size: int, compute: Compute, prove: Prove) -> tuple[Any, torch.Tensor] | None:
        """None for a step that cannot be recorded: an operation of some library may wait for the device."""
        try:
            return self._capture(size, compute, prove)
        except RuntimeError as error:
            warnings.warn(
                f"the decode step cannot be captured as a graph, answers come more slowly ({error})",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _capture(self, size: int, compute: Compute, prove: Prove) -> tuple[Any, torch.Tensor]:
        tokens_B, positions_B = self._tokens_S[:size], self._positions_S[:size]
        here, aside = torch.cuda.current_stream(), _stream_aside(tokens_B.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            prove(tokens_B, positions_B)
            # Kernels are compiled and libraries set up before anything is recorded.
            for _ in range(_STEPS_BEFORE_CAPTURE):
                compute(tokens_B, positions_B)
        here.wait_stream(aside)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            logits_BV = compute(tokens_B, positions_B)
        return graph, logits_BV


@functools.cache
def _stream_aside(device: torch.device) -> Any:
    """One for all captures of a process: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


def size_for(num_rows: int) -> int:
    """The rows of the graph that serves so many: powers of two, and three quarters of them from 24 on."""
    size = 1
    while size < num_rows:
        size *= 2
    return size * 3 // 4 if size >= 32 and num_rows <= size * 3 // 4 else size
