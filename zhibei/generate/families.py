"""Which families' attention takes a mask made here, and in what form. Knows names, no modules.

A family in neither table is answered one prompt at a time with transformers' own cache, which is right for every
family and slower. `tests/generate/test_roads.py` holds every name to that.
"""

from __future__ import annotations

from typing import Any

ONE_MASK = (
    "llama", "mistral", "mixtral", "gemma", "phi", "phi3", "qwen3_moe", "olmo", "olmo2", "granite", "starcoder2",
    "stablelm", "cohere", "glm", "glm4", "helium", "nemotron",
)  # fmt: skip
"""Every layer gets the same mask, with a sliding window where the config names one."""

MASK_BY_LAYER = ("qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3_text", "olmo3", "smollm3", "cohere2", "exaone4")
"""A mask for each kind of layer that `layer_types` names."""

_KINDS = {"full_attention", "sliding_attention"}
# Positions scaled by the longest row of a batch: a row would depend on its neighbours.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
_MASKED_ATTENTION = ("sdpa", "eager")


def mask_kinds(config: Any) -> tuple[str, ...] | None:
    """The kinds of mask that a step of this model needs ("full_attention", "sliding_attention"); one kind for all
    layers, or one by layer. None for a model that cannot be given masks."""
    family = config.model_type
    if config._attn_implementation not in _MASKED_ATTENTION or _scales_by_length(config):
        return None
    if family in ONE_MASK:
        return ("sliding_attention",) if getattr(config, "sliding_window", None) else ("full_attention",)
    if family in MASK_BY_LAYER and set(config.layer_types) <= _KINDS:
        return tuple(sorted(set(config.layer_types)))
    return None


def takes_mask_by_layer(config: Any) -> bool:
    """Whether masks are given as a mapping from kind to mask."""
    return config.model_type in MASK_BY_LAYER


def _scales_by_length(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    found = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(one.get("rope_type") in _ROPE_BY_LENGTH for one in found)
