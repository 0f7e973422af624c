"""A reward model in use: its scores are what it says alone, and one that cannot judge is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.small_policy import make_judges, small_policy
from zhibei.config.errors import UserError
from zhibei.data.batches import BatchPlan
from zhibei.generate.rewards import Answered
from zhibei.model.score_model import last_tokens, load_score_model_for_inference
from zhibei.plan.holdings import holdings_of
from zhibei.plan.job import Rows, Ways, job_of
from zhibei.plan.machines import parse_machine
from zhibei.plan.memory import predict
from zhibei.store.metrics import read_metrics
from zhibei.store.reward_models import shared_judge
from zhibei.store.run_dir import RunDir
from zhibei.train.experience import passes_of
from zhibei.train.loops import train
from zhibei.train.planning import shape_of_model
from zhibei.train.policy_materials import gather_policy
from zhibei.train.reward_sources import model_scorer, unsupervised_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    make_judges(folder)
    return folder


ROWS = [[1, 40, 41, 2], [1, 90], [1, *range(50, 70)], [1, 7, 8]]


def settings(folder: Path, stage: str, method: str = "full") -> list[str]:
    return [f"{stage}.reward=null", f"{stage}.reward_model={folder / 'runs' / f'judge-{method}'}"]


def asked_of(rows: list[list[int]]) -> Answered:
    return Answered([""] * len(rows), [""] * len(rows), [None] * len(rows), rows)


def scores_alone(folder: Path, method: str) -> list[float]:
    """What the reward model says of ROWS, loaded by itself."""
    path = str(folder / "runs" / f"judge-{method}")
    model = load_score_model_for_inference(path, device="cpu", precision="fp32")
    return list(model_scorer(lambda: nullcontext(model), BatchPlan(1, 64, packing=False))(asked_of(ROWS)))


def test_scores_do_not_depend_on_the_rows_beside(folder: Path) -> None:
    model = load_score_model_for_inference(str(folder / "runs" / "judge-full"), device="cpu", precision="fp32")
    asked = asked_of(ROWS)
    whole, small = (
        model_scorer(lambda: nullcontext(model), BatchPlan(1, tokens, packing=False, pad_token=pad))(asked)
        for tokens, pad in ((512, 3), (20, 0))
    )
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
    manifest = folder / "runs" / "judge-full" / "manifest.json"
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


@pytest.mark.parametrize("stage", ["ppo", "grpo", "raft"])
def test_a_reward_model_on_the_same_base_is_one_more_adapter_with_the_same_scores(stage: str, folder: Path) -> None:
    run = small_policy(folder, stage, *settings(folder, stage, "lora"))
    parts = gather_policy(run)
    assert parts.roles.judge is not None
    assert "one more adapter on the policy's base" in parts.materials.notes[-1]
    with torch.no_grad():
        for parameter in parts.roles.policy.trainable().values():
            parameter += 0.1  # neither what the policy learns nor what the critic learns reaches it
        for parameter in (parts.roles.critic.parameters if parts.roles.critic else {}).values():
            parameter += 0.1
    assert parts.reward(asked_of(ROWS)) == pytest.approx(scores_alone(folder, "lora"), abs=1e-6)
    assert all(".default." in name for name in parts.roles.policy.trainable())
    assert not any(".judge." in name for name in parts.roles.policy.trainable())
    shape = shape_of_model(run.run)
    assert shape is not None
    rows, ways, machine = Rows(100, 50.0, 24), Ways(512), parse_machine("a100-40g")
    shared = job_of(run.run, shape, machine, rows, ways, judge=shared_judge(run.run))
    apart = job_of(run.run, shape, machine, rows, ways)
    assert (shared.has_reward_model, apart.has_reward_model) == (False, True)
    weights = holdings_of(shape, apart).weights
    saved = predict(shape, apart).peak_gib - predict(shape, shared).peak_gib
    assert saved * 2**30 == pytest.approx(weights - shared.reward_adapter_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("full", []),  # another model
        ("lora", ["ppo.models=separate"]),  # asked for
        ("lora", ["model.rope_scaling_factor=2"]),  # the same weights at other positions
    ],
)
def test_other_reward_models_stay_models_of_their_own(method: str, more: list[str], folder: Path) -> None:
    parts = gather_policy(small_policy(folder, "ppo", *settings(folder, "ppo", method), *more))
    assert parts.roles.judge is None
    assert "a model of its own" in parts.materials.notes[-1]
    assert parts.reward(asked_of(ROWS)) == pytest.approx(scores_alone(folder, method), abs=1e-5)


def test_a_reward_model_on_other_weights_is_not_put_on_this_base(folder: Path, tmp_path: Path) -> None:
    run = small_policy(tmp_path, "ppo", *settings(folder, "ppo", "lora")).run
    assert shared_judge(run) is not None  # the same bytes in another folder
    weights = tmp_path / "tiny-llama" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(bytes(whole))
    assert shared_judge(run) is None


@pytest.mark.parametrize(
    ("judge", "policy", "models"),
    [
        ("lora", "lora", "shared"),
        ("lora", "full", "separate"),
        ("full", "full", "separate"),
        ("full", "lora", "separate"),
    ],
)
def test_a_critic_begins_as_the_reward_model(judge: str, policy: str, models: str, folder: Path) -> None:
    more = [*settings(folder, "ppo", judge), f"ppo.models={models}", "ppo.critic_from=reward_model"]
    parts = gather_policy(small_policy(folder, "ppo", *more, method=policy))
    plan = BatchPlan(1, 64)
    rows = unsupervised_rows(ROWS)
    batch = passes_of(rows, range(len(ROWS)), plan)[0]
    with parts.roles.as_critic() as critic, torch.no_grad():
        found = critic.values(batch)[last_tokens(batch, len(ROWS))]
        assert all(parameter.requires_grad for parameter in critic.parameters.values())
    wanted = scores_alone(folder, judge)
    assert [found[list(batch.row_numbers).index(n)].item() for n in range(len(ROWS))] == pytest.approx(wanted, abs=1e-5)
    assert any("lora" in name for name in critic.parameters) == (policy == "lora")
    assert "value_head.weight" in critic.parameters
    assert not any("score" in name for name in critic.parameters)


def test_a_shared_critic_cannot_begin_as_another_model(folder: Path) -> None:
    more = [*settings(folder, "ppo", "full"), "ppo.critic_from=reward_model"]
    with pytest.raises(UserError, match="no adapter on this run's base"):
        gather_policy(small_policy(folder, "ppo", *more))


def test_a_run_whose_critic_began_as_its_judge_resumes(folder: Path) -> None:
    more = [*settings(folder, "ppo", "lora"), "ppo.critic_from=reward_model", "ppo.max_steps=2", "ppo.save_every=1"]
    whole = train(small_policy(folder, "ppo", *more, "name=critic-whole"))

    def gone(record: dict[str, Any]) -> None:
        if record.get("event") == "saved" and record["step"] == 1:
            raise KeyError

    cut = small_policy(folder, "ppo", *more, "name=critic-cut")
    with pytest.raises(KeyError):
        train(cut, watch=gone)
    again = train(cut, resume=RunDir(folder / "runs" / "critic-cut"))
    figures = [
        [(r["reward_mean"], r["critic_loss"]) for r in read_metrics(run.metrics) if r["kind"] == "iteration"]
        for run in (whole, again)
    ]
    assert figures[0] == figures[1]
