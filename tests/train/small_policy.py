"""A small run that learns from a reward: tiny random model, a few prompts, a reward whose best value is known."""

import json
from pathlib import Path

from tests.tiny import tiny_model_folder
from zhibei.config.read import read_run
from zhibei.config.resolve import ResolvedRun
from zhibei.train.loops import train

REWARD = '''
def letters(prompts, answers, references):
    """Share of lower-case letters: 1 at best, about 0.4 for the random model."""
    return [sum("a" <= sign <= "z" for sign in answer) / max(1, len(answer)) for answer in answers]


def constant(prompts, answers, references):
    return [1.0] * len(answers)
'''


def small_policy(folder: Path, stage: str, *overrides: str, method: str = "lora") -> ResolvedRun:
    """Writes model, prompts, reward and run file into `folder` (once) and reads the run file with the overrides."""
    model = folder / "tiny-llama"
    if not model.is_dir():
        tiny_model_folder(folder)
    prompts = folder / "prompts.json"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(24)]
    prompts.write_text(json.dumps(rows), encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD)
    file = folder / f"{stage}.yaml"
    file.write_text(
        f"""name: small
runs: {folder / "runs"}
stage: {stage}
model: {{path: {model}, method: {method}}}
data: {{sources: [{prompts}], template: alpaca, max_tokens: 100, validation: 0.2, workers: 0}}
{stage}:
  reward: python:{folder / "rewards.py"}:letters
  global_batch: 16
  minibatches: 2
  micro_batch_tokens: 512
  max_steps: 3
  learning_rate: 1e-2
  schedule: constant
  warmup_steps: 0
  max_new_tokens: 6
  sample_tokens: 4
  evaluate_rows: 4
  save_every: 1
  keep_checkpoints: 9
log: {{tensorboard: false}}
""",
        encoding="utf-8",
    )
    return read_run(str(file), overrides)


def make_judges(folder: Path) -> None:
    """Small reward models that like letters: runs/judge-full, and runs/judge-lora on the policies' own base."""
    small_policy(folder, "ppo")
    pairs = [{"prompt": f"Say {i}.", "chosen": "a bb c", "rejected": "% @@ &"} for i in range(40)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    for method, rate in (("full", 1e-3), ("lora", 1e-2)):
        (folder / "judge.yaml").write_text(
            f"""name: judge-{method}
runs: {folder / "runs"}
stage: reward
model: {{path: {folder / "tiny-llama"}, method: {method}}}
data: {{sources: [{folder / "pairs.json"}], template: alpaca, max_tokens: 120, validation: 0.2, workers: 0}}
reward: {{global_batch: 8, max_steps: 6, learning_rate: {rate}, micro_batch_tokens: 1024}}
log: {{tensorboard: false}}
"""
        )
        train(read_run(folder / "judge.yaml"))
