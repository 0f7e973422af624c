"""The decoder families whose sizes follow from config.json alone. Knows configs, not memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zhibei.plan.family_tensors import (
    FOUR_NORMS,
    TWO_NORMS,
    Config,
    Tensors,
    baichuan_tensors,
    bloom_outside_tensors,
    bloom_tensors,
    cohere_tensors,
    falcon_tensors,
    glm_tensors,
    gpt2_outside_tensors,
    gpt2_tensors,
    gpt_bigcode_tensors,
    gpt_neox_tensors,
    gptj_tensors,
    llama_layer,
    mixtral_tensors,
    olmo2_tensors,
    olmo_outside_tensors,
    olmo_tensors,
    olmoe_tensors,
    opt_outside_tensors,
    opt_tensors,
    outside,
    phi3_tensors,
    phi_tensors,
    qwen2_moe_tensors,
    qwen3_moe_tensors,
    stablelm_tensors,
    starcoder2_tensors,
)


@dataclass(frozen=True, slots=True)
class Family:
    """`outside` gives the tensors beside the layers (without a head that is tied), `layer` those of layer number n.

    `prefix` is the dotted name of the list of layers. `defaults` are what transformers takes for absent fields.
    """

    prefix: str
    outside: Callable[[Config], Tensors]
    layer: Callable[[Config, int], Tensors]
    defaults: Mapping[str, Any]
    is_gated: bool = True
    ties_by_default: bool = False


def _like_llama(**options: Any) -> Family:
    defaults = options.pop("defaults", {})
    ties = options.pop("ties_by_default", False)
    return Family("model.layers", outside(), llama_layer(**options), defaults, ties_by_default=ties)


FAMILIES: dict[str, Family] = {
    "llama": _like_llama(),
    "mistral": _like_llama(qkv_bias=False, out_bias=False, mlp_bias=False, defaults={"num_key_value_heads": 8}),
    "qwen2": _like_llama(qkv_bias=True, out_bias=False, mlp_bias=False),
    "qwen3": _like_llama(mlp_bias=False, head_norms=True, defaults={"head_dim": 128}),
    "gemma": _like_llama(mlp_bias=False, defaults={"head_dim": 256}, ties_by_default=True),
    "gemma2": _like_llama(
        mlp_bias=False,
        norms=FOUR_NORMS,
        defaults={"head_dim": 256, "attn_logit_softcapping": 50.0},
        ties_by_default=True,
    ),
    "gemma3_text": _like_llama(
        mlp_bias=False, head_norms=True, norms=FOUR_NORMS, defaults={"head_dim": 256}, ties_by_default=True
    ),
    "granite": _like_llama(),
    "smollm3": _like_llama(ties_by_default=True),
    "seed_oss": _like_llama(out_bias="attention_out_bias"),
    "baichuan": Family("model.layers", outside(), baichuan_tensors, {}),
    "phi3": Family("model.layers", outside(), phi3_tensors, {}),
    "glm": Family("model.layers", outside(), glm_tensors(TWO_NORMS), {"head_dim": 128}),
    "glm4": Family(
        "model.layers",
        outside(),
        glm_tensors((*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")),
        {"head_dim": 128},
    ),
    "phi": Family(
        "model.layers",
        outside("model.embed_tokens", "model.final_layernorm", norm_bias=True, head_bias=True),
        phi_tensors,
        {},
        False,
    ),
    "gpt2": Family("transformer.h", gpt2_outside_tensors, gpt2_tensors, {}, False, ties_by_default=True),
    "gpt_bigcode": Family("transformer.h", gpt2_outside_tensors, gpt_bigcode_tensors, {}, False, ties_by_default=True),
    "gpt_neox": Family(
        "gpt_neox.layers",
        outside("gpt_neox.embed_in", "gpt_neox.final_layer_norm", norm_bias=True),
        gpt_neox_tensors,
        {},
        False,
    ),
    "gptj": Family(
        "transformer.h",
        outside("transformer.wte", "transformer.ln_f", norm_bias=True, head_bias=True),
        gptj_tensors,
        {},
        False,
    ),
    "opt": Family("model.decoder.layers", opt_outside_tensors, opt_tensors, {}, False, ties_by_default=True),
    "bloom": Family("transformer.h", bloom_outside_tensors, bloom_tensors, {}, False, ties_by_default=True),
    "falcon": Family(
        "transformer.h",
        outside("transformer.word_embeddings", "transformer.ln_f", norm_bias=True),
        falcon_tensors,
        {},
        False,
        ties_by_default=True,
    ),
    "starcoder2": Family(
        "model.layers", outside("model.embed_tokens", "model.norm", norm_bias=True), starcoder2_tensors, {}, False, True
    ),
    "stablelm": Family(
        "model.layers", outside("model.embed_tokens", "model.norm", norm_bias=True), stablelm_tensors, {}
    ),
    "cohere": Family("model.layers", outside(), cohere_tensors, {}, ties_by_default=True),
    "cohere2": Family("model.layers", outside(), cohere_tensors, {}, ties_by_default=True),
    "olmo": Family("model.layers", olmo_outside_tensors, olmo_tensors, {}),
    "olmo2": Family("model.layers", outside(), olmo2_tensors, {}),
    "olmo3": Family("model.layers", outside(), olmo2_tensors, {}),
    "mixtral": Family("model.layers", outside(), mixtral_tensors, {"num_key_value_heads": 8}),
    "qwen2_moe": Family("model.layers", outside(), qwen2_moe_tensors, {}),
    "qwen3_moe": Family("model.layers", outside(), qwen3_moe_tensors, {}),
    "olmoe": Family("model.layers", outside(), olmoe_tensors, {}),
}
"""By `model_type` of config.json."""
