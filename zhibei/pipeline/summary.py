"""summary.json of a pipeline: one line for each model that was measured. Knows figures, not how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zhibei.store.files import write_json_atomic

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Stage:
    """One model: its score under `metric` with a 95 % interval, and the seconds it took to make and measure it."""

    name: str
    metric: str
    score: float
    low: float
    high: float
    seconds: float


def summary_of(stages: Sequence[Stage], *, seed: int, total_seconds: float) -> dict[str, Any]:
    """The contract of summary.json: `stages`, `seed`, `total_seconds`."""
    return {
        "stages": [{**asdict(stage), "seconds": round(stage.seconds, 2)} for stage in stages],
        "seed": seed,
        "total_seconds": round(total_seconds, 2),
    }


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    write_json_atomic(folder / SUMMARY_FILE, summary)
    return folder / SUMMARY_FILE
