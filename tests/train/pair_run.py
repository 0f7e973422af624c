"""A small run over pairs for tests: the preferred answer names the right colour. Knows no test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model_folder
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun

COLOURS = ("red", "blue", "green", "black")


def colour_pairs(num_pairs: int = 64) -> list[dict[str, Any]]:
    """Pairs that can be learned: polite answers are preferred, and both sides have many lengths."""
    return [
        {
            "prompt": f"Which colour has thing {i}?",
            "chosen": f"It is {COLOURS[i % 4]}." + " Really." * (i % 3) + " Thanks!",
            "rejected": f"No {COLOURS[(i + 1) % 4]} here." + " Really." * (i * 7 % 4) + " Go away.",
        }
        for i in range(num_pairs)
    ]


def judged_rows(num_pairs: int = 32) -> list[dict[str, Any]]:
    """Each side of the pairs with its label."""
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in colour_pairs(num_pairs)
        for side in ("chosen", "rejected")
    ]


def pair_run(
    folder: Path, stage: str, *overrides: str, rows: list[dict[str, Any]] | None = None, family: str = "llama"
) -> ResolvedRun:
    """Writes model, pairs and run file into `folder` (once) and reads the run file with the overrides."""
    model = folder / f"tiny-{family}"
    if not model.is_dir():
        tiny_model_folder(folder, family=family)
    data = folder / "pairs.json"
    data.write_text(json.dumps(colour_pairs() if rows is None else rows), encoding="utf-8")
    samples = "  sample_tokens: 6\n" if stage == "dpo" else ""
    file = folder / f"{stage}.yaml"
    file.write_text(
        f"""name: small
stage: {stage}
runs: {folder / "runs"}
model: {{path: {model}}}
data: {{sources: [{data}], template: alpaca, max_tokens: 240, validation: 0.25, workers: 0}}
{stage}:
  global_batch: 8
  micro_batch_tokens: 600
  max_steps: 12
  learning_rate: 3e-3
  warmup_steps: 1
  evaluate_every: 4
  save_every: 4
{samples}log: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    return read_run(str(file), overrides)
