"""What the probes of a rehearsal share: materials, what earlier probes left, what a probe saw. No experiment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhibei.doctor.pitfall import Finding
from zhibei.doctor.worst import Worst
from zhibei.train.materials import Materials

BOUNDS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 2e-2}
"""Largest difference between logits that should be equal, as a share of the largest logit."""


@dataclass
class Seen:
    """What a probe did and found; `figures` are kept in rehearsal.json."""

    detail: str
    problems: list[tuple[str, Finding]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scene:
    """The materials and what earlier probes left for later ones."""

    materials: Materials
    worst: Worst | None = None
    first_loss: float | None = None
    step_loss: float | None = None
    folder: Path = Path()
    """Where a rehearsal may write."""

    @property
    def bound(self) -> float:
        return BOUNDS[self.materials.precision]


def scene_worst(scene: Scene) -> Worst:
    assert scene.worst is not None, "find_worst comes first"
    return scene.worst


@contextmanager
def evaluating(hf: Any) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    was_training = hf.training
    hf.eval()
    try:
        yield
    finally:
        hf.train(was_training)
