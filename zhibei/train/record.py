"""Where a loop's figures go: the metrics file and whoever watches. Knows records, not how they come about."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from zhibei.config.run import RunFile
from zhibei.model.meeting import note_step
from zhibei.model.ranks import current
from zhibei.store.metrics import Metrics
from zhibei.store.run_dir import RunDir
from zhibei.train.alarms import Alarm
from zhibei.train.step import StepRecord

Watch = Callable[[dict[str, Any]], Alarm | None]
Item = TypeVar("Item")
GIB = 2.0**30


def ignore(_record: dict[str, Any]) -> None:
    """Nobody watches."""


class Recorder:
    """Writes each record to metrics.jsonl and hands it to `watch`, which may answer with an alarm.

    Of several ranks the first one writes and watches (the others have no `metrics`); all hear of its alarms.
    """

    def __init__(self, metrics: Metrics | None, watch: Watch, device: torch.device) -> None:
        self.metrics, self.watch, self.device = metrics, watch, device
        self._alarms: list[Alarm] = []

    def write(self, kind: str, step: int, **figures: Any) -> None:
        note_step(step)
        if self.metrics is None:
            return
        record = {"kind": kind, "step": step, "time": time.time(), **figures}
        self.metrics.write(record)
        alarm = self.watch(record)
        if alarm is not None:
            self._alarms.append(alarm)

    def take_alarms(self) -> list[Alarm]:
        """What the watcher objected to since the last call, on every rank."""
        taken, self._alarms = self._alarms, []
        ranks = current()
        if not ranks.are_several:
            return taken
        if not ranks.sum_on_host(len(taken))[0]:
            return []
        return [
            Alarm(**{**told, "evidence": tuple(told["evidence"])})
            for told in ranks.from_first([asdict(alarm) for alarm in taken])
        ]

    def event(self, step: int, event: str, text: str = "", **figures: Any) -> None:
        self.write("event", step, event=event, text=text, **figures)

    def step(self, step: int, record: StepRecord, **figures: Any) -> None:
        """One optimiser step: loss in nats per unit, speed in real (unpadded) tokens per second.

        `figures`: epoch, learning_rate, seconds (of the step), data_seconds (waited for its rows before it),
        skipped_steps (so far) and skipped_in_row. With several ranks, all must call it: their own seconds are gathered.
        """
        seconds = figures.pop("seconds")
        ranks = current()
        if ranks.are_several:
            figures["rank_seconds"] = ranks.gathered(round(record.own_seconds, 6))
        self.write(
            "train",
            step,
            loss=record.loss,
            grad_norm=record.grad_norm,
            tokens=record.num_tokens,
            supervised_tokens=record.num_learned_tokens,
            tokens_per_s=round(record.num_tokens / max(seconds, 1e-9), 1),
            seconds=round(seconds, 6),
            peak_gib=self.peak_gib(),
            gpu_held_gib=self.gpu_held_gib(),
            host_gib=host_gib(),
            host_held_gib=host_held_gib(),
            micro_batches=record.num_micro_batches,
            skipped=int(record.was_skipped),
            **record.figures,
            **figures,
        )

    def peak_gib(self) -> float | None:
        """Most GPU memory torch has held so far; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / GIB, 3)

    def gpu_held_gib(self) -> float | None:
        """GPU memory that tensors hold now; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.memory_allocated(self.device) / GIB, 3)


@contextmanager
def recording(
    run_dir: RunDir, run: RunFile, *, step: int, notes: Sequence[str], watch: Watch, device: torch.device
) -> Iterator[Recorder]:
    """Where the figures of a run go from this step on, its notes first. Of several ranks the first has the files."""
    if not current().is_first:
        yield Recorder(None, ignore, device)
        return
    with Metrics(
        run_dir.path,
        tensorboard=run.log.tensorboard,
        wandb=run.log.wandb,
        run_name=run.name,
        config=run.model_dump(mode="json"),
        resume_at_step=step or None,
    ) as metrics:
        recorder = Recorder(metrics, watch, device)
        for note in [*notes, *metrics.notes]:
            recorder.event(step, "note", note)
        yield recorder


def host_gib() -> float:
    """Most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / GIB, 3)


def host_held_gib() -> float | None:
    """Memory of this process now, without mapped files (the rows); None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return round(int(line.split()[1]) * 1024 / GIB, 3)
    return None


def with_waits(items: Iterator[Item]) -> Iterator[tuple[float, Item]]:
    """Each item with the seconds that were waited for it."""
    while True:
        started = time.monotonic()
        try:
            item = next(items)
        except StopIteration:
            return
        yield time.monotonic() - started, item
