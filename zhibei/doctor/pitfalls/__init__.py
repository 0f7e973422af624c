"""The catalogue, one file per area, or two where one would be too long. Knows which areas there are."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from zhibei.doctor.pitfall import CATALOGUE, Pitfall

AREAS = (
    "environment",
    "hardware",
    "precision",
    "memory",
    "data",
    "model",
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
    "messages",
)


def load_catalogue() -> dict[str, Pitfall]:
    """Every pitfall by id, in the order of AREAS and of their files (`labels.py`, then any `labels_*.py`)."""
    files = sorted(module.name for module in iter_modules(__path__))
    for area in AREAS:
        for name in files:
            if name == area or name.startswith(f"{area}_"):
                import_module(f"zhibei.doctor.pitfalls.{name}")
    return CATALOGUE
