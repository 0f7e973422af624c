"""What llama.cpp calls the sizes and tensors of each family of models, and how it wants them. Knows no files.

Sources: the key names of ggml/docs/gguf.md, the tensor names of the package gguf, transformers' modelling files. Tests
hold every family here to transformers' logits (tests/export/test_gguf_families.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zhibei.config.errors import UserError

Config = Mapping[str, Any]
Transform = Callable[[str, np.ndarray, Config], np.ndarray]
PITFALL = "gguf-arch-unsupported"


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp. `refusal` says what of a config it cannot express, or ""."""

    name: str
    transform: Transform = lambda name, values, config: values
    extra: Callable[[Config], dict[str, Any]] = lambda config: {}
    refusal: Callable[[Config], str] = lambda config: ""
    notes: Callable[[Config], list[str]] = lambda config: []
    adds_space: bool | None = None
    """Whether sentencepiece vocabularies put a space in front of a text; None leaves it to the tokenizer."""


def family_of(config: Config, *, where: str) -> Family:
    """The family of a model. Raises UserError when llama.cpp's form of it is not written here."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"models of type {kind!r} cannot be written as GGUF here",
            expected=f"one of {', '.join(FAMILIES)}",
            fix="convert the merged Hugging Face folder with llama.cpp's own convert_hf_to_gguf.py, if it knows the "
            "type, or serve the folder itself: zhibei serve",
            where=where,
            pitfall=PITFALL,
        )
    family = FAMILIES[kind]
    if why := _quantised(config) or _rope_refusal(config) or family.refusal(config):
        raise UserError(
            f"llama.cpp cannot express this {kind} model: {why}",
            expected="a model in 16 or 32 bits whose parts llama.cpp has",
            fix="serve the Hugging Face folder itself (zhibei serve), or export from the unquantised model",
            where=where,
            pitfall=PITFALL,
        )
    return family


def metadata(family: Family, config: Config) -> dict[str, Any]:
    """The sizes of a model under the names that llama.cpp reads; whole numbers, fractions and texts."""
    heads = int(config["num_attention_heads"])
    head_tokens = head_width(config)
    values: dict[str, Any] = {
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "vocab_size": int(config["vocab_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": head_tokens,
        "attention.value_length": head_tokens,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": int(head_tokens * float(rope(config).get("partial_rotary_factor", 1.0))),
        "rope.freq_base": float(rope(config).get("rope_theta", 10000.0)),
        **_rope_scaling(config),
    }
    values.update(family.extra(config))
    return {f"{family.name}.{key}": value for key, value in values.items() if value is not None}


def head_width(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope(config: Config) -> dict[str, Any]:
    """Rotary settings of a config of transformers 4 or 5, under the names of 5."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention") or found)
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    found.setdefault("rope_type", "default")
    if "rope_theta" in config:
        found.setdefault("rope_theta", config["rope_theta"])
    if "partial_rotary_factor" in config:
        found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return found


def extra_tensors(config: Config) -> dict[str, np.ndarray]:
    """Tensors that no Hugging Face folder holds: what each rotary frequency is divided by."""
    settings = rope(config)
    if settings["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(config)}
    if settings["rope_type"] in ("longrope", "su"):
        return {
            f"rope_factors_{length}.weight": np.asarray(settings[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    return {}


def llama3_factors(config: Config) -> np.ndarray:
    """What LLaMA 3.1 divides each frequency by: 1 for fast ones, `factor` for slow ones, between them in between."""
    settings = rope(config)
    width, factor = head_width(config), float(settings["factor"])
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    old_context = float(settings["original_max_position_embeddings"])
    frequencies = float(settings["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    turns = old_context * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def _rope_scaling(config: Config) -> dict[str, Any]:
    settings = rope(config)
    return _SCALINGS[settings["rope_type"]](settings, config)


def _longrope(settings: Config, config: Config) -> dict[str, Any]:
    """arXiv:2402.13753: attention is multiplied by sqrt(1 + ln(scale) / ln(original context))."""
    original = int(settings.get("original_max_position_embeddings") or config["original_max_position_embeddings"])
    scale = config["max_position_embeddings"] / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(settings.get("attention_factor") or factor),
    }


def _yarn(settings: Config, config: Config) -> dict[str, Any]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(settings["factor"]),
        "rope.scaling.original_context_length": int(
            settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
        ),
    }


_SCALINGS: dict[str, Callable[[Config, Config], dict[str, Any]]] = {
    "default": lambda settings, config: {},
    "llama3": lambda settings, config: {},
    "linear": lambda settings, config: {
        "rope.scaling.type": "linear",
        "rope.scaling.factor": float(settings["factor"]),
    },
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}


def _rope_refusal(config: Config) -> str:
    kind = rope(config)["rope_type"]
    return "" if kind in _SCALINGS else f"its rope scaling {kind!r} (llama.cpp has {', '.join(_SCALINGS)})"


def _quantised(config: Config) -> str:
    return "its weights are quantised already" if config.get("quantization_config") else ""


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in the order that llama.cpp rotates: neighbours in pairs, as Meta stored them.

    transformers keeps the first halves of all pairs of a head before the second halves.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _llama_transform(name: str, values: np.ndarray, config: Config) -> np.ndarray:
    heads = int(config["num_attention_heads"])
    for part, count in (("q_proj", heads), ("k_proj", int(config.get("num_key_value_heads") or heads))):
        if f".{part}." in name:
            return interleaved(values, count)
    return values


def _gemma_transform(name: str, values: np.ndarray, config: Config) -> np.ndarray:
    """Gemma multiplies by 1 + weight, llama.cpp by the weight."""
    return values + 1 if name.endswith("norm.weight") else values


def _window_note(config: Config) -> list[str]:
    window = config.get("sliding_window")
    if not window or window >= config["max_position_embeddings"]:
        return []
    return [f"beyond {window} tokens llama.cpp attends to everything, and the model to its last {window} tokens only"]


def _longrope_note(config: Config) -> list[str]:
    if rope(config)["rope_type"] not in ("longrope", "su"):
        return []
    original = _longrope(rope(config), config)["rope.scaling.original_context_length"]
    return [
        f"llama.cpp chooses the rotary factors by the context it opens: up to {original} tokens the short ones, "
        "else the long ones, also for short texts; transformers chooses by the length of the text"
    ]


def _used_window(config: Config) -> str:
    return "it uses a sliding window (use_sliding_window)" if config.get("use_sliding_window") else ""


def _soft_caps(config: Config) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": config.get("attn_logit_softcapping")}
    caps["final_logit_softcapping"] = config.get("final_logit_softcapping")
    return {**caps, "attention.sliding_window": config.get("sliding_window")}


def _gemma3_extra(config: Config) -> dict[str, Any]:
    return {"attention.sliding_window": config.get("sliding_window"), **_gemma3_local(config)}


def _gemma3_local(config: Config) -> dict[str, Any]:
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = local.get("rope_theta") or config.get("rope_local_base_freq")
    return {"rope.freq_base_swa": float(theta)} if theta else {}


def _gemma3_refusal(config: Config) -> str:
    """llama.cpp knows one pattern: every sixth layer attends to everything."""
    kinds = config.get("layer_types")
    expected = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(len(kinds or ()))]
    if kinds and list(kinds) != expected:
        return "its layers with full attention are not every sixth one"
    return "it caps attention scores (attn_logit_softcapping)" if config.get("attn_logit_softcapping") else ""


def _gemma2_refusal(config: Config) -> str:
    scalar, width = config.get("query_pre_attn_scalar"), head_width(config)
    layers_27b = config["num_hidden_layers"] == 46
    wanted = config["hidden_size"] // config["num_attention_heads"] if layers_27b else width
    if scalar and scalar != wanted:
        return f"its queries are scaled by {scalar}, and llama.cpp scales them by {wanted}"
    kinds = config.get("layer_types")
    expected = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(len(kinds or ()))]
    return "its layers do not alternate between window and full attention" if kinds and list(kinds) != expected else ""


def _gemma3_scaled(config: Config) -> str:
    scalar, width = config.get("query_pre_attn_scalar"), head_width(config)
    wanted = config["hidden_size"] // config["num_attention_heads"] if config["num_hidden_layers"] == 62 else width
    if scalar and scalar != wanted:
        return f"its queries are scaled by {scalar}, and llama.cpp scales them by {wanted}"
    return _gemma3_refusal(config)


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", transform=_llama_transform),
    "mistral": Family("llama", transform=_llama_transform, notes=_window_note),
    "qwen2": Family("qwen2", refusal=_used_window),
    "qwen3": Family("qwen3", refusal=_used_window),
    "gemma": Family("gemma", transform=_gemma_transform, adds_space=False),
    "gemma2": Family("gemma2", transform=_gemma_transform, extra=_soft_caps, refusal=_gemma2_refusal, adds_space=False),
    "gemma3_text": Family(
        "gemma3", transform=_gemma_transform, extra=_gemma3_extra, refusal=_gemma3_scaled, adds_space=False
    ),
    "phi3": Family(
        "phi3",
        extra=lambda config: {"attention.sliding_window": config.get("sliding_window") or 0},
        notes=_longrope_note,
    ),
}
"""By `model_type` of config.json."""
