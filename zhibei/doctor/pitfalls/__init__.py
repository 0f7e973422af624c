"""The catalogue, one file per area. Knows which areas there are."""

from __future__ import annotations

from importlib import import_module

from zhibei.doctor.pitfall import CATALOGUE, Pitfall

AREAS = (
    "environment",
    "hardware",
    "precision",
    "memory",
    "data",
    "tokenizer",
    "template",
    "labels",
    "config",
    "lora",
    "quantization",
    "distributed",
    "checkpoint",
    "resume",
    "reward_model",
    "preference",
    "ppo",
    "generation",
    "merge_export",
    "gguf",
    "serving",
    "evaluation",
)


def load_catalogue() -> dict[str, Pitfall]:
    """Every pitfall by id, in the order of AREAS and of their files."""
    for area in AREAS:
        import_module(f"zhibei.doctor.pitfalls.{area}")
    return CATALOGUE
