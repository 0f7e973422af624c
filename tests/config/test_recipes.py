"""The shipped recipes: how many, that each reads strictly, names a real template, and sources every number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zhibei
from zhibei.config.errors import UserError
from zhibei.config.read import COMPAT, PIPELINE, read_run, recipe_names, recipe_text, shipped, shipped_text

RECIPES = sorted(Path(zhibei.__file__).parent.joinpath("recipes").rglob("*.yaml"))
NUMBER = re.compile(r":\s*[-+]?[0-9.]+(e[-+]?[0-9]+)?\s*(#.*)?$")


def test_there_are_exactly_eighteen_and_all_are_offered() -> None:
    assert len(recipe_names()) == 18
    others = [f"{name}{kind}" for kind in (COMPAT, PIPELINE) for name in shipped(kind)]
    assert others == ["coati-2023.compat", "coati-7b.pipeline"]
    assert sorted(path.stem for path in RECIPES) == sorted([*recipe_names(), *others])


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_reads_without_a_note_and_names_a_known_template(name: str) -> None:
    resolved = read_run(name)
    assert resolved.notes == ()
    assert resolved.run.name == name
    from zhibei.text.families import TEMPLATES

    assert resolved.run.data.template in TEMPLATES


@pytest.mark.parametrize("name", recipe_names())
def test_every_number_has_its_source(name: str) -> None:
    numbers = [line for line in recipe_text(name).splitlines() if NUMBER.search(line) and not line.startswith("#")]
    assert len(numbers) >= 8
    assert [line for line in numbers if not re.search(r"#\s*\S+", line)] == []


def test_the_check_of_sources_bites() -> None:
    assert NUMBER.search("  epochs: 3")
    assert NUMBER.search("  learning_rate: 2e-5  # README")
    assert not NUMBER.search("  method: full")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("alpaca-7b", {"sft.learning_rate": 2e-5, "sft.epochs": 3, "sft.global_batch": 128, "data.max_tokens": 512}),
        ("alpaca-13b", {"sft.learning_rate": 1e-5, "sft.epochs": 5, "sft.global_batch": 128}),
        ("alpaca-7b-v100", {"model.precision": "fp16", "sft.learning_rate": 2e-5}),
        (
            "alpaca-lora-7b",
            {
                "sft.learning_rate": 1e-4,
                "lora.rank": 8,
                "lora.alpha": 16,
                "lora.targets": ["q_proj", "v_proj"],
                "data.supervise": "everything",
                "data.validation": 2000,
            },
        ),
        ("alpaca-lora-7b-official", {"sft.learning_rate": 3e-4, "sft.epochs": 10, "lora.rank": 16}),
        ("vicuna-7b", {"data.max_tokens": 2048, "data.template": "vicuna_v1.1", "sft.learning_rate": 2e-5}),
        ("vicuna-13b", {"data.max_tokens": 2048, "sft.global_batch": 128}),
        ("coati-7b-rm", {"reward.learning_rate": 5e-6, "reward.epochs": 1, "reward.loss": "log_exp"}),
        ("dpo-7b-lora", {"dpo.beta": 0.01, "dpo.learning_rate": 5e-6, "lora.rank": 16, "data.max_tokens": 1024}),
        ("coati-7b-sft", {"sft.learning_rate": 2e-5, "sft.global_batch": 128, "data.max_tokens": 512}),
        ("coati-7b-ppo", {"ppo.kl_coefficient": 0.1, "ppo.value_clip": 0.4, "ppo.critic_from": "reward_model"}),
        ("lmflow-raft", {"raft.keep_share": 0.125, "raft.compare": "prompt", "raft.learning_rate": 2e-5}),
        ("dpo-7b-qlora", {"dpo.beta": 0.01, "model.quantize": "nf4", "lora.rank": 16}),
        ("grpo-gsm8k", {"grpo.answers_per_prompt": 5, "grpo.reward": "number", "grpo.learning_rate": 3e-6}),
        ("vicuna-7b-qlora", {"model.quantize": "nf4", "lora.rank": 8, "sft.learning_rate": 2e-5}),
    ],
)
def test_published_numbers(name: str, values: dict[str, object]) -> None:
    from zhibei.config.resolve import value_of

    run = read_run(name).run
    assert {key: value_of(run, key) for key in values} == values


COATI = ["coati-7b-sft", "coati-7b-rm", "coati-7b-ppo", "coati-7b-sft-lora", "coati-7b-rm-lora", "coati-7b-ppo-lora"]


@pytest.mark.parametrize("name", COATI)
def test_a_compat_set_lies_above_recipes_and_below_what_a_person_says(name: str) -> None:
    resolved = read_run(name, ["compat=coati-2023"])
    stage = resolved.run.stage
    assert resolved.notes == ()
    assert resolved.origins[f"{stage}.learning_rate"] == "compat coati-2023"
    assert resolved.origins["model.path"] == f"recipe {name}"
    assert resolved.run.model.precision == "fp16"
    mine = read_run(name, ["compat=coati-2023", f"{stage}.learning_rate=1e-3"])
    assert mine.origins[f"{stage}.learning_rate"] == "command line"
    assert (resolved.run.lora.rank == 4) == (resolved.run.model.method == "lora")


def test_what_coati_did_otherwise_is_laid_over_ppo() -> None:
    from zhibei.config.resolve import render_resolved

    resolved = read_run("coati-7b-ppo", ["compat=coati-2023"])
    section = resolved.run.ppo
    assert (section.ptx_coefficient, section.gae_lambda, section.kl_estimator) == (9.0, 1.0, "k3")
    assert (section.inner_epochs, section.top_k, section.max_new_tokens) == (5, 50, 32)
    assert "ptx_coefficient: 9.0  # compat coati-2023" in render_resolved(resolved)


def test_a_compat_set_that_is_not_there_or_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="says nothing of stage dpo"):
        read_run("dpo-7b-lora", ["compat=coati-2023"])
    file = tmp_path / "run.yaml"
    file.write_text("recipe: coati-7b-sft\ncompat: coati-2024\n")
    with pytest.raises(UserError, match="no compat set 'coati-2024'") as caught:
        read_run(file)
    assert caught.value.where == f"{file}:2:9"
    assert "coati-2023" in caught.value.fix
    file.write_text("recipe: coati-7b-sft\ncompat: coati-2023\nsft: {learning_rate: 3e-5}\n")
    found = read_run(file)
    assert found.run.training.learning_rate == 3e-5
    assert found.run.model.precision == "fp16"


def test_every_number_of_a_compat_set_has_its_source() -> None:
    text = shipped_text("coati-2023", COMPAT)
    numbers = [line for line in text.splitlines() if NUMBER.search(line) and not line.startswith("#")]
    assert len(numbers) >= 15
    assert [line for line in numbers if not re.search(r"#\s*\S+", line)] == []


def test_the_shipped_pipeline_reads_and_takes_the_compat_set() -> None:
    from zhibei.pipeline.file import is_pipeline, read_pipeline

    assert is_pipeline("coati-7b")
    plain, coati = read_pipeline("coati-7b"), read_pipeline("coati-7b", ["compat=coati-2023"])
    assert [stage.kind for stage in plain.stages] == ["sft", "reward", "ppo", "evaluate"]
    rates = [
        [stage.resolved({}, runs=Path("x")).run.training.learning_rate for stage in one.stages[:3]]
        for one in (plain, coati)
    ]
    assert rates == [[2e-5, 5e-6, 1e-6], [2e-5, 5e-6, 1e-7]]
