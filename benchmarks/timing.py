"""Time and memory of optimiser steps, the same way for everybody. Knows no trainer.

A step lasts from the end of the step before to its own end: data, forward, backward, clipping and update included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.records import Record, median_and_spread
from benchmarks.workload import Workload


@dataclass
class StepClock:
    """Collects seconds and tokens per optimiser step. The first `warmup` steps (compilation, allocations) are apart."""

    warmup: int
    seconds: list[float] = field(default_factory=list)
    useful: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _last: float = 0.0

    def start(self) -> None:
        """Call when the model stands ready and the first step is about to begin."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._last = time.perf_counter()

    def step_done(self, *, useful: Callable[[], int], computed: int, loss: float | None = None) -> None:
        """Call after the update: `useful()` real tokens among `computed` positions (padding included)."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.useful.append(useful())
        self.computed.append(computed)
        if loss is not None:
            self.losses.append(loss)
        # Read again: what this method does is nobody's step.
        self._last = time.perf_counter()

    def figures(self, workload: Workload, method: str) -> Record:
        """The figures of a record: medians over the steps after the warm-up, with [lowest, highest]."""
        seconds = self.seconds[self.warmup :]
        if not seconds:
            raise ValueError(f"{len(self.seconds)} steps were timed, of which {self.warmup} are warm-up")
        useful, computed = self.useful[self.warmup :], self.computed[self.warmup :]
        rate, rate_spread = median_and_spread([n / s for n, s in zip(useful, seconds, strict=True)])
        median, spread = median_and_spread(seconds)
        figures: Record = {
            "useful_tokens_per_s": round(rate, 1),
            "model_tflops": round(workload.tflops(rate, method), 1),
            "seconds": round(median, 4),
            "spread": {
                "useful_tokens_per_s": [round(value, 1) for value in rate_spread],
                "model_tflops": [round(workload.tflops(value, method), 1) for value in rate_spread],
                "seconds": [round(value, 4) for value in spread],
            },
            "repeats": len(seconds),
            "padding_share": round(1 - sum(useful) / sum(computed), 4),
            "warmup_seconds": round(sum(self.seconds[: self.warmup]), 2),
            "peak_gib": peak_gib(),
            "reserved_gib": reserved_gib(),
        }
        if self.losses:
            figures["last_loss"] = round(self.losses[-1], 4)
        return figures


def peak_gib() -> float | None:
    """Most GPU memory held by tensors since the clock started, warm-up included; none on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def reserved_gib() -> float | None:
    """Most GPU memory the allocator took from the driver; what other processes could not have used."""
    return round(torch.cuda.max_memory_reserved() / 2**30, 2) if torch.cuda.is_available() else None


def trainer_clock(clock: StepClock) -> Any:
    """A transformers callback that drives the clock; the trainer's `training_step` must add to its counters."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.useful: list[Any] = []
            self.computed = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            # The counts are read off the device after the step's own wait, so that counting costs the rival nothing.
            clock.step_done(useful=lambda: sum(int(count) for count in self.useful), computed=self.computed)
            self.useful, self.computed = [], 0

    return Clock()


def count_tokens(trainer: Any, callback: Any) -> None:
    """Count real and computed tokens of every forward pass of a transformers trainer. Id 0 is always padding."""
    inner = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        callback.useful.append((ids != 0).sum())
        callback.computed += ids.numel()
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = counted
