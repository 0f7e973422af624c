"""The rules for generation_config.json say what transformers' own strict validation says."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from zhibei.doctor.facts.generation_rules import generation_fault

SOUND: list[dict[str, Any]] = [
    {"bos_token_id": 1, "eos_token_id": 2},
    {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0, "max_length": 4096},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
    {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50},
    {"num_beams": 4, "length_penalty": 0.8, "early_stopping": "never", "num_return_sequences": 3},
    {"cache_implementation": "static"},
    {"do_sample": True, "num_return_sequences": 4},
    {"return_dict_in_generate": True, "output_scores": True},
    {"suppress_tokens": [1, 2], "forced_eos_token_id": [2, 3]},
]
BROKEN: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_p": 0.6},
    {"do_sample": False, "top_p": 0.9},
    {"do_sample": None, "min_p": 0.1},
    {"typical_p": 0.9},
    {"top_k": 20},
    {"epsilon_cutoff": 0.1},
    {"eta_cutoff": 0.1},
    {"early_stopping": True},
    {"early_stopping": "sometimes"},
    {"length_penalty": 2.0, "num_beams": 1},
    {"num_return_sequences": 2},
    {"num_beams": 2, "num_return_sequences": 3},
    {"max_new_tokens": 0},
    {"pad_token_id": -1},
    {"assistant_ensemble_weight": 1.0},
    {"cache_implementation": "magic"},
    {"use_cache": False, "cache_implementation": "static"},
    {"output_scores": True},
    {"forced_eos_token_id": 2, "suppress_tokens": [2, 5]},
    {"streamer": 1},
]


def objection_of_transformers(config: dict[str, Any]) -> str:
    try:
        GenerationConfig(**config).validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("config", [*SOUND, *BROKEN])
def test_the_verdict_is_that_of_transformers(config: dict[str, Any]) -> None:
    assert bool(generation_fault(config)) == bool(objection_of_transformers(config)) == (config in BROKEN)


@pytest.mark.parametrize("config", BROKEN)
def test_the_wrong_field_is_named(config: dict[str, Any]) -> None:
    assert any(name in generation_fault(config) for name in config)


def test_values_of_another_type_are_an_objection_not_a_crash() -> None:
    assert "wrong type" in generation_fault({"max_new_tokens": "many"})
