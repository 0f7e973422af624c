"""A reward model in use: its scores are what it says alone, and one that cannot judge is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.small_policy import small_policy
from zhibei.config.errors import UserError
from zhibei.config.read import read_run
from zhibei.generate.rewards import Answered
from zhibei.model.score_model import load_score_model_for_inference
from zhibei.store.metrics import read_metrics
from zhibei.train.loops import train
from zhibei.train.reward_sources import model_scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small reward model that likes letters, in runs/judge."""
    folder = tmp_path_factory.mktemp("judge")
    small_policy(folder, "ppo")
    pairs = [{"prompt": f"Say {i}.", "chosen": "a bb c", "rejected": "% @@ &"} for i in range(40)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "judge.yaml").write_text(
        f"""name: judge
runs: {folder / "runs"}
stage: reward
model: {{path: {folder / "tiny-llama"}}}
data: {{sources: [{folder / "pairs.json"}], template: alpaca, max_tokens: 120, validation: 0.2, workers: 0}}
reward: {{global_batch: 8, max_steps: 6, learning_rate: 1e-3, micro_batch_tokens: 1024}}
log: {{tensorboard: false}}
"""
    )
    train(read_run(folder / "judge.yaml"))
    return folder


def settings(folder: Path, stage: str) -> list[str]:
    return [f"{stage}.reward=null", f"{stage}.reward_model={folder / 'runs' / 'judge'}"]


def test_scores_do_not_depend_on_the_rows_beside(folder: Path) -> None:
    model = load_score_model_for_inference(str(folder / "runs" / "judge"), device="cpu", precision="fp32")
    rows = [[1, 40, 41, 2], [1, 90], [1, *range(50, 70)], [1, 7, 8]]
    asked = Answered([""] * 4, [""] * 4, [None] * 4, rows)
    whole = model_scorer(model, pad_token=3, tokens_per_pass=512)(asked)
    small = model_scorer(model, pad_token=0, tokens_per_pass=20)(asked)
    assert list(small) == pytest.approx(list(whole), abs=1e-4)


def test_a_policy_learns_from_a_reward_model(folder: Path) -> None:
    run_dir = train(small_policy(folder, "ppo", *settings(folder, "ppo"), "ppo.max_steps=2"))
    rewards = [record["reward_std"] for record in read_metrics(run_dir.metrics) if record["kind"] == "iteration"]
    assert len(rewards) == 2
    assert min(rewards) > 0


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("finished.heldout.accuracy", 0.52, "orders 52 % of its held-out pairs rightly"),
        ("template.sha256", "0" * 64, "learned from texts in the template alpaca"),
        ("tokenizer.sha256", "0" * 64, "was trained with another tokenizer"),
    ],
)
def test_a_reward_model_that_cannot_judge_is_refused(place: str, value: object, said: str, folder: Path) -> None:
    manifest = folder / "runs" / "judge" / "manifest.json"
    sound = manifest.read_text()
    changed = json.loads(sound)
    *parents, last = place.split(".")
    inner = changed
    for name in parents:
        inner = inner[name]
    inner[last] = value
    manifest.write_text(json.dumps(changed))
    try:
        with pytest.raises(UserError, match=said):
            train(small_policy(folder, "grpo", *settings(folder, "grpo"), "name=refused"))
    finally:
        manifest.write_text(sound)
