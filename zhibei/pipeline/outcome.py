"""What a quickstart found, for whoever shows it. Knows no stage and no screen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhibei.evaluate.stats import Paired
from zhibei.pipeline.summary import Stage


@dataclass
class Outcome:
    """`by_task`: task -> questions, base, tuned, low, high. `examples`: question, expected, base,
    tuned, and tuned_is_right where that is known.
    `paired` compares both models on the same questions, where answers can be checked."""

    folder: Path
    stages: list[Stage] = field(default_factory=list)
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    paired: Paired | None = None
    summary: dict[str, Any] = field(default_factory=dict)
