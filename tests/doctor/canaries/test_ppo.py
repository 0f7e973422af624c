"""Canaries of area ppo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.doctor.canaries import Canaries
from tests.doctor.healthy import CONFIG, broken, healthy
from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.model import AdapterFacts, ModelFacts
from zhibei.doctor.pitfall import CATALOGUE
from zhibei.doctor.pitfalls import load_catalogue

load_catalogue()

HEAD = {"score.weight": ("F16", (1, 4096))}
PPO = ("stage=ppo", "model.method=lora", "ppo.reward_model=/models/reward")


def reward(**changes: object) -> ModelFacts:
    """The reward model of a sound run: the policy's family, with a head."""
    model = healthy().model
    assert model is not None
    sound = replace(model, path="/models/reward", tensors={**model.tensors, **HEAD})
    return replace(sound, **changes)  # type: ignore[arg-type]


def ppo(*overrides: str, **parts: object) -> Facts:
    return healthy(*PPO, *overrides, **{"reward": reward(), "rows": None, **parts})


def without_head(*names: str) -> ModelFacts:
    kept = {name: entry for name, entry in reward().tensors.items() if name not in HEAD}
    return reward(tensors={**kept, **dict.fromkeys(names, ("F32", (1, 4096)))})


def adapter(dropout: float) -> AdapterFacts:
    return AdapterFacts(Path("/models/adapter"), config={"r": 8, "lora_dropout": dropout})


CANARIES: Canaries = {
    "dropout-on-in-policy-logprobs": (
        [
            ppo("lora.dropout=0.05"),
            ppo("lora.adapter=/models/adapter", adapter=adapter(0.05)),
            broken(ppo(), "model.config", {**CONFIG, "attention_dropout": 0.1}),
            broken(ppo(), "model.config", {**CONFIG, "model_type": "gpt2", "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
            broken(healthy("stage=dpo", rows=None), "model.config", {**CONFIG, "hidden_dropout": 0.1}),
        ],
        [
            ppo(),
            ppo("lora.adapter=/models/adapter", adapter=adapter(0.0)),
            healthy("model.method=lora", "lora.dropout=0.05"),  # supervised training may use dropout
            broken(ppo(), "model.config", {**CONFIG, "attention_dropout": 0.0, "classifier_dropout": 0.1}),
        ],
    ),
    "ppo-negative-kl-generation-kwargs": (
        [
            ppo("ppo.top_k=50"),
            ppo("ppo.top_p=0.9"),
            ppo("ppo.top_k=50", "ppo.top_p=0.95"),
            healthy("stage=grpo", "grpo.top_k=50", rows=None),
        ],
        [ppo(), ppo("ppo.temperature=0.7"), healthy("stage=dpo", rows=None)],
    ),
    "value-head-not-loaded": (
        [ppo(reward=without_head()), ppo(reward=without_head("model.norm.weight"))],
        [
            ppo(),
            ppo(reward=without_head("v_head.summary.weight")),
            ppo(reward=without_head("base_model.model.score.modules_to_save.default.weight")),
            ppo(reward=reward(tensors={})),  # a hub id that is not here yet: nothing is known
            ppo(reward=None),
        ],
    ),
    "reward-model-of-another-vocabulary": (
        [ppo(reward=reward(embedding_rows=32001)), ppo(reward=reward(embedding_rows=151936))],
        [ppo(), ppo(reward=reward(embedding_rows=None)), healthy()],
    ),
    "rollouts-longer-than-the-model": (
        [
            ppo("data.max_tokens=4096"),
            ppo("ppo.max_new_tokens=3500"),
            healthy("stage=grpo", "grpo.max_new_tokens=3500", rows=None),
            broken(ppo(), "model.config", {**CONFIG, "max_position_embeddings": 1024}),
        ],
        [
            ppo(),
            ppo("data.max_tokens=3968"),
            ppo("data.max_tokens=4096", "model.rope_scaling_factor=2"),
            healthy("data.max_tokens=4096"),
        ],
    ),
}


def test_one_finding_names_every_dropout_of_the_config() -> None:
    find = CATALOGUE["dropout-on-in-policy-logprobs"].find
    assert find is not None
    facts = broken(ppo(), "model.config", {**CONFIG, "resid_pdrop": 0.1, "attn_pdrop": 0.2})
    (finding,) = find(facts)
    assert "resid_pdrop 0.1, attn_pdrop 0.2" in finding.what
    assert finding.where.endswith("config.json, field resid_pdrop")


def test_the_changes_mend_what_was_found() -> None:
    for name, overrides in {
        "ppo-negative-kl-generation-kwargs": ("ppo.top_k=50", "ppo.top_p=0.9"),
        "rollouts-longer-than-the-model": ("data.max_tokens=4096",),
        "dropout-on-in-policy-logprobs": ("lora.dropout=0.1",),
    }.items():
        find = CATALOGUE[name].find
        assert find is not None
        changes = {key: value for finding in find(ppo(*overrides)) for key, value in finding.changes.items()}
        assert changes
        assert list(find(ppo(*overrides, *(f"{key}={value}" for key, value in changes.items())))) == []
