"""Each rule between fields: a broken case that trips it and a healthy one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from zhibei.config.effects import RULES, STAGES, fields_without_effect
from zhibei.config.errors import SeveralErrors, UserError
from zhibei.config.read import read_run
from zhibei.config.run import DataSection, LoraSection, ModelSection, RunFile

GOOD = "model: {path: m}\ndata: {sources: [a.json]}\n"

OF_FOUR = ["raft.answers_per_prompt=4", "raft.keep_share=0.375", "raft.global_batch=96"]

# (the field that is objected to, settings that break the rule, settings that keep it); in the order of GENERAL_RULES.
CASES = [
    ("lora.rank", ["lora.rank=8"], ["lora.rank=8", "model.method=lora"]),
    ("lora.alpha", ["model.method=lora", "lora.adapter=x", "lora.alpha=8"], ["model.method=lora", "lora.adapter=x"]),
    ("data.group_by_length", ["data.group_by_length=true"], ["data.group_by_length=true", "data.packing=false"]),
    (
        "data.sources[0].split",
        ["data.sources=[{path: a.json, split: train}]"],
        ["data.sources=[{path: owner/set, split: train}]"],
    ),
    ("model.quantize", ["model.quantize=int8"], ["model.quantize=int8", "model.method=lora"]),
    ("model.attention", ["model.attention=sdpa"], ["model.attention=sdpa", "data.packing=false"]),
    ("model.quantize", ["model.quantize=none", "model.method=qlora"], ["model.method=qlora"]),
    ("model.attention", ["model.attention=varlen", "device=cpu"], ["model.attention=varlen", "device=cuda"]),
    ("data.validation", ["data.validation=1"], ["data.validation=0.5"]),
    ("name", ["name=a/b"], ["name=a-b"]),
    ("data.supervise", ["data.supervise=turns", "stage=dpo"], ["data.supervise=turns"]),
    (
        "dpo.reference",
        ["stage=dpo", "dpo.reference=adapters_off"],
        ["stage=dpo", "dpo.reference=adapters_off", "model.method=lora"],
    ),
    ("ppo.models", ["stage=ppo", "ppo.models=shared"], ["stage=ppo", "ppo.models=shared", "model.method=lora"]),
    (
        "ppo.vllm_memory_share",
        ["stage=ppo", "ppo.vllm_memory_share=0.3"],
        ["stage=ppo", "ppo.vllm_memory_share=0.3", "ppo.engine=vllm"],
    ),
    (
        "raft.vllm_memory_share",
        ["stage=raft", "raft.vllm_memory_share=0.3"],
        ["stage=raft", "raft.vllm_memory_share=0.3", "raft.engine=vllm"],
    ),
    (
        "grpo.vllm_memory_share",
        ["stage=grpo", "grpo.vllm_memory_share=0.3"],
        ["stage=grpo", "grpo.vllm_memory_share=0.3", "grpo.engine=vllm"],
    ),
    ("ppo.kl_horizon", ["stage=ppo", "ppo.kl_horizon=9"], ["stage=ppo", "ppo.kl_horizon=9", "ppo.kl_target=6"]),
    (
        "ppo.ptx_coefficient",
        ["stage=ppo", "ppo.ptx_coefficient=1"],
        ["stage=ppo", "ppo.ptx_coefficient=1", "ppo.ptx_sources=[b.json]"],
    ),
    (
        "grpo.answers_per_prompt",
        ["stage=grpo", "grpo.answers_per_prompt=3"],
        ["stage=grpo", "grpo.answers_per_prompt=3", "grpo.global_batch=9"],
    ),
    (
        "grpo.answers_per_prompt",
        ["stage=grpo", "grpo.answers_per_prompt=1"],
        ["stage=grpo", "grpo.answers_per_prompt=1", "grpo.method=reinforce++"],
    ),
    (
        "ppo.critic_from",
        ["stage=ppo", "ppo.critic_from=reward_model"],
        ["stage=ppo", "ppo.critic_from=reward_model", "ppo.reward_model=judge"],
    ),
    (
        "ppo.missing_terminator_penalty",
        ["stage=ppo", "ppo.missing_terminator_penalty=1", "ppo.truncated=bootstrap"],
        ["stage=ppo", "ppo.missing_terminator_penalty=1"],
    ),
    (
        "raft.keep_share",
        ["stage=raft", *OF_FOUR],
        ["stage=raft", *OF_FOUR, "raft.compare=iteration"],
    ),
    (
        "raft.answers_per_prompt",
        ["stage=raft", "raft.answers_per_prompt=6", "raft.keep_share=0.5"],
        ["stage=raft", "raft.answers_per_prompt=6", "raft.keep_share=0.5", "raft.global_batch=96"],
    ),
    ("data.packing", ["data.packing=false", "stage=ppo"], ["data.packing=false", "stage=dpo"]),
    (
        "lora.dropout",
        ["model.method=lora", "lora.dropout=0.1", "stage=dpo"],
        ["model.method=lora", "lora.dropout=0", "stage=reward"],
    ),
    ("dpo.reference", ["stage=dpo", "dpo.loss=simpo", "dpo.reference=precomputed"], ["stage=dpo", "dpo.loss=simpo"]),
    ("dpo.beta", ["stage=dpo", "dpo.loss=orpo", "dpo.beta=1"], ["stage=dpo", "dpo.loss=ipo", "dpo.beta=1"]),
    (
        "dpo.label_smoothing",
        ["stage=dpo", "dpo.loss=ipo", "dpo.label_smoothing=0.1"],
        ["stage=dpo", "dpo.label_smoothing=0.1"],
    ),
    ("dpo.gamma", ["stage=dpo", "dpo.gamma=2"], ["stage=dpo", "dpo.loss=simpo", "dpo.gamma=2"]),
    ("dpo.odds_weight", ["stage=dpo", "dpo.odds_weight=1"], ["stage=dpo", "dpo.loss=orpo", "dpo.odds_weight=1"]),
    ("hand_over", ["hand_over=[hf,meta:2,hf]"], ["hand_over=[hf,meta:2,gguf:Q8_0]"]),
    ("hand_over", ["hand_over=[merged]"], ["hand_over=[merged]", "model.method=lora"]),
    ("hand_over", ["hand_over=[gguf:Q8_0]", "stage=reward"], ["hand_over=[]", "stage=reward"]),
    ("hand_over", ["hand_over=[gguf:IQ3_M]", "stage=grpo"], ["hand_over=[gguf:IQ4_XS]", "stage=grpo"]),
    ("dpo.bad_weight", ["stage=dpo", "dpo.bad_weight=2"], ["stage=dpo", "dpo.loss=kto", "dpo.bad_weight=2"]),
]

# The same for the section of any stage, here written as sft; in the order of `training_rules`.
TRAINING_CASES = [
    ("sft.epochs", ["sft.epochs=1", "sft.max_steps=9"], ["sft.max_steps=9"]),
    ("sft.warmup_ratio", ["sft.warmup_ratio=0.1", "sft.warmup_steps=9"], ["sft.warmup_ratio=0.1"]),
    ("sft.decay_ratio", ["sft.decay_ratio=0.1"], ["sft.decay_ratio=0.1", "sft.schedule=wsd"]),
    ("sft.min_lr_ratio", ["sft.min_lr_ratio=0.1", "sft.schedule=constant"], ["sft.min_lr_ratio=0.1"]),
    ("sft.beta2", ["sft.beta2=0.95", "sft.optimizer=adafactor"], ["sft.optimizer=adafactor"]),
    ("sft.keep_best", ["sft.keep_best=true", "data.validation=0"], ["sft.keep_best=true"]),
    (
        "sft.early_stop_patience",
        ["sft.early_stop_patience=3", "sft.evaluate_every=0"],
        ["sft.early_stop_patience=3", "sft.evaluate_every=5"],
    ),
]

SAMPLING_CASE = ("sft.sample_prompts", ["sft.sample_prompts=[hi]", "sft.sample_tokens=0"], ["sft.sample_prompts=[hi]"])


def cases_of(stage: str) -> list[tuple[str, list[str], list[str]]]:
    """First setting a section of another stage, then the rules inside of the section."""
    another = "dpo" if stage == "ppo" else "ppo"
    cases = [(f"{stage}.epochs", [f"{stage}.epochs=1", f"stage={another}"], [f"{stage}.epochs=1", f"stage={stage}"])]
    sampling = [] if stage == "reward" else [SAMPLING_CASE]
    return cases + [of_stage(case, stage) for case in [*sampling, *TRAINING_CASES]]


def of_stage(case: tuple[str, list[str], list[str]], stage: str) -> tuple[str, list[str], list[str]]:
    """A case written for sft as it is in the section of another stage."""
    field, *settings = (text.replace("sft.", f"{stage}.") for text in (case[0], *case[1], "|", *case[2]))
    middle = settings.index("|")
    return field, [*settings[:middle], f"stage={stage}"], [*settings[middle + 1 :], f"stage={stage}"]


ALL_CASES = [
    *CASES,
    *(case for stage in STAGES for case in cases_of(stage)),
]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_every_rule_has_a_case() -> None:
    assert len(ALL_CASES) == len(RULES)


@pytest.mark.parametrize("number", range(len(ALL_CASES)))
def test_rule_bites_and_lets_the_healthy_pass(number: int, run_file: Path) -> None:
    (field, broken, healthy), rule = ALL_CASES[number], RULES[number]
    with pytest.raises(UserError) as caught:
        read_run(run_file, broken)
    assert not isinstance(caught.value, SeveralErrors)
    assert caught.value.what.startswith(f"{field} ")
    assert rule.why in caught.value.what
    assert caught.value.fix == rule.fix
    assert caught.value.where == f"command line: {field}"
    read_run(run_file, healthy)


def test_a_fault_in_the_file_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "sft:\n  decay_ratio: 0.1\n  max_steps: 3\n  epochs: 2\n")
    with pytest.raises(SeveralErrors) as caught:
        read_run(path)
    assert [error.where for error in caught.value.errors] == [f"{path}:6:3", f"{path}:4:3"]


def test_a_recipes_setting_gives_way_to_the_users(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: alpaca-lora-7b\nmodel: {method: full}\n")
    resolved = read_run(path)
    assert resolved.run.lora == LoraSection()
    assert resolved.run.model.quantize == "none"
    assert resolved.origins["lora.rank"] == "default"
    assert (
        "lora.rank (recipe alpaca-lora-7b) has no effect any more: with model.method: full there are no adapters"
        in resolved.notes
    )
    assert read_run("alpaca-lora-7b", ["sft.max_steps=5"]).run.sft.epochs == 3


def test_the_command_line_beats_the_file_but_not_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "sft: {epochs: 5}\n")
    resolved = read_run(path, ["sft.max_steps=7"])
    assert resolved.notes == (
        "sft.epochs (run.yaml:3) has no effect any more: sft.max_steps decides how long the run is",
    )
    assert resolved.origins["sft.epochs"] == "default"
    path.write_text(GOOD + "sft: {max_steps: 7}\n")
    with pytest.raises(UserError, match=r"sft\.epochs has no effect"):
        read_run(path, ["sft.epochs=5"])


def test_a_users_own_idle_setting_over_a_recipe_is_a_fault() -> None:
    with pytest.raises(UserError, match=r"sft\.warmup_ratio has no effect"):
        read_run("alpaca-lora-7b", ["sft.warmup_ratio=0.1"])
    read_run("alpaca-lora-7b", ["sft.warmup_ratio=0.1", "sft.warmup_steps=null"])


def test_a_conflict_with_a_recipe_is_a_fault_of_the_user() -> None:
    with pytest.raises(UserError, match=r"sdpa and eager cannot keep packed rows apart"):
        read_run("alpaca-7b", ["model.attention=eager"])


def test_run_files_made_in_python_are_held_to_the_same_rules() -> None:
    model, data = ModelSection(path="m"), DataSection(sources=["a.json"])
    RunFile(name="a", model=model, data=data)
    with pytest.raises(ValidationError, match="there are no adapters"):
        RunFile(name="a", model=model, data=data, lora=LoraSection(rank=8))


def test_idle_fields_are_listed_set_or_not(run_file: Path) -> None:
    idle = fields_without_effect(read_run(run_file).run)
    assert ("sft", "decay_ratio") in idle
    assert ("lora", "rank") in idle
    assert ("sft", "epochs") not in idle


@pytest.mark.parametrize("stage", STAGES)
def test_fields_of_a_section_without_effect_are_one_fault_that_names_them(stage: str, run_file: Path) -> None:
    another = "dpo" if stage == "sft" else "sft"
    with pytest.raises(UserError) as caught:
        read_run(run_file, [f"stage={stage}", f"{another}.epochs=1", f"{another}.weight_decay=0.1"])
    assert caught.value.what == (
        f"{another}.epochs has no effect (nor has {another}.weight_decay): "
        f"section {another} is read by stage: {another} only, and this run is of another stage"
    )
    assert caught.value.fix == f"set stage: {another}, or remove section {another}"


def test_a_recipes_section_gives_way_to_another_stage() -> None:
    resolved = read_run("alpaca-7b", ["stage=reward", "reward.epochs=1"])
    assert resolved.run.sft.global_batch == RunFile.model_fields["sft"].default.global_batch
    assert any(
        note.startswith("sft.learning_rate (recipe alpaca-7b) has no effect any more") for note in resolved.notes
    )
