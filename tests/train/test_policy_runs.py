"""Runs that learn from a reward: they can be resumed in the middle, and what is wrong stops them with a name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.small_policy import small_policy
from zhibei.config.errors import RunStopped, UserError
from zhibei.config.policy import GrpoSection, PpoSection, RaftSection
from zhibei.generate.rollouts import Rollout
from zhibei.model.load import load_for_inference
from zhibei.store.metrics import read_metrics
from zhibei.store.run_dir import RunDir
from zhibei.train import grpo, iteration, ppo, raft
from zhibei.train.collect import Collected, collect
from zhibei.train.experience import passes_of, rows_of
from zhibei.train.loops import train
from zhibei.train.policy_materials import gather_policy
from zhibei.train.reward_shaping import RunningScale
from zhibei.train.reward_sources import unsupervised_rows
from zhibei.train.token_loss import token_loss

CUTS = {"kl_target": 2.0, "normalize_rewards": "true", "missing_terminator_penalty": 0.1}


class Interruption(Exception):
    """The process is gone."""


def iterations(run_dir: RunDir) -> dict[int, dict[str, Any]]:
    chosen = {"reward_mean", "reward_std", "kl", "entropy", "policy_loss", "critic_loss", "kl_coefficient"}
    return {
        record["step"]: {name: record[name] for name in sorted(chosen & set(record))}
        for record in read_metrics(run_dir.metrics)
        if record["kind"] == "iteration"
    }


@pytest.mark.parametrize(("stage", "method"), [("ppo", "lora"), ("ppo", "full"), ("grpo", "lora"), ("raft", "lora")])
def test_a_resumed_run_has_the_rewards_it_would_have_had(stage: str, method: str, tmp_path: Path) -> None:
    more = [f"ppo.{name}={value}" for name, value in CUTS.items()] if stage == "ppo" else []
    more.append(f"{stage}.save_in_background=false")  # a save counts at once, and the cut is where it is meant to be
    whole = train(small_policy(tmp_path, stage, *more, "name=whole", method=method))

    def gone(record: dict[str, Any]) -> None:
        if record.get("event") == "saved" and record["step"] == 2:
            raise Interruption

    cut = small_policy(tmp_path, stage, *more, "name=cut", method=method)
    with pytest.raises(Interruption):
        train(cut, watch=gone)
    run_dir = RunDir(tmp_path / "runs" / "cut")
    assert set(iterations(run_dir)) == {1, 2}
    train(cut, resume=run_dir)
    assert iterations(run_dir) == iterations(whole)
    one, other = (load_for_inference(str(folder.path)) for folder in (whole, run_dir))
    for (name, a), (_, b) in zip(one.hf.named_parameters(), other.hf.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_is_a_model_and_its_records_are_whole(tmp_path: Path) -> None:
    run_dir = train(small_policy(tmp_path, "ppo", "ppo.evaluate_every=1"))
    records = read_metrics(run_dir.metrics)
    first = next(record for record in records if record["kind"] == "iteration")
    wanted = {
        "kl", "kl_k3", "clip_share", "entropy", "explained_variance", "reward_mean", "reward_std", "length_correlation",
        "repeated_share", "ended_share", "length_mean", "sampler_gap", "writing_seconds", "learning_seconds",
    }  # fmt: skip
    assert wanted <= set(first)
    assert abs(first["kl"]) < 1e-5
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [0, 1, 2, 3]
    panel = json.loads((run_dir.samples / "step-000003.json").read_text())
    assert all(entry["prompt"].startswith("Say ") for entry in panel)
    assert not (run_dir.model / "critic").exists()
    finished = json.loads(run_dir.manifest.read_text())["finished"]
    rewards = [r["reward_mean"] for r in records if r["kind"] == "evaluation"]
    assert finished["best_heldout_reward"] == pytest.approx(max(rewards))
    assert finished["heldout"]["reward_mean"] == rewards[finished["model_step"]]
    assert finished["model_step"] == (max(range(4), key=rewards.__getitem__) or 3)
    assert all(proof["passed"] for proof in json.loads(run_dir.proofs.read_text()))


def test_what_is_wrong_before_learning_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = iteration.probe_before_learning

    def spoiled(field: str) -> Any:
        def probe(going: Any, collected: Collected) -> None:
            moved = {field: getattr(collected, field) + 0.5}
            real(going, dataclasses.replace(collected, **moved))

        return probe

    for number, (field, said) in enumerate(
        {
            "reference_BT": "the KL to the reference is not 0",
            "engine_logps_BT": "the sampler draws from another distribution",
            "old_logps_BT": "the ratio to itself is not 1",
        }.items()
    ):
        monkeypatch.setattr(iteration, "probe_before_learning", spoiled(field))
        with pytest.raises(RunStopped, match=said):
            train(small_policy(tmp_path, "ppo", f"name=spoiled{number}"))


@pytest.mark.parametrize("more", [[], ["ppo.warmup_steps=1"], ["ppo.critic_warmup_steps=1"]])
def test_an_update_that_changes_nothing_stops_the_run(more: list[str], tmp_path: Path) -> None:
    """Whichever iteration has the first update."""
    with pytest.raises(RunStopped, match="changed no log-probability"):
        train(small_policy(tmp_path, "ppo", "ppo.learning_rate=1e-30", "ppo.critic_learning_rate=1e-3", *more))


@pytest.mark.parametrize("jitter", [0.0, 1e-7])
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_an_engine_that_keeps_the_old_weights_stops_the_run(
    stage: str, jitter: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, or up to rounding. The other tests of this file show that the engine as it is passes."""
    real, seen = iteration.collect, []

    def collected_once(*arguments: Any, **options: Any) -> Collected:
        seen.append(real(*arguments, **options))
        return seen[-1]

    def stale(_parts: Any, _rows: Any, numbers: list[int], *, seed: int) -> Rollout:
        old, count = seen[0].rollout, len(numbers)
        assert seed != 0
        logps = [[value + jitter for value in row] for row in old.logps[:count]]
        return Rollout(old.prompts[:count], old.answers[:count], logps, old.finish[:count], old.texts[:count])

    monkeypatch.setattr(iteration, "collect", collected_once)
    monkeypatch.setattr(iteration, "answers_to", stale)
    with pytest.raises(RunStopped, match="the engine still writes answers with the weights from before"):
        train(small_policy(tmp_path, stage, f"{stage}.learning_rate=1e-2"))


def test_the_importance_correction_weighs_each_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_policy(tmp_path, "ppo", "ppo.importance_clip=1.5")
    made = collect(gather_policy(run), 0, RunningScale())
    made = dataclasses.replace(made, engine_logps_BT=made.old_logps_BT - torch.linspace(-1, 1, made.mask_BT.shape[1]))
    section = run.run.ppo
    plain = ppo.experience_of(made, section.model_copy(update={"importance_clip": 0.0}), kl_coefficient=0.1)
    weighed = ppo.experience_of(made, section, kl_coefficient=0.1)
    factors_BT = made.importance_BT(1.5)
    assert float(factors_BT.max()) == 1.5
    assert float(factors_BT.min()) < 0.5
    torch.testing.assert_close(weighed.figures_BT["advantages"], plain.figures_BT["advantages"] * factors_BT)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("ppo.reward=null", "are both open: nothing says which answers are good"),
        ("ppo.reward=number", None),
        ("ppo.engine=vllm", "vLLM, which is not installed"),
        ("ppo.reward=python:no_such_file.py:f", "cannot be loaded"),
        ("ppo.micro_batch_tokens=20", "has .* tokens"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_begins(setting: str, said: str | None, tmp_path: Path) -> None:
    run = small_policy(tmp_path, "ppo", setting)
    if said is None:
        assert gather_policy(run).questions
        return
    with pytest.raises(UserError, match=said):
        train(run)
    assert not (tmp_path / "runs").exists()


def test_prompts_without_a_result_are_refused_where_results_are_compared(tmp_path: Path) -> None:
    run = small_policy(tmp_path, "grpo", "grpo.reward=exact")
    rows = tmp_path / "prompts.json"
    rows.write_text(json.dumps([{"prompt": f"Say {number}."} for number in range(24)]))
    with pytest.raises(UserError, match="prompts have no result to compare with"):
        train(run)


def test_equal_rewards_are_counted_and_teach_nothing(tmp_path: Path) -> None:
    small_policy(tmp_path, "grpo")
    constant = f"python:{tmp_path / 'rewards.py'}:constant"
    with pytest.raises(RunStopped, match="nothing was learned in 2 iterations"):
        train(small_policy(tmp_path, "grpo", f"grpo.reward={constant}", "grpo.max_steps=2", "name=equal"))
    run_dir = RunDir(tmp_path / "runs" / "equal")
    assert not run_dir.model.exists()
    records = [record for record in read_metrics(run_dir.metrics) if record["kind"] == "iteration"]
    assert [record["excluded_groups"] for record in records] == [4, 4]
    assert [record["policy_steps"] for record in records] == [0, 0]


def collected(scores: list[float], lengths: list[int]) -> Collected:
    generator = torch.Generator().manual_seed(1)
    answers = [[5] * length for length in lengths]
    rollout = Rollout([[1, 2]] * len(scores), answers, [[0.0] * n for n in lengths], ["stop"] * len(scores), [""])
    shape = rollout.mask_BT.shape
    grids = [torch.randn(shape, generator=generator) * rollout.mask_BT for _ in range(3)]
    return Collected(
        rollout=rollout,
        rows=rows_of(rollout),
        prompt_numbers=[0] * len(scores),
        scores=scores,
        rewards_B=torch.tensor(scores),
        old_logps_BT=grids[0],
        engine_logps_BT=grids[0],
        reference_BT=grids[1],
        values_BT=grids[2],
        seconds={},
    )


def test_ppo_learns_from_gae_of_rewards_less_the_kl() -> None:
    made = collected([1.0, -1.0, 0.5], [3, 1, 2])
    section = PpoSection(gamma=0.9, gae_lambda=0.8, whiten_advantages=True)
    found = ppo.experience_of(made, section, kl_coefficient=0.3)
    old, reference, values = (
        grid.double().numpy() for grid in (made.old_logps_BT, made.reference_BT, made.values_BT) if grid is not None
    )
    advantages, returns = np.zeros((3, 3)), np.zeros((3, 3))
    for row, length in enumerate([3, 1, 2]):
        following_value = following_advantage = 0.0
        for t in reversed(range(length)):
            reward = -0.3 * (old[row, t] - reference[row, t]) + (made.scores[row] if t == length - 1 else 0)
            delta = reward + 0.9 * following_value - values[row, t]
            following_advantage = delta + 0.9 * 0.8 * following_advantage
            advantages[row, t], following_value = following_advantage, values[row, t]
            returns[row, t] = following_advantage + values[row, t]
    mask = made.mask_BT.numpy()
    np.testing.assert_allclose(found.figures_BT["returns"].numpy(), returns, atol=1e-6)
    whitened = (advantages - advantages[mask].mean()) / advantages[mask].std() * mask
    np.testing.assert_allclose(found.figures_BT["advantages"].numpy(), whitened, atol=1e-6)


def test_what_the_critic_expects_stands_in_the_place_of_the_score_of_a_cut_answer() -> None:
    made = collected([1.0, -1.0, 0.5], [3, 1, 2])
    rollout = dataclasses.replace(made.rollout, finish=["length", "stop", "length"])
    made = dataclasses.replace(made, rollout=rollout, end_values_B=torch.tensor([2.0, 3.0, 4.0]))
    section = PpoSection(gamma=0.9, gae_lambda=0.8, whiten_advantages=False)
    bootstrapped = section.model_copy(update={"truncated": "bootstrap"})
    ended, found = (ppo.experience_of(made, one, kl_coefficient=0) for one in (section, bootstrapped))
    assert torch.equal(ended.figures_BT["returns"][1], found.figures_BT["returns"][1])
    discount = 0.9 * 0.8
    for row, length, score, after in ((0, 3, 1.0, 2.0), (2, 2, 0.5, 4.0)):
        moved = (0.9 * after - score) * discount ** np.arange(length - 1, -1, -1)
        change = (found.figures_BT["advantages"] - ended.figures_BT["advantages"])[row, :length]
        np.testing.assert_allclose(change.numpy(), moved, atol=1e-6)


def test_a_value_after_the_end_is_that_of_the_last_token(tmp_path: Path) -> None:
    parts = gather_policy(small_policy(tmp_path, "ppo", "ppo.truncated=bootstrap"))
    assert parts.roles.critic is not None
    torch.nn.init.normal_(parts.roles.critic.head.weight)
    found = collect(parts, 0, RunningScale())
    assert found.was_cut_B.any()
    for number, row in enumerate(found.rollout.rows[:5]):
        alone = passes_of(unsupervised_rows([row]), [0], parts.plan)[0]
        with parts.roles.as_critic() as critic, torch.no_grad():
            value = critic.values(alone)[len(row) - 1]
        assert found.end_values_B is not None
        assert float(found.end_values_B[number]) == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_groups_without_variance_are_left_out_and_tokens_weigh_what_the_method_says(method: Any) -> None:
    made = collected([1.0, 0.0, 2.0, 2.0], [3, 1, 2, 2])
    section = GrpoSection(method=method, answers_per_prompt=2, kl_coefficient=0, max_new_tokens=8)
    experience, numbers = grpo.experience_of(made, section)
    assert numbers == ([0, 1, 2, 3] if method == "reinforce++" else [0, 1])
    lengths = np.array([3, 1, 2, 2])
    wanted = {"grpo": 1 / lengths, "reinforce++": np.ones(4)}.get(method, np.full(4, 1 / 8))
    np.testing.assert_allclose(experience.weights_BT[:, 0].numpy(), wanted, atol=1e-7)
    advantages = experience.figures_BT["advantages"][:2, 0].numpy()
    std = np.std([1.0, 0.0], ddof=1) + 1e-4
    whole = (np.array([1.0, 0.0]) - 1.25) / np.std([1.0, 0.0, 2.0, 2.0])
    by_method = {"grpo": [0.5 / std, -0.5 / std], "dr_grpo": [0.5, -0.5], "rloo": [1.0, -1.0], "reinforce++": whole}
    np.testing.assert_allclose(advantages, by_method[method], atol=1e-6)
    assert sum(experience.units_B) == (8 if method == "reinforce++" else 4)


def test_rloo_takes_the_kl_of_the_answer_off_its_reward() -> None:
    made = collected([1.0, 0.0], [3, 1])
    assert made.reference_BT is not None
    section = GrpoSection(method="rloo", answers_per_prompt=2, kl_coefficient=0.5)
    kl = ((made.old_logps_BT - made.reference_BT) * made.mask_BT).sum(dim=1)
    torch.testing.assert_close(grpo.rewards_of(made, section), made.rewards_B - 0.5 * kl)
    assert grpo.rewards_of(made, section.model_copy(update={"method": "grpo"})) is made.rewards_B


def test_supervised_rows_add_their_weighted_mean_loss(tmp_path: Path) -> None:
    run = small_policy(tmp_path, "ppo")
    supervised = tmp_path / "ptx.json"
    supervised.write_text(json.dumps([{"instruction": f"Add {i}.", "output": f"It is {i}."} for i in range(20)]))
    parts = gather_policy(small_policy(tmp_path, "ppo", f"ppo.ptx_sources=[{supervised}]", "ppo.ptx_coefficient=0.5"))
    assert parts.ptx is not None
    answers = [dataclasses.replace(batch, num_units=48) for batch in parts.ptx.micro_batches(1)[:1] * 2]
    assert gather_policy(run).ptx_passes(0, answers, coefficient=0.5) == []
    passes = parts.ptx_passes(0, answers, coefficient=0.5)
    assert sum(batch.num_units for batch in passes) == 0
    assert {number for batch in passes for number in batch.row_numbers} != set()
    plain = parts.ptx.micro_batches(0) if parts.ptx else []
    losses = sum(float(parts.materials.stepper.loss_sum(parts.roles.policy, batch).detach()) for batch in passes)  # type: ignore[union-attr]
    wanted = sum(float(token_loss(parts.head)(parts.roles.policy, batch).detach()) for batch in plain)
    assert losses == pytest.approx(0.5 * 96 * wanted / sum(batch.num_units for batch in plain), rel=1e-5)
    run_dir = train(
        small_policy(tmp_path, "ppo", f"ppo.ptx_sources=[{supervised}]", "ppo.ptx_coefficient=0.5", "name=ptx")
    )
    assert run_dir.model.is_dir()


def test_the_passes_end_once_the_policy_has_gone_far(tmp_path: Path) -> None:
    run_dir = train(small_policy(tmp_path, "ppo", "ppo.stop_at_kl=1e-9", "ppo.inner_epochs=4", "ppo.max_steps=1"))
    record = next(r for r in read_metrics(run_dir.metrics) if r["kind"] == "iteration")
    assert record["stopped_early"]
    assert record["policy_steps"] <= 2


def test_raft_keeps_the_best_of_each_prompt_or_of_all() -> None:
    made = dataclasses.replace(collected([1.0, 3.0, 2.0, 2.0, 0.0, 5.0], [1] * 6), reference_BT=None)

    def kept(**settings: Any) -> raft.Kept:
        return raft.best_of(made, RaftSection(answers_per_prompt=2, keep_share=0.5, **settings))

    assert kept() == raft.Kept([1, 5], excluded_groups=1)
    assert kept(compare="iteration") == raft.Kept([5, 1, 2])
    # Where a number says what is good, a group without variance can be good as a whole.
    assert kept(least_reward=2.5) == raft.Kept([1, 5], not_good_enough=1)
    assert kept(least_reward=2.0) == raft.Kept([1, 2, 5])
    constant = dataclasses.replace(made, rewards_B=torch.ones(6), scores=[1.0] * 6)
    assert raft.best_of(constant, RaftSection(answers_per_prompt=2, keep_share=0.5, compare="iteration")).numbers == []


def test_raft_takes_the_kl_off_before_it_compares() -> None:
    made = collected([1.0, 1.1], [2, 2])
    far = torch.zeros(2, 2)
    far[1] = -1.0  # the second answer is much likelier under the policy than under the reference
    made = dataclasses.replace(made, old_logps_BT=torch.zeros(2, 2), reference_BT=far)
    section = RaftSection(answers_per_prompt=2, keep_share=0.5)
    assert raft.best_of(made, section).numbers == [1]
    assert raft.best_of(made, section.model_copy(update={"kl_coefficient": 0.1})).numbers == [0]


def test_a_step_of_raft_is_a_supervised_step_over_what_was_kept(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="none was good enough"):
        train(small_policy(tmp_path, "raft", "raft.max_steps=1", "raft.global_batch=4", "raft.least_reward=9"))
    record = next(r for r in read_metrics(RunDir(tmp_path / "runs" / "small").metrics) if r["kind"] == "iteration")
    assert (record["kept"], record["not_good_enough"], record["policy_steps"]) == (0, 8, 0)
    parts = gather_policy(small_policy(tmp_path, "raft", "raft.global_batch=4"))
    made = collect(parts, 0, RunningScale(), group=8)
    batch = passes_of(made.rows, [3, 9], parts.plan)[0]
    supervised, loss = (
        one(parts.roles.policy, batch) for one in (token_loss(parts.head), parts.materials.stepper.loss_sum)
    )
    assert isinstance(loss, torch.Tensor)
    assert isinstance(supervised, torch.Tensor)
    assert loss.item() == pytest.approx(supervised.item())
    assert batch.num_units == len(made.rollout.answers[3]) + len(made.rollout.answers[9])


def test_dropout_of_the_files_is_off_where_log_probabilities_are_compared(tmp_path: Path) -> None:
    small_policy(tmp_path, "ppo")
    config = tmp_path / "tiny-llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.5}))
    parts = gather_policy(small_policy(tmp_path, "ppo", "lora.dropout=0.5"))
    assert parts.roles.policy.hf.training
    made = collect(parts, 0, RunningScale())
    assert made.reference_BT is not None
    gap_BT = (made.old_logps_BT - made.reference_BT)[made.mask_BT].abs()
    assert float(gap_BT.max()) < 1e-4  # with half of the attention gone it is far from that
