"""What one method adds to the loop that all methods share which learn from given rows. Knows no loop and no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zhibei.data.batches import Batch, Batches
from zhibei.model.language_model import LanguageModel
from zhibei.train.step import LossSum, StepLoss

if TYPE_CHECKING:
    from zhibei.store.run_dir import RunDir
    from zhibei.train.materials import Materials

UNIT_NAMES = {"token": "learned token", "pair": "pair", "answer": "judged answer"}


@dataclass(frozen=True)
class HeldoutFigures:
    """What an evaluation found. `loss`, a mean per unit in nats, decides which weights are best; `figures` are named
    values for the record of the evaluation."""

    loss: float
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """One thing that was checked about what was written."""

    name: str
    passed: bool
    detail: str
    value: float | None = None


def unchanged(materials: Materials, _run_dir: RunDir, _step: int) -> Materials:
    """Nothing has to be known before the first step."""
    return materials


def as_they_are(_model: LanguageModel, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
    """Nothing has to be known about a step before its passes."""
    return micro_batches


def nothing_to_probe(_materials: Materials) -> None:
    """Every state of the model is a fair one to begin with."""


@dataclass(frozen=True)
class Task:
    """One method.

    `step_loss` is summed over the units of a step and `plain_loss` without what only regularises; `evaluate` gives the
    held-out figures; `write` puts the finished model into a folder and `prove` reads it back. `prepare` is called once
    before the first step, with the number of steps done, and may add to what batches carry; `before_step` sees the
    passes of a step together; `probe` raises RunStopped at step 0 when the method cannot work.
    """

    unit: str
    step_loss: StepLoss
    plain_loss: LossSum
    evaluate: Callable[[Materials, Batches], HeldoutFigures]
    write: Callable[[Materials, Path], None]
    prove: Callable[[Materials, Path], list[Proof]]
    prepare: Callable[[Materials, RunDir, int], Materials] = unchanged
    before_step: Callable[[LanguageModel, Sequence[Batch]], Sequence[Batch]] = as_they_are
    probe: Callable[[Materials], None] = nothing_to_probe
    judged_by: Literal["loss", "reward"] = "loss"
    """Whether the best weights have the lowest held-out loss or the highest held-out reward."""
    described: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of the model beside what it says of every run."""
