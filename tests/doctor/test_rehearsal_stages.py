"""Reward models, pairs and policies are rehearsed too: sound runs pass, and what is wrong is found before the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.train.pair_run import judged_rows, pair_run
from tests.train.small_policy import small_policy
from zhibei.doctor import policy_rehearsal
from zhibei.doctor.hard_items import hardest
from zhibei.doctor.policy_rehearsal import Tried, longest_prompts, shortened
from zhibei.doctor.probes import evaluation, find_worst, reference, split, two_steps, zero_rate
from zhibei.doctor.rehearsal import Rehearsal, rehearse, steps_of
from zhibei.doctor.scene import Scene
from zhibei.doctor.worst import worst_items
from zhibei.store.run_dir import RunDir
from zhibei.train.materials import gather
from zhibei.train.policy_materials import gather_policy

PAIRS = {
    "reward, full": ("reward", []),
    "dpo, precomputed": ("dpo", []),
    "kto": ("dpo", ["dpo.loss=kto", "model.method=lora"]),
}


def findings(done: Rehearsal) -> list[tuple[str, str]]:
    return [(one.finding.what, one.finding.where) for one in done.checkup.findings]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_sound_runs_over_pairs_pass_and_leave_nothing(tmp_path: Path, name: str) -> None:
    stage, overrides = PAIRS[name]
    rows = judged_rows() if name == "kto" else None
    resolved = pair_run(tmp_path, stage, *overrides, rows=rows)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = rehearse(resolved)
    assert findings(done) == []
    assert [step.name for step in done.steps] == list(steps_of(stage))
    assert sorted({path.name for path in tmp_path.iterdir()} - {"zhibei-cache"}) == before
    json.dumps(done.as_dict(), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method"), [("ppo", "lora"), ("raft", "full")])
def test_sound_policies_pass_and_leave_nothing(tmp_path: Path, stage: str, method: str) -> None:
    more = ["raft.answers_per_prompt=4", "raft.keep_share=0.25"] if stage == "raft" else []
    resolved = small_policy(tmp_path, stage, *more, method=method)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = rehearse(resolved)
    assert findings(done) == []
    assert [step.name for step in done.steps] == list(steps_of(stage))
    left = {path.name for path in tmp_path.iterdir()} - {"zhibei-cache", "__pycache__"}
    assert sorted(left) == before
    json.dumps(done.as_dict(), allow_nan=False)


def scene_of(tmp_path: Path, stage: str, *overrides: str) -> Scene:
    scene = Scene(gather(pair_run(tmp_path, stage, *overrides)), folder=tmp_path)
    find_worst(scene)
    return scene


def test_pairs_are_rehearsed_on_their_hardest_items_only(tmp_path: Path) -> None:
    materials = gather(pair_run(tmp_path, "dpo"))
    small, worst = hardest(materials, RunDir(tmp_path), step=0)
    assert small.batches.num_items < materials.batches.num_items
    every = [batch for step in range(materials.batches.num_steps) for batch in materials.batches.micro_batches(step)]
    assert worst.tokens == max(batch.tokens_BT.numel() for batch in every)
    assert worst.longest == max(batch.longest for batch in every)
    assert set(worst.first[0].columns_I) >= {"reference_chosen", "reference_rejected"}
    again, _ = hardest(gather(pair_run(tmp_path, "dpo")), RunDir(tmp_path), step=2)
    assert torch.equal(
        again.batches.batch_of([0]).columns_I["reference_chosen"],
        small.batches.batch_of([0]).columns_I["reference_chosen"],
    )
    assert len(worst_items(materials.batches).all) < small.batches.num_items


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_loss_that_depends_on_the_cut_is_found(tmp_path: Path, stage: str, monkeypatch) -> None:
    scene = scene_of(tmp_path, stage)
    for probe in (zero_rate, split, two_steps, evaluation):
        assert probe(scene).problems == [], probe.__name__
    loss = scene.materials.task.plain_loss
    object.__setattr__(scene.materials.task, "plain_loss", lambda model, batch: loss(model, batch) / batch.num_units)
    assert "items have a loss" in split(scene).problems[0][1].what


def test_a_reference_that_is_another_model_is_found(tmp_path: Path) -> None:
    from zhibei.config.errors import RunStopped

    scene = scene_of(tmp_path, "dpo")
    assert reference(scene).problems == []
    with torch.no_grad():
        scene.materials.model.head.weight.mul_(1.5)
    with pytest.raises(RunStopped, match="differ by"):
        reference(scene)


def test_the_longest_prompts_are_asked(tmp_path: Path) -> None:
    resolved = small_policy(tmp_path, "grpo", "grpo.answers_per_prompt=4", "grpo.rollout_batch=8")
    tried = Tried(gather_policy(shortened(resolved, tmp_path / "place")), tmp_path / "place")
    lengths = sorted(tried.parts.materials.rows.train.lengths.tolist())
    assert tried.parts.section.minibatches == 2
    longest_prompts(tried)
    assert tried.parts.materials.rows.train.lengths.tolist() == lengths[:-3:-1]
    assert tried.parts.cursor.num_iterations == 1
    assert tried.parts.cursor.numbers(0).tolist() == [0, 1]


@pytest.mark.slow
def test_a_constant_reward_is_told_and_a_broken_one_stops(tmp_path: Path) -> None:
    reward = tmp_path / "rewards.py"
    constant = small_policy(tmp_path, "ppo", f"ppo.reward=python:{reward}:constant")
    told = [one.finding.what for one in rehearse(constant).checkup.findings]
    assert len(told) == 1
    assert "have the reward 1" in told[0]
    broken = tmp_path / "broken.py"
    broken.write_text("def score(prompts, answers, references):\n    raise KeyError('no')\n")
    done = rehearse(small_policy(tmp_path, "ppo", f"ppo.reward=python:{broken}:score"))
    assert done.checkup.blocks
    assert "raised KeyError" in done.checkup.findings[0].finding.what


@pytest.mark.slow
def test_a_checkpoint_that_lost_the_critic_is_found(tmp_path: Path, monkeypatch) -> None:
    sums = policy_rehearsal.role_sums

    def wrong(parts):
        return {name: value + 1 for name, value in sums(parts).items()}

    monkeypatch.setattr(policy_rehearsal, "role_sums", wrong)
    done = rehearse(small_policy(tmp_path, "ppo"))
    assert [one.id for one in done.checkup.findings] == ["lora-resume-weights-not-loaded"]
