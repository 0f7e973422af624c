"""Learning from rewards on two ranks is what it is on one: answers are dealt out, figures and updates are the same."""

import json
from pathlib import Path

import pytest

from tests.train.small_policy import small_policy
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
    alone["grpo-divided"] = train(
        small_policy(tmp_path, "grpo", *plain["grpo-divided"][:-1], "name=grpo-divided-alone")
    )
    alone["ppo-divided"] = alone["ppo-full"]
    orders = [
        {"file": str(tmp_path / f"{stages[name]}.yaml"), "overrides": [*settings, f"name={name}"]}
        for name, settings in plain.items()
    ]
    refusals = {
        "refused": ["distributed.sharding=full_shard"],
        "packed": ["model.method=qlora", "distributed.sharding=full_shard"],
    }
    for name, more in refusals.items():
        orders.append(
            {
                "file": str(tmp_path / "grpo.yaml"),
                "overrides": [*plain["grpo"], *more, f"name={name}"],
                "fails": str(tmp_path / f"{name}.json"),
            }
        )
    run_orders(2, orders, tmp_path)
    for name, one in alone.items():
        two = RunDir(tmp_path / "runs" / name)
        require_same(one, two)
        assert proofs_hold(two)
    for name in refusals:
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert all("full_shard" in what for _, what in told), told


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
