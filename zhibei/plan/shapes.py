"""A model as sizes: which tensors it has and which of them are linear layers, from config.json and file headers.

Knows no torch and no weights. `read_shape` takes the parsed config.json and, where they are at hand, the names and
shapes in the safetensors headers; these decide where they differ from what the family's config promises.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zhibei.config.errors import UserError
from zhibei.plan.families import FAMILIES, Family
from zhibei.plan.family_tensors import Config, Tensors

HEAD = "lm_head"
LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?(?:layers|h|blocks|layer))\.(?P<number>\d+)\.(?P<rest>.+)$")
# Buffers that older files keep beside the weights; transformers does not count them as parameters.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|attention\.(masked_)?bias)$")
EMBEDDINGS = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
CONV1D_FAMILIES = ("gpt2",)

HIDDEN = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
WIDTH = ("ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size", "d_ff")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer by its dotted name."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool = False

    @property
    def last_name(self) -> str:
        """`q_proj`, as adapter targets name it."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder model.

    `outside` and `layers` map tensor names (those of a layer without its prefix) to shapes; a tied head is absent.
    `stored_bytes` are the weight bytes in the files, where headers were at hand.
    """

    family: str
    hidden: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    is_tied: bool
    is_gated: bool
    outside: Mapping[str, tuple[int, ...]]
    layers: tuple[Mapping[str, tuple[int, ...]], ...]
    layer_prefix: str = "model.layers"
    max_positions: int | None = None
    sliding_window: int | None = None
    attention_softcap: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    is_known_family: bool = True
    stored_bytes: int | None = None
    """Bytes of all tensors in the files; None without headers."""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The text part of config.json."""

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes())

    @property
    def head_parameters(self) -> int:
        """0 where the head is the embedding matrix (tied)."""
        return sum(math.prod(shape) for name, shape in self.outside.items() if name.startswith(HEAD))

    @property
    def embedding_parameters(self) -> int:
        """Rows of the token embedding (and learned positions) times their width."""
        return sum(
            math.prod(shape) for name, shape in self.outside.items() if len(shape) == 2 and not name.startswith(HEAD)
        )

    @property
    def embedding_and_head_parameters(self) -> int:
        """Both, the one tensor of tied ones once."""
        return self.embedding_parameters + (0 if self.is_tied else self.head_parameters)

    @property
    def layer_parameters(self) -> int:
        """All layers together."""
        return sum(math.prod(shape) for layer in self.layers for shape in layer.values())

    @property
    def largest_layer_parameters(self) -> int:
        return max((sum(math.prod(shape) for shape in layer.values()) for layer in self.layers), default=0)

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_heads * self.head_dim

    @property
    def active_parameters(self) -> int:
        """Parameters a token passes through: of experts, only the chosen ones."""
        if not self.num_experts:
            return self.num_parameters
        experts = sum(math.prod(shape) for layer in self.layers for name, shape in layer.items() if _is_expert(name))
        return self.num_parameters - experts + experts * self.experts_per_token // self.num_experts

    def sizes(self) -> Iterator[int]:
        """Elements of every tensor."""
        for shapes in (self.outside, *self.layers):
            for shape in shapes.values():
                yield math.prod(shape)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Full names and shapes."""
        yield from self.outside.items()
        for number, layer in enumerate(self.layers):
            for name, shape in layer.items():
                yield f"{self.layer_prefix}.{number}.{name}", shape

    def layer_linears(self, number: int) -> list[Linear]:
        """Those of one layer."""
        layer, found = self.layers[number], []
        for name, shape in layer.items():
            if len(shape) != 2 or not name.endswith(".weight") or _is_no_linear(name):
                continue
            outputs, inputs = shape[::-1] if self.family in CONV1D_FAMILIES else shape
            stem = name.removesuffix(".weight")
            full = f"{self.layer_prefix}.{number}.{stem}"
            found.append(Linear(full, inputs, outputs, f"{stem}.bias" in layer))
        return found

    def linears(self) -> list[Linear]:
        """Linear layers that can carry an adapter: all but the head, routers and fused experts."""
        found = [linear for number in range(self.num_layers) for linear in self.layer_linears(number)]
        projections = [name for name in self.outside if name.endswith(("project_in.weight", "project_out.weight"))]
        for name in projections:
            outputs, inputs = self.outside[name]
            found.append(Linear(name.removesuffix(".weight"), inputs, outputs))
        return found


def _is_no_linear(name: str) -> bool:
    return "norm" in name or name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight", "router.weight"))


def _is_expert(name: str) -> bool:
    return "experts." in name


def read_shape(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
) -> ModelShape:
    """The sizes of a model from its config.json and the (dtype, shape) of the tensors in its files, if known.

    Raises UserError naming the field that is missing, or a family that is unknown without its files.
    """
    text = _text_part(config)
    family_name = str(text.get("model_type") or config.get("model_type") or "")
    family = FAMILIES.get(family_name)
    weights = {name: tuple(shape) for name, (_, shape) in (tensors or {}).items() if not BUFFERS.search(name)}
    is_quantised = bool(text.get("quantization_config") or config.get("quantization_config"))
    if family is None and (not weights or is_quantised):
        raise UserError(
            f"config.json: model_type {family_name or '(none)'} is not a family whose sizes are known",
            expected=f"the safetensors files beside it, or one of: {', '.join(sorted(FAMILIES))}",
            fix="point model.path at a folder with the model's .safetensors files: their headers say every size",
            where="model.path",
        )
    sizes = _sizes(text, family)
    is_tied = _is_tied(text, config, family, weights)
    if family is not None:
        outside, layers = _promised(sizes, family)
        prefix = family.prefix
    else:
        outside, layers, prefix = {}, (), ""
    if weights and not is_quantised:
        outside, layers, prefix = _decided((outside, layers, prefix), weights, is_tied=is_tied)
    if is_tied:
        outside = {name: shape for name, shape in outside.items() if name != f"{HEAD}.weight"}
    embedding = next((shape for name, shape in outside.items() if EMBEDDINGS.search(name)), None)
    return ModelShape(
        family=family_name,
        hidden=sizes.hidden,
        num_layers=len(layers),
        num_heads=sizes.num_heads,
        num_key_heads=sizes.num_key_heads,
        head_dim=sizes.head_dim,
        mlp_width=sizes.mlp_width,
        vocabulary=embedding[0] if embedding else sizes.vocabulary,
        is_tied=is_tied,
        is_gated=family.is_gated
        if family is not None
        else any("gate" in name for layer in layers[:1] for name in layer),
        outside=outside,
        layers=layers,
        layer_prefix=prefix,
        max_positions=_first(text, POSITIONS),
        sliding_window=text.get("sliding_window") if text.get("use_sliding_window", True) else None,
        attention_softcap=_with_defaults(text, family).get("attn_logit_softcapping") is not None,
        num_experts=_num_experts(layers, text),
        experts_per_token=int(text.get("num_experts_per_tok") or 0) or 2,
        expert_width=int(text.get("moe_intermediate_size") or sizes.mlp_width),
        is_known_family=family is not None,
        stored_bytes=_stored_bytes(tensors) if tensors else None,
        raw=text,
    )


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models that also see keep their language model's config under text_config."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    # Multimodal files leave the inner model_type out where it follows from the outer one.
    outer = str(config.get("model_type", ""))
    guessed = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral"}.get(outer, outer)
    tie = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {"model_type": guessed, **tie, **inner}


def _with_defaults(text: Mapping[str, Any], family: Family | None) -> Mapping[str, Any]:
    return {**(family.defaults if family is not None else {}), **text}


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    return None


def _required(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    value = _first(config, names)
    if value is None or value <= 0:
        raise UserError(
            f"config.json holds no usable {names[0]}" + (f" ({value})" if value is not None else ""),
            expected=f"{' or '.join(names[:2])} as a positive number",
            fix="copy the model's complete config.json",
            where="model.path",
        )
    return value


def _sizes(text: Mapping[str, Any], family: Family | None) -> Config:
    defaults = family.defaults if family is not None else {}
    hidden, heads = _required(text, HIDDEN), _required(text, HEADS)
    return Config(
        raw=text,
        hidden=hidden,
        num_layers=_required(text, LAYERS),
        num_heads=heads,
        num_key_heads=_key_heads(text, heads, defaults),
        head_dim=_first(text, ("head_dim",)) or int(defaults.get("head_dim", hidden // heads)),
        mlp_width=_first(text, WIDTH) or 4 * hidden,
        vocabulary=_required(text, ("vocab_size",)),
    )


def _key_heads(text: Mapping[str, Any], heads: int, defaults: Mapping[str, Any]) -> int:
    if str(text.get("model_type")) == "falcon":
        if text.get("new_decoder_architecture"):
            return int(text.get("num_kv_heads") or heads)
        return 1 if text.get("multi_query", True) else heads
    if str(text.get("model_type")) == "gpt_bigcode":
        return 1 if text.get("multi_query", True) else heads
    named = _first(text, ("num_key_value_heads", "num_kv_heads"))
    return named or min(heads, int(defaults.get("num_key_value_heads", heads)))


def _promised(sizes: Config, family: Family) -> tuple[Tensors, tuple[Tensors, ...]]:
    return family.outside(sizes), tuple(family.layer(sizes, number) for number in range(sizes.num_layers))


def _is_tied(
    text: Mapping[str, Any], config: Mapping[str, Any], family: Family | None, weights: Mapping[str, tuple[int, ...]]
) -> bool:
    asked = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if asked is not None:
        return bool(asked)
    if family is not None:
        return family.ties_by_default
    return not any(name.endswith(f"{HEAD}.weight") for name in weights)


def _decided(
    promised: tuple[Tensors, tuple[Tensors, ...], str], weights: Mapping[str, tuple[int, ...]], *, is_tied: bool
) -> tuple[Tensors, tuple[Tensors, ...], str]:
    """What the files hold, unless it is what the config promised: then the names are transformers' own."""
    outside, layers, _ = promised
    head = f"{HEAD}.weight"
    expected = sum(
        math.prod(shape)
        for shapes in (outside, *layers)
        for name, shape in shapes.items()
        if not (is_tied and name == head)
    )
    held = sum(math.prod(shape) for name, shape in weights.items() if not (is_tied and name.endswith(head)))
    if held == expected:
        return promised
    by_layer: dict[int, Tensors] = {}
    others: Tensors = {}
    prefixes = [match["prefix"] for name in weights if (match := LAYER.match(name))]
    prefix = max(set(prefixes), key=prefixes.count) if prefixes else ""
    for name, shape in weights.items():
        match = LAYER.match(name)
        if match and match["prefix"] == prefix:
            by_layer.setdefault(int(match["number"]), {})[match["rest"]] = shape
        else:
            others[name] = shape
    return others, tuple(by_layer[number] for number in sorted(by_layer)), prefix


def _num_experts(layers: tuple[Tensors, ...], text: Mapping[str, Any]) -> int:
    if not any(_is_expert(name) for layer in layers for name in layer):
        return 0
    return _first(text, ("num_experts", "num_local_experts", "n_routed_experts")) or 1


BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _stored_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in tensors.values())
