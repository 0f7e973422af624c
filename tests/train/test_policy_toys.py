"""A task whose best reward is known (1): each method must climb far towards it from where the random model stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.small_policy import small_policy
from zhibei.train.loops import train

TOY = ["max_steps=15", "evaluate_every=0", "save_every=0", "global_batch=32", "kl_coefficient=0"]
CASES = {
    "ppo shared": ("ppo", "lora", ["critic_learning_rate=1e-2"]),
    "ppo separate": ("ppo", "full", ["critic_learning_rate=3e-3", "learning_rate=5e-3"]),
    "grpo": ("grpo", "lora", []),
    "dr_grpo": ("grpo", "lora", ["method=dr_grpo"]),
    "rloo": ("grpo", "lora", ["method=rloo"]),
    "reinforce++": ("grpo", "lora", ["method=reinforce++"]),
    "raft": ("raft", "lora", ["global_batch=4", "answers_per_prompt=8"]),
    "raft over the iteration": (
        "raft",
        "full",
        ["global_batch=4", "compare=iteration", "keep_share=0.25", "learning_rate=5e-3"],
    ),
}


SLOW = ("dr_grpo", "reinforce++", "raft over the iteration")


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_the_mean_reward_climbs(case: str, tmp_path: Path) -> None:
    stage, method, more = CASES[case]
    records: list[dict[str, Any]] = []
    run = small_policy(tmp_path, stage, *[f"{stage}.{setting}" for setting in [*TOY, *more]], method=method)
    run_dir = train(run, watch=records.append)
    rewards = [record["reward_mean"] for record in records if record["kind"] == "iteration"]
    assert len(rewards) == 15
    assert rewards[0] < 0.45
    assert sum(rewards[-2:]) / 2 > 0.5, rewards
    assert (run_dir.model / "tokenizer.json").is_file()
    assert records[-1]["event"] == "finished"
