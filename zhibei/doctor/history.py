"""What watchdogs remember of a run: its records, thinned and bounded. Knows records, not what is wrong with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 100
NOW = 5
MOST_SAMPLES = 256


@dataclass(frozen=True)
class StepLoss:
    """One logged step: its number, loss, gradient norm and learning rate."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float


@dataclass
class Samples:
    """A series of any length in at most MOST_SAMPLES numbers: when full, every second is dropped."""

    values: list[float] = field(default_factory=list)
    stride: int = 1
    _seen: int = 0

    def add(self, value: float) -> None:
        if self._seen % self.stride == 0:
            self.values.append(value)
            if len(self.values) > MOST_SAMPLES:
                self.values, self.stride = self.values[::2], self.stride * 2
        self._seen += 1


@dataclass
class History:
    """`losses` are the last WINDOW + NOW logged steps, `lowest` the lowest median of NOW losses before those of now.

    What belongs to a process (memory, waiting, looks) starts anew when a run is resumed.
    """

    step: int = 0
    vocabulary: int | None = None
    first_loss: float | None = None
    num_losses: int = 0
    lowest: float | None = None
    losses: deque[StepLoss] = field(default_factory=lambda: deque(maxlen=WINDOW + NOW))
    peak_rate: float | None = None
    steps_at_full_rate: int = 0
    """Steps at half the peak of the schedule or more."""
    skipped_in_row: int = 0
    skipped_steps: int = 0
    skipped_at_start: int = 0
    heldout: list[tuple[int, float, float | None]] = field(default_factory=list)
    """(step, held-out loss, median training loss since the evaluation before)."""
    since_heldout: list[float] = field(default_factory=list)
    look: Mapping[str, Any] = field(default_factory=dict)
    waits: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))
    """(seconds waited for rows, seconds of the step)."""
    gpu_gib: Samples = field(default_factory=Samples)
    host_gib: Samples = field(default_factory=Samples)
    rank_seconds: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=20))
    iterations: list[Mapping[str, Any]] = field(default_factory=list)
    """The health board of every iteration of a policy."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one record of metrics.jsonl; kinds that nobody watches are passed over."""
        self.step = max(self.step, int(record.get("step", 0)))
        reader = {
            "train": self._train,
            "heldout": self._heldout,
            "look": self._look,
            "event": self._event,
            "iteration": self.iterations.append,
        }.get(str(record.get("kind")))
        if reader is not None:
            reader(record)

    def _train(self, record: Mapping[str, Any]) -> None:
        self.skipped_in_row = int(record.get("skipped_in_row", record.get("skipped", 0)))
        self.skipped_steps = int(record.get("skipped_steps", self.skipped_steps + int(record.get("skipped", 0))))
        if self.step <= 20:
            self.skipped_at_start = self.skipped_steps
        if not record.get("skipped"):
            self._add_loss(record)
        if record.get("data_seconds") is not None:
            self.waits.append((float(record["data_seconds"]), float(record["seconds"])))
        for name, samples in (("gpu_held_gib", self.gpu_gib), ("host_held_gib", self.host_gib)):
            if record.get(name) is not None:
                samples.add(float(record[name]))
        if record.get("rank_seconds"):
            self.rank_seconds.append(tuple(float(seconds) for seconds in record["rank_seconds"]))

    def _add_loss(self, record: Mapping[str, Any]) -> None:
        loss = float(record["loss"])
        if self.first_loss is None:
            self.first_loss = loss
        rate = float(record.get("learning_rate") or 0.0)
        self.steps_at_full_rate += self.peak_rate is not None and 0 < self.peak_rate / 2 <= rate
        if len(self.losses) >= 2 * NOW - 1:
            # The newest NOW losses stay out: what is compared with the lowest level must not lower it.
            settled = float(np.median([one.loss for one in list(self.losses)[-2 * NOW + 1 : -NOW + 1]]))
            self.lowest = settled if self.lowest is None else min(self.lowest, settled)
        self.losses.append(StepLoss(int(record["step"]), loss, float(record.get("grad_norm") or 0.0), rate))
        self.num_losses += 1
        self.since_heldout.append(loss)

    def _heldout(self, record: Mapping[str, Any]) -> None:
        trained = float(np.median(self.since_heldout)) if self.since_heldout else None
        self.heldout.append((int(record["step"]), float(record["loss"]), trained))
        self.since_heldout = []

    def _look(self, record: Mapping[str, Any]) -> None:
        self.look = dict(record)

    def _event(self, record: Mapping[str, Any]) -> None:
        if record.get("event") not in ("started", "resumed"):
            return
        self.vocabulary = record.get("vocabulary", self.vocabulary)
        self.peak_rate = record.get("peak_rate", self.peak_rate)
        self.look = {}
        self.waits.clear()
        self.rank_seconds.clear()
        self.gpu_gib, self.host_gib = Samples(), Samples()
