"""The shipped recipes: how many, that each reads strictly, names a real template, and sources every number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import zhibei
from zhibei.config.read import read_run, recipe_names, recipe_text

RECIPES = sorted(Path(zhibei.__file__).parent.joinpath("recipes").rglob("*.yaml"))
NUMBER = re.compile(r":\s*[-+]?[0-9.]+(e[-+]?[0-9]+)?\s*(#.*)?$")


def test_there_are_exactly_ten_and_all_are_offered() -> None:
    assert len(RECIPES) == 10
    assert sorted(path.stem for path in RECIPES) == recipe_names()


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
        ("vicuna-7b-qlora", {"model.quantize": "nf4", "lora.rank": 8, "sft.learning_rate": 2e-5}),
    ],
)
def test_published_numbers(name: str, values: dict[str, object]) -> None:
    from zhibei.config.resolve import value_of

    run = read_run(name).run
    assert {key: value_of(run, key) for key in values} == values
