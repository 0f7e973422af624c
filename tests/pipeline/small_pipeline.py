"""A small pipeline for tests: tiny random model, colours to learn, pairs about them. Knows no test."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import tiny_model_folder
from tests.train.pair_run import colour_pairs

COLOURS = ("red", "blue", "green", "black")


def small_pipeline(folder: Path, more: str = "") -> Path:
    """Writes model, rows, pairs and pipeline file into `folder` (once); the path of the file."""
    model = folder / "tiny-llama"
    if not model.is_dir():
        tiny_model_folder(folder)
    rows = [
        {"instruction": f"Which colour has thing {i}?", "input": "", "output": f"It is {COLOURS[i % 4]}."}
        for i in range(48)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "pairs.json").write_text(json.dumps(colour_pairs(48)))
    file = folder / "small.yaml"
    file.write_text(
        f"""name: small
runs: {folder / "runs"}
seed: 1
model:
  path: {model}
data: {{template: alpaca_short, max_tokens: 200, validation: 0.25, workers: 0}}
log: {{tensorboard: false}}
stages:
  - name: sft
    data: {{sources: [{folder / "rows.json"}]}}
    sft: {{global_batch: 8, max_steps: 4, learning_rate: 1e-2, evaluate_every: 2, save_every: 1, sample_tokens: 0}}
  - name: rm
    stage: reward
    model: {{path: $sft}}
    data: {{sources: [{folder / "pairs.json"}]}}
    reward: {{global_batch: 8, max_steps: 4, learning_rate: 3e-3}}
  - name: ppo
    model: {{path: $sft, method: lora}}
    data: {{sources: [{folder / "rows.json"}]}}
    ppo:
      reward_model: $rm
      min_reward_accuracy: 0
      global_batch: 4
      max_steps: 2
      max_new_tokens: 6
      sample_tokens: 0
      evaluate_rows: 4
      save_every: 1
  - name: scores
    stage: evaluate
    loss: $sft
    questions: $ppo
    check: contains
    judge: $rm
    max_new_tokens: 8
    most: 10
  - name: whole
    stage: merge
    model: $ppo
{more}"""
    )
    return file
