"""A small supervised run for tests: tiny random model, sixty short Alpaca rows, one run file. Knows no test."""

import json
from pathlib import Path

from tests.tiny import tiny_model_folder
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun


def alpaca_rows(num_rows: int = 60) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Add {i} and {i * 7 % 13}.",
            "input": "" if i % 3 else f"Answer with a number below {i + 20}.",
            "output": f"The answer is {i + i * 7 % 13}." + " Indeed." * (i % 4),
        }
        for i in range(num_rows)
    ]


def small_run(folder: Path, *overrides: str, family: str = "llama", rows: list | None = None) -> ResolvedRun:
    """Writes model, data and run file into `folder` (once) and reads the run file with the overrides."""
    model = folder / f"tiny-{family}"
    if not model.is_dir():
        tiny_model_folder(folder, family=family)
    data = folder / "rows.json"
    data.write_text(json.dumps(rows if rows is not None else alpaca_rows()), encoding="utf-8")
    file = folder / "run.yaml"
    file.write_text(
        f"""name: small
runs: {folder / "runs"}
model: {{path: {model}}}
data: {{sources: [{data}], template: alpaca, max_tokens: 200, validation: 0.2, workers: 0}}
sft:
  global_batch: 8
  micro_batch_tokens: 512
  max_steps: 12
  learning_rate: 1e-2
  warmup_steps: 2
  evaluate_every: 4
  save_every: 4
  sample_tokens: 8
log: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    return read_run(str(file), overrides)
