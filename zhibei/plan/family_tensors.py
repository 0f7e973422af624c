"""Which tensors a decoder layer of each family has, as transformers (5.x) names and shapes them. Knows no memory.

Sources: the `modeling_*.py` of the families in transformers; a test compares every name, shape and count with a model
on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Config:
    """The sizes of a config.json under one set of names, whatever the family calls them."""

    raw: Mapping[str, Any]
    hidden: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_heads * self.head_dim

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch of the config; null counts as absent."""
        value = self.raw.get(name)
        return default if value is None else bool(value)

    def number(self, name: str, default: int) -> int:
        value = self.raw.get(name)
        return default if value is None else int(value)

    def num_experts(self, default: int) -> int:
        """Files of different years call it by two names."""
        return self.number("num_experts", self.number("num_local_experts", default))


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = False) -> Tensors:
    found: Tensors = {f"{name}.weight": (outputs, inputs)}
    return {**found, f"{name}.bias": (outputs,)} if bias else found


def _norm(name: str, width: int, *, bias: bool = False) -> Tensors:
    found: Tensors = {f"{name}.weight": (width,)}
    return {**found, f"{name}.bias": (width,)} if bias else found


def _attention(
    c: Config,
    at: str = "self_attn",
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    out: str = "o_proj",
    head_norms: bool = False,
) -> Tensors:
    found = {
        **_linear(f"{at}.q_proj", c.query_width, c.hidden, bias=qkv_bias),
        **_linear(f"{at}.k_proj", c.key_width, c.hidden, bias=qkv_bias),
        **_linear(f"{at}.v_proj", c.key_width, c.hidden, bias=qkv_bias),
        **_linear(f"{at}.{out}", c.hidden, c.query_width, bias=out_bias),
    }
    if head_norms:
        found |= {**_norm(f"{at}.q_norm", c.head_dim), **_norm(f"{at}.k_norm", c.head_dim)}
    return found


def _gated_mlp(c: Config, at: str = "mlp", *, width: int | None = None, bias: bool = False) -> Tensors:
    width = c.mlp_width if width is None else width
    return {
        **_linear(f"{at}.gate_proj", width, c.hidden, bias=bias),
        **_linear(f"{at}.up_proj", width, c.hidden, bias=bias),
        **_linear(f"{at}.down_proj", c.hidden, width, bias=bias),
    }


def _plain_mlp(c: Config, up: str, down: str, *, bias: bool = True) -> Tensors:
    return {**_linear(up, c.mlp_width, c.hidden, bias=bias), **_linear(down, c.hidden, c.mlp_width, bias=bias)}


def _norms(c: Config, *names: str, bias: bool = False) -> Tensors:
    return {key: shape for name in names for key, shape in _norm(name, c.hidden, bias=bias).items()}


TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def outside(
    embeddings: str = "model.embed_tokens", *norms: str, norm_bias: bool = False, head_bias: str | bool = False
) -> Callable[[Config], Tensors]:
    final_norms = norms or ("model.norm",)

    def tensors(c: Config) -> Tensors:
        biased = head_bias if isinstance(head_bias, bool) else c.flag(head_bias)
        return {
            **_linear(embeddings, c.vocabulary, c.hidden),
            **_norms(c, *final_norms, bias=norm_bias),
            **_linear("lm_head", c.vocabulary, c.hidden, bias=biased),
        }

    return tensors


def llama_layer(
    *,
    qkv_bias: str | bool = "attention_bias",
    out_bias: str | bool = "attention_bias",
    mlp_bias: str | bool = "mlp_bias",
    head_norms: str | bool = False,
    norms: tuple[str, ...] = TWO_NORMS,
    norm_bias: bool = False,
) -> Callable[[Config, int], Tensors]:
    """q, k, v, o and a gated MLP with norms around; a text names the config's switch, a bool is fixed."""

    def tensors(c: Config, _number: int) -> Tensors:
        def switch(value: str | bool) -> bool:
            return value if isinstance(value, bool) else c.flag(value)

        return {
            **_attention(c, qkv_bias=switch(qkv_bias), out_bias=switch(out_bias), head_norms=switch(head_norms)),
            **_gated_mlp(c, bias=switch(mlp_bias)),
            **_norms(c, *norms, bias=norm_bias),
        }

    return tensors


def baichuan_tensors(c: Config, _number: int) -> Tensors:
    """Baichuan's own code: one fused projection W_pack."""
    return {
        **_linear("self_attn.W_pack", 3 * c.hidden, c.hidden),
        **_linear("self_attn.o_proj", c.hidden, c.hidden),
        **_gated_mlp(c),
        **_norms(c, *TWO_NORMS),
    }


def phi3_tensors(c: Config, _number: int) -> Tensors:
    return {
        **_linear("self_attn.qkv_proj", c.query_width + 2 * c.key_width, c.hidden),
        **_linear("self_attn.o_proj", c.hidden, c.query_width),
        **_linear("mlp.gate_up_proj", 2 * c.mlp_width, c.hidden),
        **_linear("mlp.down_proj", c.hidden, c.mlp_width),
        **_norms(c, *TWO_NORMS),
    }


def glm_tensors(norms: tuple[str, ...]) -> Callable[[Config, int], Tensors]:
    def tensors(c: Config, _number: int) -> Tensors:
        return {
            **_attention(c, qkv_bias=c.flag("attention_bias")),
            **_linear("mlp.gate_up_proj", 2 * c.mlp_width, c.hidden),
            **_linear("mlp.down_proj", c.hidden, c.mlp_width),
            **_norms(c, *norms),
        }

    return tensors


def phi_tensors(c: Config, _number: int) -> Tensors:
    found = {
        **_attention(c, qkv_bias=True, out_bias=True, out="dense"),
        **_plain_mlp(c, "mlp.fc1", "mlp.fc2"),
        **_norms(c, "input_layernorm", bias=True),
    }
    if c.flag("qk_layernorm"):
        for name in ("q_layernorm", "k_layernorm"):
            found |= _norm(f"self_attn.{name}", c.head_dim, bias=True)
    return found


def gpt2_tensors(c: Config, _number: int) -> Tensors:
    """Conv1D keeps its weight as (inputs, outputs)."""
    d, m = c.hidden, c.mlp_width
    return {
        **_norms(c, "ln_1", "ln_2", bias=True),
        "attn.c_attn.weight": (d, 3 * d), "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d), "attn.c_proj.bias": (d,),
        "mlp.c_fc.weight": (d, m), "mlp.c_fc.bias": (m,),
        "mlp.c_proj.weight": (m, d), "mlp.c_proj.bias": (d,),
    }  # fmt: skip


def gpt2_outside_tensors(c: Config) -> Tensors:
    return {
        **outside("transformer.wte", "transformer.ln_f", norm_bias=True)(c),
        "transformer.wpe.weight": (c.number("n_positions", 1024), c.hidden),
    }


def gpt_bigcode_tensors(c: Config, _number: int) -> Tensors:
    keys = c.head_dim if c.flag("multi_query", True) else c.hidden
    return {
        **_norms(c, "ln_1", "ln_2", bias=True),
        **_linear("attn.c_attn", c.hidden + 2 * keys, c.hidden, bias=True),
        **_linear("attn.c_proj", c.hidden, c.hidden, bias=True),
        **_plain_mlp(c, "mlp.c_fc", "mlp.c_proj"),
    }


def gpt_neox_tensors(c: Config, _number: int) -> Tensors:
    bias = c.flag("attention_bias", True)
    return {
        **_linear("attention.query_key_value", 3 * c.hidden, c.hidden, bias=bias),
        **_linear("attention.dense", c.hidden, c.hidden, bias=bias),
        **_plain_mlp(c, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        **_norms(c, *TWO_NORMS, bias=True),
    }


def gptj_tensors(c: Config, _number: int) -> Tensors:
    return {
        **_attention(c, "attn", out="out_proj"),
        **_plain_mlp(c, "mlp.fc_in", "mlp.fc_out"),
        **_norms(c, "ln_1", bias=True),
    }


def opt_tensors(c: Config, _number: int) -> Tensors:
    bias = c.flag("enable_bias", True)
    has_norms = c.flag("layer_norm_elementwise_affine", True)
    return {
        **_attention(c, qkv_bias=bias, out_bias=bias, out="out_proj"),
        **_plain_mlp(c, "fc1", "fc2", bias=bias),
        **(_norms(c, "self_attn_layer_norm", "final_layer_norm", bias=True) if has_norms else {}),
    }


def opt_outside_tensors(c: Config) -> Tensors:
    width = c.number("word_embed_proj_dim", c.hidden)
    found: Tensors = {
        "model.decoder.embed_tokens.weight": (c.vocabulary, width),
        "model.decoder.embed_positions.weight": (c.number("max_position_embeddings", 2048) + 2, c.hidden),
        "lm_head.weight": (c.vocabulary, width),
    }
    if width != c.hidden:
        found |= {
            "model.decoder.project_in.weight": (c.hidden, width),
            "model.decoder.project_out.weight": (width, c.hidden),
        }
    if c.flag("do_layer_norm_before", True) and not c.flag("_remove_final_layer_norm"):
        found |= _norms(c, "model.decoder.final_layer_norm", bias=True)
    return found


def bloom_tensors(c: Config, _number: int) -> Tensors:
    return {
        **_linear("self_attention.query_key_value", 3 * c.hidden, c.hidden, bias=True),
        **_linear("self_attention.dense", c.hidden, c.hidden, bias=True),
        **_plain_mlp(c, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        **_norms(c, *TWO_NORMS, bias=True),
    }


def bloom_outside_tensors(c: Config) -> Tensors:
    embeddings = "transformer.word_embeddings"
    return outside(embeddings, f"{embeddings}_layernorm", "transformer.ln_f", norm_bias=True)(c)


def falcon_tensors(c: Config, _number: int) -> Tensors:
    bias, new = c.flag("bias"), c.flag("new_decoder_architecture")
    if new:
        norms = ("ln_attn", "ln_mlp") if c.number("num_ln_in_parallel_attn", 2) == 2 else ("input_layernorm",)
    else:
        norms = ("input_layernorm",) if c.flag("parallel_attn", True) else TWO_NORMS
    return {
        **_linear("self_attention.query_key_value", c.query_width + 2 * c.key_width, c.hidden, bias=bias),
        **_linear("self_attention.dense", c.hidden, c.hidden, bias=bias),
        **_plain_mlp(c, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=bias),
        **_norms(c, *norms, bias=True),
    }


def starcoder2_tensors(c: Config, _number: int) -> Tensors:
    bias = c.flag("use_bias", True)
    return {
        **_attention(c, qkv_bias=bias, out_bias=bias),
        **_plain_mlp(c, "mlp.c_fc", "mlp.c_proj", bias=bias),
        **_norms(c, *TWO_NORMS, bias=True),
    }


def stablelm_tensors(c: Config, _number: int) -> Tensors:
    norms = ("input_layernorm",) if c.flag("use_parallel_residual") else TWO_NORMS
    found = {
        **_attention(c, qkv_bias=c.flag("use_qkv_bias")),
        **_gated_mlp(c),
        **_norms(c, *norms, bias=True),
    }
    if c.flag("qk_layernorm"):
        for kind, heads in (("q", c.num_heads), ("k", c.num_key_heads)):
            for head in range(heads):
                found |= _norm(f"self_attn.{kind}_layernorm.norms.{head}", c.head_dim)
    return found


def cohere_tensors(c: Config, _number: int) -> Tensors:
    bias = c.flag("attention_bias")
    found = {**_attention(c, qkv_bias=bias, out_bias=bias), **_gated_mlp(c), **_norms(c, "input_layernorm")}
    if c.flag("use_qk_norm"):
        found |= {
            "self_attn.q_norm.weight": (c.num_heads, c.head_dim),
            "self_attn.k_norm.weight": (c.num_key_heads, c.head_dim),
        }
    return found


def olmo_tensors(c: Config, _number: int) -> Tensors:
    """Its norms have no weights."""
    bias = c.flag("attention_bias")
    return {**_attention(c, qkv_bias=bias, out_bias=bias), **_gated_mlp(c)}


def olmo_outside_tensors(c: Config) -> Tensors:
    return {name: shape for name, shape in outside()(c).items() if "norm" not in name}


def olmo2_tensors(c: Config, _number: int) -> Tensors:
    bias = c.flag("attention_bias")
    return {
        **_attention(c, qkv_bias=bias, out_bias=bias),
        **_norm("self_attn.q_norm", c.query_width),
        **_norm("self_attn.k_norm", c.key_width),
        **_gated_mlp(c),
        **_norms(c, "post_attention_layernorm", "post_feedforward_layernorm"),
    }


def _experts(c: Config, count: int, width: int, *, router: str = "mlp.gate", at: str = "mlp.experts") -> Tensors:
    return {
        f"{router}.weight": (count, c.hidden),
        f"{at}.gate_up_proj": (count, 2 * width, c.hidden),
        f"{at}.down_proj": (count, c.hidden, width),
    }


def mixtral_tensors(c: Config, _number: int) -> Tensors:
    return {
        **_attention(c),
        **_experts(c, c.num_experts(8), c.mlp_width),
        **_norms(c, *TWO_NORMS),
    }


def _is_sparse(c: Config, number: int) -> bool:
    dense = c.raw.get("mlp_only_layers") or []
    return number not in dense and (number + 1) % c.number("decoder_sparse_step", 1) == 0


def qwen2_moe_tensors(c: Config, number: int) -> Tensors:
    found = {**_attention(c, qkv_bias=c.flag("qkv_bias", True)), **_norms(c, *TWO_NORMS)}
    if not _is_sparse(c, number):
        return {**found, **_gated_mlp(c)}
    return {
        **found,
        **_experts(c, c.num_experts(60), c.number("moe_intermediate_size", 1408)),
        **_gated_mlp(c, "mlp.shared_expert", width=c.number("shared_expert_intermediate_size", 5632)),
        **_linear("mlp.shared_expert_gate", 1, c.hidden),
    }


def qwen3_moe_tensors(c: Config, number: int) -> Tensors:
    bias = c.flag("attention_bias")
    found = {**_attention(c, qkv_bias=bias, out_bias=bias, head_norms=True), **_norms(c, *TWO_NORMS)}
    if not _is_sparse(c, number):
        return {**found, **_gated_mlp(c)}
    return {**found, **_experts(c, c.num_experts(128), c.number("moe_intermediate_size", 768))}


def olmoe_tensors(c: Config, _number: int) -> Tensors:
    bias = c.flag("attention_bias")
    return {
        **_attention(c, qkv_bias=bias, out_bias=bias),
        **_norm("self_attn.q_norm", c.query_width),
        **_norm("self_attn.k_norm", c.key_width),
        **_experts(c, c.num_experts(64), c.mlp_width),
        **_norms(c, *TWO_NORMS),
    }
