"""Meta's form of a LLaMA: names, sizes of params.json, how matrices are split and turned. Knows no file.

Sources: the released params.json files and model code of LLaMA 1 to 3 (github.com/meta-llama/llama, llama3,
llama-models). Rotary positions turn neighbouring pairs of a head there, and halves of it in transformers; so the rows
of q and k are stored in another order. Model-parallel files split by fairscale's rules: outputs of q, k, v, w1, w3 and
the head, inputs of wo and w2; the embedding by width in LLaMA 1 and 2, by vocabulary in LLaMA 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARD_COUNTS = (1, 2, 4, 8)
PARTS: dict[str, tuple[str, int | None]] = {
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
}
"""Of a layer: transformers' name -> Meta's name, and the dimension that is split (None: every file has it whole)."""
BIG_VOCABULARY = 100_000  # LLaMA 3 has 128,256 tokens and splits them; its elders have 32,000 and split the width
MULTIPLIERS: tuple[tuple[int, float | None], ...] = (
    (256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0), (4096, 1.2), (32, None), (16, None), (4, None),
)  # fmt: skip
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""apply_scaling of github.com/meta-llama/llama-models, models/llama3/model.py."""
WIDTHS_OF_LLAMA_3_2 = (2048, 3072)
NO_PARAMETER = re.compile(r"^rope\.freqs$|\.inner_attention\.rope\.freqs$")


@dataclass(frozen=True)
class Sizes:
    """What both forms agree on."""

    width: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    mlp_width: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def splits_vocabulary(self) -> bool:
        return self.vocabulary > BIG_VOCABULARY


def sizes_of_config(config: Mapping[str, Any]) -> Sizes:
    """From transformers' config.json."""
    heads = int(config["num_attention_heads"])
    return Sizes(
        width=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_key_heads=int(config.get("num_key_value_heads") or heads),
        mlp_width=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
    )


def refusal(config: Mapping[str, Any], num_shards: int = 1) -> str:
    """Why a model of transformers has no such form in so many files; "" when it has. Decided from config.json alone."""
    family = config.get("model_type")
    if family != "llama":
        return f"model_type is {family!r}: Meta's form is that of LLaMA"
    biased = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if biased:
        return f"{biased[0]} is true, and Meta's layers have no bias"
    sizes = sizes_of_config(config)
    head_dim = config.get("head_dim")
    if head_dim and int(head_dim) != sizes.head_dim:
        return f"head_dim is {head_dim}, and Meta's code takes {sizes.width} / {sizes.num_heads} = {sizes.head_dim}"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']}, and Meta's code computes silu"
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ("default", "llama3"):
        return f"rotary positions of type {kind}, which Meta's code does not compute"
    if kind == "llama3" and (odd := _odd_scaling(rope_of(config), sizes.width)):
        return odd
    split = {
        "attention heads": sizes.num_heads,
        "key heads": sizes.num_key_heads,
        "MLP width": sizes.mlp_width,
        "width": sizes.width,
        "vocabulary": sizes.vocabulary,
    }
    uneven = [f"{name} {value:,}" for name, value in split.items() if value % num_shards]
    return f"{', '.join(uneven)} cannot be divided among {num_shards} files" if uneven else ""


def _odd_scaling(rope: Mapping[str, Any], width: int) -> str:
    """params.json only says whether positions are scaled; by how much is fixed in Meta's code."""
    for name, value in (("factor", llama3_factor(width)), *LLAMA3_SCALING.items()):
        if float(rope.get(name, value)) != value:
            return (
                f"{name} of its rotary scaling is {rope[name]:g}, and params.json, which cannot say so, means {value:g}"
            )
    return ""


def llama3_factor(width: int) -> float:
    """By what slow frequencies are divided in the released models with `use_scaled_rope`: the config.json files of
    Llama 3.2 1B and 3B have 32, those of all larger ones 8 (which is what Meta's own code always computes)."""
    return 32.0 if width in WIDTHS_OF_LLAMA_3_2 else 8.0


def rope_note(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a person should know of the positions of a model that `refusal` lets pass."""
    factor = float(rope_of(config).get("factor", 8.0))
    if rope_of(config).get("rope_type") != "llama3" or factor == 8.0:
        return ()
    return (
        f"this model divides slow rotary frequencies by {factor:g}, as Llama 3.2 1B and 3B do, and Meta's own code by "
        "8: there it is another model",
    )


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one set of names, whichever year's config.json spells them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def params_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """params.json of a config that `refusal` lets pass."""
    sizes, rope = sizes_of_config(config), rope_of(config)
    multiple_of, multiplier = mlp_rule(sizes.width, sizes.mlp_width)
    params: dict[str, Any] = {
        "dim": sizes.width,
        "n_layers": sizes.num_layers,
        "n_heads": sizes.num_heads,
        "n_kv_heads": sizes.num_key_heads,
        "vocab_size": sizes.vocabulary,
        "multiple_of": multiple_of,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope["rope_theta"]),
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if rope.get("rope_type") == "llama3":
        params["use_scaled_rope"] = True
    return params


def mlp_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of four widths, times a factor, rounded up to a multiple."""
    hidden = int(2 * (4 * width) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def mlp_rule(width: int, wanted: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give this MLP width: a released pair where one does, else our own."""
    for multiple_of, multiplier in MULTIPLIERS:
        if mlp_width(width, multiple_of, multiplier) == wanted:
            return multiple_of, multiplier
    multiple_of = max(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if wanted % size == 0)
    # The middle of the values that round up to it, so that no rounding of the factor matters.
    return multiple_of, (wanted - (multiple_of - 1) / 2 + (0.5 if multiple_of == 1 else 0)) / int(2 * (4 * width) / 3)


def config_of(params: Mapping[str, Any], *, vocabulary: int, mlp: int, is_tied: bool) -> tuple[dict[str, Any], str]:
    """config.json of a params.json, and a note on what params.json does not say."""
    heads = int(params["n_heads"])
    positions, reason = _positions(params, vocabulary)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))}
    if params.get("use_scaled_rope"):
        rope |= {"rope_type": "llama3", "factor": llama3_factor(int(params["dim"])), **LLAMA3_SCALING}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(params["dim"]),
        "num_hidden_layers": int(params["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "rms_norm_eps": float(params.get("norm_eps", 1e-5)),
        "hidden_act": "silu",
        "rope_parameters": rope,
        "max_position_embeddings": positions,
        "tie_word_embeddings": is_tied,
        "attention_bias": False,
        "mlp_bias": False,
    }
    return config, f"params.json does not say how many positions were trained: {positions:,}, as {reason}"


def _positions(params: Mapping[str, Any], vocabulary: int) -> tuple[int, str]:
    if params.get("use_scaled_rope"):
        return 131_072, "LLaMA 3.1 and later have"
    if vocabulary > BIG_VOCABULARY:
        return 8_192, "LLaMA 3 has"
    if float(params.get("rope_theta", 10000.0)) >= 1e6:
        return 16_384, "Code Llama has"
    if float(params.get("norm_eps", 1e-5)) <= 1e-6:
        return 2_048, "LLaMA 1 has"
    return 4_096, "LLaMA 2 has"


def names_of(sizes: Sizes) -> dict[str, tuple[str, int | None]]:
    """transformers' name -> (Meta's name, split dimension), for a whole model."""
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", 0 if sizes.splits_vocabulary else 1),
        "model.norm.weight": ("norm.weight", None),
        "lm_head.weight": ("output.weight", 0),
    }
    for layer in range(sizes.num_layers):
        for ours, (theirs, dim) in PARTS.items():
            names[f"model.layers.{layer}.{ours}"] = (f"layers.{layer}.{theirs}", dim)
    return names


def to_pairs(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k from transformers' order (halves of a head) to Meta's (neighbouring pairs)."""
    outputs, inputs = weight_OI.shape
    return weight_OI.view(num_heads, 2, outputs // num_heads // 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def to_halves(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The inverse of `to_pairs`."""
    outputs, inputs = weight_OI.shape
    return weight_OI.view(num_heads, outputs // num_heads // 2, 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def turned_heads(name: str, sizes: Sizes) -> int:
    """How many heads a matrix has whose rows are turned; 0 for all others."""
    return {"q_proj": sizes.num_heads, "k_proj": sizes.num_key_heads}.get(name.rsplit(".", 2)[-2], 0)
