"""What a quickstart found, for whoever shows it. Knows no stage and no screen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhibei.evaluate.stats import Paired
from zhibei.pipeline.handover import HandedOver
from zhibei.pipeline.summary import Stage

TITLES = {"base": ("base", "基座"), "sft": ("SFT", "SFT"), "ppo": ("PPO", "PPO")}
"""How people call the models, English and Chinese."""


@dataclass(frozen=True)
class Step:
    """From one model to the next, on the same questions."""

    before: str
    after: str
    paired: Paired


@dataclass
class Outcome:
    """`by_task`: task -> questions, and for each model its score with low and high.

    `examples`: question, expected, `answers` by model, and `right` by model where that is known. `steps` compare
    models on the same questions, where answers can be checked. `reward`: what the reward model learned (accuracy on
    held-out pairs with its interval, also by task and by origin of the wrong answer). `course`: step of PPO, learned
    reward, KL, and the true score where a checkpoint was measured.
    """

    folder: Path
    stages: list[Stage] = field(default_factory=list)
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reward: dict[str, Any] = field(default_factory=dict)
    course: list[dict[str, Any]] = field(default_factory=list)
    handed_over: HandedOver | None = None
    summary: dict[str, Any] = field(default_factory=dict)
