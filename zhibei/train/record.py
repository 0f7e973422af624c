"""Where a loop's figures go: the metrics file and whoever watches. Knows records, not how they come about."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from zhibei.store.metrics import Metrics
from zhibei.train.step import StepRecord

Watch = Callable[[dict[str, Any]], None]
GIB = 2.0**30


def ignore(_record: dict[str, Any]) -> None:
    """Nobody watches."""


class Recorder:
    """Writes each record to metrics.jsonl and hands it to `watch`."""

    def __init__(self, metrics: Metrics, watch: Watch, device: torch.device) -> None:
        self.metrics, self.watch, self.device = metrics, watch, device

    def write(self, kind: str, step: int, **figures: Any) -> None:
        record = {"kind": kind, "step": step, "time": time.time(), **figures}
        self.metrics.write(record)
        self.watch(record)

    def event(self, step: int, event: str, text: str = "", **figures: Any) -> None:
        self.write("event", step, event=event, text=text, **figures)

    def step(self, step: int, record: StepRecord, *, epoch: float, learning_rate: float, seconds: float) -> None:
        """One optimiser step: loss in nats per learned token, speed in real (unpadded) tokens per second."""
        self.write(
            "train",
            step,
            epoch=round(epoch, 6),
            loss=record.loss,
            grad_norm=record.grad_norm,
            learning_rate=learning_rate,
            tokens=record.num_tokens,
            supervised_tokens=record.num_units,
            tokens_per_s=round(record.num_tokens / max(seconds, 1e-9), 1),
            seconds=round(seconds, 6),
            peak_gib=self.peak_gib(),
            host_gib=host_gib(),
            micro_batches=record.num_micro_batches,
            skipped=int(record.was_skipped),
        )

    def peak_gib(self) -> float | None:
        """Most GPU memory torch has held so far; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / GIB, 3)


def host_gib() -> float:
    """Most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / GIB, 3)
