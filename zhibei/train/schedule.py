"""The learning rate as a function of the step. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable

from zhibei.config.errors import UserError
from zhibei.config.run import TrainingSection


def warmup_steps_of(section: TrainingSection, num_steps: int) -> int:
    """Warm-up in steps. A ratio is rounded up, as transformers does, but leaves one step at the peak: the rate of the
    first step is 0, so a run of one step would learn nothing."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    return min(math.ceil(section.warmup_ratio * num_steps), num_steps - 1)


def require_peak(section: TrainingSection, num_steps: int) -> None:
    """The run must be longer than its warm-up, or it never trains at the rate that was asked for. Raises UserError."""
    if section.warmup_steps is not None and section.warmup_steps >= num_steps:
        name = type(section).__name__.removesuffix("Section").lower()
        raise UserError(
            f"a warm-up of {section.warmup_steps} steps in a run of {num_steps}: the learning rate is never reached",
            expected="fewer warm-up steps than optimiser steps",
            fix=f"set {name}.warmup_steps: {num_steps // 10}, train longer, or lower {name}.global_batch",
            where=f"{name}.warmup_steps",
            pitfall="warmup-never-ends",
        )


def learning_rate(step: int, *, section: TrainingSection, peak: float, num_steps: int) -> float:
    """Rate of step `step` (from 0). The warm-up rises linearly from 0, so step 0 of a warm-up has rate 0."""
    warmup = warmup_steps_of(section, num_steps)
    if step < warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    share = SCHEDULES[section.schedule](progress, _decay_share(section, num_steps, warmup))
    return peak * (section.min_lr_ratio + (1 - section.min_lr_ratio) * share)


def _decay_share(section: TrainingSection, num_steps: int, warmup: int) -> float:
    """`decay_ratio` counts all steps; the shapes below count from the end of the warm-up."""
    return min(1.0, section.decay_ratio * num_steps / max(1, num_steps - warmup))


def _cosine(progress: float, _decay: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _linear(progress: float, _decay: float) -> float:
    return max(0.0, 1 - progress)


def _constant(_progress: float, _decay: float) -> float:
    return 1.0


def _warmup_stable_decay(progress: float, decay: float) -> float:
    return min(1.0, max(0.0, (1 - progress) / decay))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _warmup_stable_decay,
}
