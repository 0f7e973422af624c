"""Bytes that one decoder layer keeps per token between forward and backward. Knows shapes, not optimisers or phases.

What is kept follows from the code that runs (`modeling_*.py` of transformers, `zhibei/model/attention.py`):

* not compiled: what each operation saves for its own backward;
* compiled: what the partitioner of torch.compile saves (`min_cut_rematerialization_partition`): results of matrix
  products and of attention, the inputs of layers whose weights learn, and nothing that is cheap to make again;
* selective: of that, without norms' and gates' results; attention is kept or repeated as the compiler's budget says.

Tests hook autograd on tiny models of each family and compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from zhibei.plan.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Execution:
    """How a layer is run. `item_bytes`: 2 in bf16 and fp16, 4 in fp32. `adapted`: last names of linears with an
    adapter of `rank`; empty when all weights learn (`trains_weights`)."""

    item_bytes: int = 2
    is_compiled: bool = True
    checkpointing: str = "none"
    attention: str = "varlen"
    trains_weights: bool = True
    adapted: frozenset[str] = frozenset()
    rank: int = 16
    budget: float = 0.7
    """Share that a compiled layer keeps in selective mode (`SELECTIVE_BUDGET` in zhibei/model/savings.py)."""


@dataclass(frozen=True, slots=True)
class Style:
    """How a family's layer is built, as far as memory goes.

    `norm`: rms (fp32 inside, weight applied in the model's type), rms32 (weight applied in fp32), layer (torch's own),
    layer32 (written out in fp32), none. `norms_after`: norms on the way out of attention and MLP. `norms_before`:
    norms whose result goes into linears (1: attention and MLP share it). `head_norm`: of queries and keys.
    """

    norm: str = "rms"
    norms_before: int = 2
    norms_after: int = 0
    is_parallel: bool = False
    head_norm: str = ""
    fuses_qkv: bool = False


STYLES: Mapping[str, Style] = {
    "qwen3": Style(head_norm="rms"),
    "qwen3_moe": Style(head_norm="rms"),
    "gemma": Style("rms32"),
    "gemma2": Style("rms32", norms_after=2),
    "gemma3_text": Style("rms32", norms_after=2, head_norm="rms32"),
    "glm4": Style(norms_after=2),
    "phi3": Style(fuses_qkv=True),
    "phi": Style("layer", norms_before=1, is_parallel=True),
    "gpt2": Style("layer", fuses_qkv=True),
    "gpt_bigcode": Style("layer", fuses_qkv=True),
    "gpt_neox": Style("layer", is_parallel=True, fuses_qkv=True),
    "gptj": Style("layer", norms_before=1, is_parallel=True),
    "opt": Style("layer"),
    "bloom": Style("layer", fuses_qkv=True),
    "falcon": Style("layer", norms_before=1, is_parallel=True, fuses_qkv=True),
    "starcoder2": Style("layer"),
    "stablelm": Style("layer"),
    "cohere": Style("layer32", norms_before=1, is_parallel=True),
    "cohere2": Style("layer32", norms_before=1, is_parallel=True),
    "olmo": Style("none"),
    "olmo2": Style("rms32", norms_before=0, norms_after=2, head_norm="rms32"),
    "olmo3": Style("rms32", norms_before=0, norms_after=2, head_norm="rms32"),
    "baichuan": Style(fuses_qkv=True),
    "olmoe": Style(head_norm="rms"),
}
LAYER_NORM = Style("layer")
RMS_NORM = Style()

ATTENTION_INPUTS = frozenset(
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "W_pack", "attn.c_attn"]
)
ATTENTION_OUTPUTS = frozenset(["o_proj", "out_proj", "dense", "c_proj"])
MLP_INPUTS = frozenset(["gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"])
MLP_OUTPUTS = frozenset(["down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"])


def style_of(shape: ModelShape) -> Style:
    """The family's style; an unknown family is taken for the nearest usual one."""
    if shape.family in STYLES:
        return STYLES[shape.family]
    if shape.is_known_family or shape.is_gated:
        return RMS_NORM
    return LAYER_NORM


@dataclass(slots=True)
class Kept:
    """Bytes per token by what they are, e.g. {"norm results": 8192}; `scores` are per token and row length."""

    parts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, num_bytes: float) -> None:
        if num_bytes:
            self.parts[name] = self.parts.get(name, 0.0) + num_bytes

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Learns:
    """Which inputs of linears must be kept, because a weight or an adapter behind them learns."""

    attention_in: bool
    attention_out: bool
    mlp_in: bool
    mlp_out: bool
    weights: bool


def learns(shape: ModelShape, how: Execution) -> Learns:
    if how.trains_weights:
        return Learns(True, True, True, True, True)
    names = how.adapted
    groups = (ATTENTION_INPUTS, ATTENTION_OUTPUTS, MLP_INPUTS, MLP_OUTPUTS)
    return Learns(*(bool(names & group) for group in groups), weights=False)


def layer_bytes(shape: ModelShape, how: Execution, *, row_tokens: int = 1024) -> Kept:
    """Bytes per token that one layer keeps until its backward pass, by cause.

    `row_tokens`: length of a row, for attention whose scores are held (eager, soft-capped).
    """
    if how.checkpointing == "full":
        kept = Kept()
        kept.add("layer inputs", shape.hidden * how.item_bytes)
        return kept
    if how.is_compiled:
        return _compiled(shape, how, row_tokens)
    if how.checkpointing == "selective":
        return _selective(shape, how, row_tokens)
    return _eager(shape, how, row_tokens)


def _eager(shape: ModelShape, how: Execution, row_tokens: int) -> Kept:
    style, does, item = style_of(shape), learns(shape, how), how.item_bytes
    kept = Kept()
    feeds = (does.attention_in, does.mlp_in)[: style.norms_before]
    if style.norms_before == 1:
        feeds = (does.attention_in or does.mlp_in,)
    if style.norms_before == 0:
        # Linears read the residual stream itself.
        kept.add("inputs of linears", shape.hidden * item * (does.attention_in + does.mlp_in))
    shares_input = style.norm == "layer" and style.is_parallel and style.norms_before == 2
    for number, feeds_linear in enumerate(feeds):
        inner = NORMS[style.norm](shape.hidden, item, does.weights)
        if shares_input and number:
            inner -= shape.hidden * item
        kept.add("norms", inner)
        kept.add("inputs of linears", shape.hidden * item * feeds_linear)
    kept.add("norms", style.norms_after * NORMS[style.norm](shape.hidden, item, does.weights))
    if style.head_norm:
        for width in (shape.query_width, shape.key_width):
            kept.add("norms", NORMS[style.head_norm](width, item, does.weights))
    _attention(kept, shape, how, row_tokens)
    _mlp(kept, shape, how, does)
    kept.add("adapters", _adapters(shape, how))
    return kept


def _rms(width: int, item: int, learns_weight: bool) -> float:
    """x in fp32 (x itself in fp32), the reciprocal root, and x / rms in the model's type for the weight's gradient."""
    return 4 * width + 4 + item * width * learns_weight


def _rms32(width: int, item: int, learns_weight: bool) -> float:
    return 4 * width + 4 + 4 * width * learns_weight


def _layer(width: int, item: int, learns_weight: bool) -> float:
    """torch's layer_norm keeps its input, mean and reciprocal deviation."""
    return item * width + 8


def _layer32(width: int, item: int, learns_weight: bool) -> float:
    return 8 * width + 4 + 4 * width * learns_weight


def _no_weight(width: int, item: int, learns_weight: bool) -> float:
    """OLMo casts to fp32, normalises without weights and casts back."""
    return 4 * width + 8


NORMS: Mapping[str, Callable[[int, int, bool], float]] = {
    "rms": _rms, "rms32": _rms32, "layer": _layer, "layer32": _layer32, "none": _no_weight,
}  # fmt: skip


def _attention(kept: Kept, shape: ModelShape, how: Execution, row_tokens: int) -> None:
    """Queries, keys and values (keys and values repeated per query head), the mixed values and the log-sums."""
    query, item = shape.query_width, how.item_bytes
    kept.add("queries, keys, values", 3 * query * item)
    kept.add("attention results", query * item)
    kept.add("attention results", 4 * shape.num_heads)
    if how.attention == "documents":
        # Row by row, then joined and turned round: the joined copy is a second one.
        kept.add("attention results", query * item)
    if shape.attention_softcap or how.attention == "eager":
        # For every pair of tokens: tanh's result, the softmax in fp32 and its copy in the model's type. The mask is
        # one for all heads.
        pair = (item + 4 + item) if shape.attention_softcap else (4 + item)
        kept.add("attention scores", shape.num_heads * row_tokens * pair)


def _mlp(kept: Kept, shape: ModelShape, how: Execution, does: Learns) -> None:
    item, name = how.item_bytes, activation_name(shape)
    if shape.num_experts:
        _experts(kept, shape, how, does)
        return
    width = shape.mlp_width
    if shape.is_gated:
        # Input and result of the activation, the other branch, and their product.
        kept.add("MLP", width * item * (3 + does.mlp_out + 3 * (name == "gelu_new")))
        return
    if name == "relu":
        kept.add("MLP", width * item)
        return
    kept.add("MLP", width * item * (4 if name == "gelu_new" else 1))
    kept.add("MLP", width * item * does.mlp_out)


def _experts(kept: Kept, shape: ModelShape, how: Execution, does: Learns) -> None:
    """Every chosen expert gets its own copy of the token: rows in, gate and up, activation, product, rows out."""
    item, chosen, width = how.item_bytes, shape.experts_per_token, shape.expert_width
    kept.add("MLP", chosen * item * (2 * shape.hidden + 5 * width) + 8 * shape.num_experts)


def activation_name(shape: ModelShape) -> str:
    """`silu`, `gelu_new`, ... by the names families give it."""
    for key in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        if shape.raw.get(key):
            return str(shape.raw[key])
    return {"gpt2": "gelu_new", "phi": "gelu_new", "gptj": "gelu_new", "opt": "relu"}.get(
        shape.family, "silu" if shape.is_gated else "gelu"
    )


def _adapters(shape: ModelShape, how: Execution) -> float:
    """The result of each adapter's inner matrix."""
    if how.trains_weights:
        return 0.0
    adapted = [linear for linear in shape.layer_linears(shape.num_layers // 2) if linear.last_name in how.adapted]
    return len(adapted) * how.rank * how.item_bytes


def _compiled(shape: ModelShape, how: Execution, row_tokens: int) -> Kept:
    if how.checkpointing != "selective":
        return _partition(shape, how, row_tokens, stage=1)
    # torch/_functorch/partitioners.py, choose_saved_values_set: ever bolder sets until one is within the budget,
    # counted beyond the layer's input, which is there anyway.
    whole = _partition(shape, how, row_tokens, stage=1)
    inputs = shape.hidden * how.item_bytes
    for stage in (2, 3):
        smaller = _partition(shape, how, row_tokens, stage=stage)
        if (smaller.total - inputs) < how.budget * (whole.total - inputs):
            return smaller
    share = how.budget * (whole.total - inputs) + inputs
    return Kept({name: part * share / whole.total for name, part in whole.parts.items()})


def _partition(shape: ModelShape, how: Execution, row_tokens: int, *, stage: int) -> Kept:
    """What the compiler keeps. Stage 1: its own choice. 2: norms and gates are made again. 3: attention too."""
    style, does, item = style_of(shape), learns(shape, how), how.item_bytes
    hidden, query, key = shape.hidden, shape.query_width, shape.key_width
    kept = Kept()
    kept.add("layer inputs", hidden * item)
    if not style.is_parallel:
        # The attention's result before it joins the residual stream: the second norm is made again from it.
        kept.add("results of linears", hidden * item)
    if style.norms_after and style.norm != "none":
        kept.add("results of linears", hidden * item * (style.norms_after - 1))
    if style.norms_before == 0 and stage == 1:
        kept.add("inputs of linears", hidden * item * does.mlp_in)
    if stage == 1 and style.norms_before:
        feeds = (does.attention_in, does.mlp_in) if style.norms_before == 2 else (does.attention_in or does.mlp_in,)
        kept.add("inputs of linears", hidden * item * sum(feeds))
    if style.head_norm:
        kept.add("results of linears", (query + key) * item)
    makes_again = stage > 1 and bool(style.head_norm) and not does.weights
    if how.attention == "varlen":
        # With adapters, results before the norms of queries and keys are kept: these and attention are made again.
        values = 0 if makes_again else 2 * query if stage == 1 else 2 * key
        kept.add("queries, keys, values", (query + values) * item)
        if stage < 3 and not makes_again:
            kept.add("attention results", query * item + 4 * shape.num_heads)
        kept.add("norms", 4 * (style.norms_before + style.norms_after) * (2 if style.norm == "layer" else 1))
    else:
        # The compiler does not look into attention by rows or into transformers' own: those keep what they keep.
        _attention(kept, shape, how, row_tokens)
    if shape.num_experts:
        _experts(kept, shape, how, does)
    else:
        branches = 2 if shape.is_gated else 1
        keeps_product = does.mlp_out and stage == 1 and activation_name(shape) != "relu"
        kept.add("MLP", shape.mlp_width * item * (branches + keeps_product))
    kept.add("adapters", _adapters(shape, how))
    return kept


def _selective(shape: ModelShape, how: Execution, row_tokens: int) -> Kept:
    """Not compiled: the layer's input and the results of matrix products and attention (`_keep_expensive`)."""
    item = how.item_bytes
    kept = Kept()
    kept.add("layer inputs", shape.hidden * item)
    linears = shape.layer_linears(shape.num_layers // 2)
    kept.add("results of linears", sum(linear.outputs for linear in linears) * item)
    if not how.trains_weights:
        adapted = [linear for linear in linears if linear.last_name in how.adapted]
        kept.add("adapters", sum(linear.outputs + how.rank for linear in adapted) * item)
    kept.add("attention results", shape.query_width * item + 4 * shape.num_heads)
    if shape.num_experts:
        kept.add("MLP", shape.experts_per_token * item * (2 * shape.expert_width + shape.hidden))
    return kept
