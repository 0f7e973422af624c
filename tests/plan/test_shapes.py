"""Sizes from config.json equal those of transformers' own models, tensor by tensor."""

from __future__ import annotations

import json
import math

import pytest

from zhibei.config.errors import UserError
from zhibei.plan.families import FAMILIES
from zhibei.plan.shapes import read_shape

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 112, "vocab_size": 320, "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320, "n_positions": 128}
NO_GROUPS = {**SMALL, "num_key_value_heads": 4}
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, SMALL) for name in ("llama", "mistral", "qwen2", "gemma2", "granite", "starcoder2")},
    "llama with biases": ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "llama with its own head width": ("llama", {**SMALL, "head_dim": 24}),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 32}),
    "qwen2 tied": ("qwen2", {**SMALL, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {**SMALL, "pad_token_id": 0}),
    "gemma": ("gemma", {**SMALL, "head_dim": 16}),
    "gemma3_text": ("gemma3_text", {**SMALL, "head_dim": 16}),
    "seed_oss": ("seed_oss", {**SMALL, "head_dim": 16, "attention_out_bias": True}),
    "phi3": ("phi3", {**SMALL, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}),
    "glm": ("glm", {**SMALL, "head_dim": 16, "attention_bias": True, "pad_token_id": 0}),
    "glm4": ("glm4", {**SMALL, "head_dim": 16, "pad_token_id": 0}),
    "phi": ("phi", {**NO_GROUPS, "qk_layernorm": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 with an inner width": ("gpt2", {**GPT2, "n_inner": 100}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_neox": ("gpt_neox", {**SMALL, "attention_bias": False}),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 8}),
    "opt": ("opt", {**NO_GROUPS, "ffn_dim": 112, "word_embed_proj_dim": 64}),
    "opt-350m": ("opt", {**NO_GROUPS, "ffn_dim": 112, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 320}),
    "falcon-7b": ("falcon", SMALL),
    "falcon-40b": ("falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {**SMALL, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "stablelm": ("stablelm", {**SMALL, "use_qkv_bias": True, "qk_layernorm": True}),
    "cohere": ("cohere", {**SMALL, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**SMALL, "head_dim": 16}),
    **{name: (name, {**SMALL, "eos_token_id": 2, "pad_token_id": 1}) for name in ("olmo", "olmo2", "olmo3")},
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**SMALL, "num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [1],
                                "shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("qwen3_moe", {**SMALL, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48,
                                "decoder_sparse_step": 2}),
    "olmoe": ("olmoe", {**SMALL, "num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def on_meta(family: str, settings: dict):
    """(the config as save_pretrained writes it, transformers' model without memory)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return json.loads(config.to_json_string()), model


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_the_name_and_shape_that_transformers_gives_it(case):
    config, model = on_meta(*CASES[case])
    shape = read_shape(config)
    assert dict(shape.tensors()) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_the_layers_that_can_carry_adapters_are_those_that_peft_would_take(case):
    import torch
    from transformers.pytorch_utils import Conv1D

    config, model = on_meta(*CASES[case])
    theirs = {
        name: module.weight.numel() for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head"
    }  # fmt: skip
    assert {linear.name: linear.inputs * linear.outputs for linear in read_shape(config).linears()} == theirs


def test_every_known_family_is_compared():
    assert {family for family, _ in CASES.values()} == set(FAMILIES) - {"baichuan"}


def test_headers_decide_where_they_differ_from_the_config():
    config = {"model_type": "llama", **SMALL, "tie_word_embeddings": False}
    tensors = {name: ("BF16", shape) for name, shape in read_shape(config).tensors()}
    assert read_shape(config, tensors).num_parameters == read_shape(config).num_parameters
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = ("BF16", (384, 64))
    widened = read_shape(config, tensors)
    assert widened.vocabulary == 384
    assert widened.num_parameters == read_shape(config).num_parameters + 2 * 64 * 64
    assert widened.stored_bytes == 2 * widened.num_parameters
    assert {linear.name for linear in widened.linears()} == {linear.name for linear in read_shape(config).linears()}


def test_an_unknown_family_is_read_from_its_headers():
    known = read_shape({"model_type": "qwen3", **SMALL, "head_dim": 32})
    tensors = {name: ("F32", shape) for name, shape in known.tensors()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (16,))
    unknown = read_shape({"model_type": "newest", **SMALL, "head_dim": 32}, tensors)
    assert not unknown.is_known_family
    assert unknown.num_parameters == known.num_parameters
    assert unknown.num_layers == 3
    assert unknown.layer_parameters == known.layer_parameters
    assert [linear.name for linear in unknown.linears()] == [linear.name for linear in known.linears()]


def test_an_unknown_family_without_headers_says_what_is_missing():
    with pytest.raises(UserError, match="newest") as caught:
        read_shape({"model_type": "newest", **SMALL})
    assert "safetensors" in caught.value.fix


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_named(field):
    with pytest.raises(UserError, match=field):
        read_shape({"model_type": "llama", **{key: value for key, value in SMALL.items() if key != field}})


def test_a_text_config_inside_is_found():
    inner = {"model_type": "gemma3_text", **SMALL, "head_dim": 16}
    outer = {"model_type": "gemma3", "text_config": {k: v for k, v in inner.items() if k != "model_type"}}
    assert read_shape(outer).num_parameters == read_shape(inner).num_parameters


def test_a_tied_head_counts_once_and_baichuan_fuses_its_projections():
    shape = read_shape({"model_type": "baichuan", **NO_GROUPS})
    assert (192, 64) in dict(shape.tensors()).values()
    tied = read_shape({"model_type": "llama", **SMALL, "tie_word_embeddings": True})
    loose = read_shape({"model_type": "llama", **SMALL, "tie_word_embeddings": False})
    assert loose.num_parameters - tied.num_parameters == loose.head_parameters == math.prod((320, 64))
    assert tied.head_parameters == 0
