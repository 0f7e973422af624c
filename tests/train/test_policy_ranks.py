"""Learning from rewards on two ranks is what it is on one: answers are dealt out, figures and updates are the same."""

import json
from pathlib import Path

import pytest

from tests.train.small_policy import make_judges, small_policy
from tests.train.test_rank_runs import proofs_hold, run_orders
from zhibei.generate.rewards import RewardFailed
from zhibei.generate.rollouts import Rollout
from zhibei.model.ranks import Ranks
from zhibei.store.run_dir import RunDir
from zhibei.train import dealing
from zhibei.train.loops import train

RUNS = {
    "ppo": ("ppo", ["ppo.kl_target=2.0", "ppo.normalize_rewards=true"]),
    "ppo-full": ("ppo", ["ppo.models=separate", "model.method=full", "distributed.sharding=no_shard"]),
    "grpo": ("grpo", ["grpo.answers_per_prompt=4", "grpo.micro_batch_tokens=256"]),
    "raft": ("raft", ["raft.answers_per_prompt=4", "raft.keep_share=0.25"]),
    "grpo-qlora": ("grpo", ["grpo.answers_per_prompt=4", "model.method=qlora", "model.quantize=nf4"]),
}
DIVIDED = {
    "ppo-divided": ("ppo-full", ["distributed.sharding=full_shard"]),
    "grpo-divided": ("grpo", ["model.method=full", "distributed.sharding=full_shard"]),
    "ppo-adapters-divided": ("ppo", ["distributed.sharding=full_shard"]),
    "raft-adapters-divided": ("raft", ["distributed.sharding=shard_grad_op"]),
    "grpo-qlora-divided": ("grpo-qlora", ["distributed.sharding=full_shard"]),
}
COMPARED = (
    "reward_mean", "kl", "policy_loss", "grad_norm", "critic_loss", "answers", "tokens", "entropy", "sampler_gap_max",
)  # fmt: skip


def iterations(run_dir: RunDir) -> list[dict]:
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    return [record for record in records if record["kind"] in ("iteration", "evaluation")]


def require_same(one: RunDir, two: RunDir) -> None:
    first, second = iterations(one), iterations(two)
    assert len(first) == len(second) >= 3, two.path.name
    for a, b in zip(first, second, strict=True):
        for name in COMPARED:
            if a.get(name) is not None:
                where = f"{two.path.name}, step {a['step']}: {name}"
                assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), where


@pytest.mark.slow
def test_two_ranks_learn_from_rewards_what_one_learns(tmp_path: Path) -> None:
    for stage in ("ppo", "grpo", "raft"):
        small_policy(tmp_path, stage)
    plain = {name: [*more, f"{stage}.max_steps=3"] for name, (stage, more) in RUNS.items()}
    stages = {name: stage for name, (stage, _) in RUNS.items()}
    for name, (like, more) in DIVIDED.items():
        plain[name], stages[name] = [*plain[like], *more], stages[like]
    alone = {
        name: train(small_policy(tmp_path, stages[name], *settings, f"name={name}-alone"))
        for name, settings in plain.items()
        if name not in DIVIDED
    }
    alone |= {name: alone[like] for name, (like, _) in DIVIDED.items()}
    alone["grpo-divided"] = train(
        small_policy(tmp_path, "grpo", *plain["grpo-divided"][:-1], "name=grpo-divided-alone")
    )
    orders = [
        {"file": str(tmp_path / f"{stages[name]}.yaml"), "overrides": [*settings, f"name={name}"]}
        for name, settings in plain.items()
    ]
    refused = tmp_path / "refused.json"
    more = ["grpo.optimizer=adafactor", "distributed.sharding=full_shard", "name=refused"]
    orders.append({"file": str(tmp_path / "grpo.yaml"), "overrides": [*plain["grpo"], *more], "fails": str(refused)})
    run_orders(2, orders, tmp_path)
    for name, one in alone.items():
        two = RunDir(tmp_path / "runs" / name)
        require_same(one, two)
        assert proofs_hold(two)
    told = json.loads(refused.read_text())
    assert all("full_shard" in what for _, what in told), told


@pytest.mark.slow
def test_divided_adapters_with_a_judge_beside_them_cut_off_or_going_on(tmp_path: Path) -> None:
    """The reward model on the policy's base, a critic that begins as it, an adapter that learns on (its start is the
    reference then); and a run that is cut off on two ranks and goes on alone."""
    make_judges(tmp_path)
    start = train(small_policy(tmp_path, "grpo", "grpo.max_steps=1", "name=start"))
    judged = ["ppo.reward=null", "ppo.min_reward_accuracy=0", "ppo.critic_from=reward_model"]
    runs = {
        "on-base": ("ppo", [*judged, f"ppo.reward_model={tmp_path / 'runs' / 'judge-lora'}"]),
        "full": (
            "ppo",
            [
                *judged,
                f"ppo.reward_model={tmp_path / 'runs' / 'judge-full'}",
                "ppo.models=separate",
                "model.method=full",
            ],
        ),
        "goes-on": ("grpo", [f"lora.adapter={start.path / 'model'}"]),
    }
    alone, orders = {}, []
    for name, (stage, settings) in runs.items():
        small_policy(tmp_path, stage)
        alone[name] = train(small_policy(tmp_path, stage, *settings, f"name={name}-alone"))
        more = [*settings, "distributed.sharding=full_shard", f"name={name}"]
        orders.append({"file": str(tmp_path / f"{stage}.yaml"), "overrides": more})
    stage, settings = runs["on-base"]
    cut = [*settings, "distributed.sharding=full_shard", "name=cut"]
    told = tmp_path / "cut.json"
    orders.append({"file": str(tmp_path / "ppo.yaml"), "overrides": cut, "signal_after_step": 1, "fails": str(told)})
    run_orders(2, orders, tmp_path)
    for name, one in alone.items():
        require_same(one, RunDir(tmp_path / "runs" / name))
        assert proofs_hold(RunDir(tmp_path / "runs" / name))
    assert [kind for kind, _ in json.loads(told.read_text())] == ["RunInterrupted"] * 2
    resumed = train(small_policy(tmp_path, stage, *cut), resume=RunDir(tmp_path / "runs" / "cut"))
    require_same(alone["on-base"], resumed)


def test_every_answer_is_written_by_one_rank() -> None:
    for count in (4, 7, 16):
        dealt = [number for rank in range(4) for number in dealing.own_of(count, Ranks(rank, 4))]
        assert dealt == list(range(count))
    assert [list(dealing.own_of(3, Ranks(rank, 4))) for rank in range(4)] == [[0, 1, 2]] * 4


def test_one_process_alone_keeps_what_it_wrote() -> None:
    rollout = Rollout([[1]], [[2, 3]], [[-0.5, -0.25]], ["stop"], ["x"])
    assert dealing.all_answers(rollout, [[1]], Ranks()) is rollout

    def failing(_own: range) -> list[float]:
        raise RewardFailed("no reward", expected="", fix="")

    with pytest.raises(RewardFailed):
        dealing.all_scores(failing, 4, Ranks())
    assert dealing.all_scores(lambda own: [float(n) for n in own], 3, Ranks()) == [0.0, 1.0, 2.0]
