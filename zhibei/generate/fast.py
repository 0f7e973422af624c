"""A decode step of our own for LLaMA-like families: the same arithmetic as transformers', with little around it.

Weights are read from the model's own modules at every step. What computes the pieces of a layer is given as `Pieces`:
plain torch here, kernels in generate/kernels.py. Knows no sampling.

Dimensions: B rows, K key heads, G query heads per key head, C columns, W head width, D hidden width, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import scaled_dot_product_attention, silu

from zhibei.model.answering import plain_model
from zhibei.model.joined import Joined, Part, join, joined_product, part_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [slots, K, columns, W]."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights: norms, and projections that read the same input together."""

    norm_in: torch.Tensor
    norm_mlp: torch.Tensor
    norm_query: torch.Tensor | None
    norm_key: torch.Tensor | None
    query_key_value: Joined
    output: Joined
    gate_up: Joined
    down: Joined
    window: int | None


@dataclass(frozen=True)
class Model:
    """What a step reads."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    epsilon: float
    num_heads: int
    num_key_heads: int
    head_width: int


@dataclass(frozen=True)
class Place:
    """Where a step reads and writes: each row's position, its rotation, and how many columns matter."""

    positions_B: torch.Tensor
    cos_BW: torch.Tensor
    sin_BW: torch.Tensor
    columns: int
    masks: Mapping[int | None, torch.Tensor]
    """What is visible to each row, by window; empty for pieces that need none."""


@dataclass(frozen=True)
class Pieces:
    """The arithmetic of a layer. Streams may be changed in place."""

    enter: Callable[[torch.Tensor, torch.Tensor, float, Joined], torch.Tensor]
    """(stream, norm weight, epsilon, projections) -> projections of the normed stream, side by side."""
    attend: Callable[[torch.Tensor, Model, Layer, Cache, Place], torch.Tensor]
    """(query, key and value side by side, ...) -> mixed values; writes key and value into their column."""
    leave: Callable[[torch.Tensor, torch.Tensor, Joined], torch.Tensor]
    """(stream, values, projection) -> stream + projection of the values."""
    leave_gated: Callable[[torch.Tensor, torch.Tensor, Joined], torch.Tensor]
    """(stream, gate and up side by side, projection) -> stream + projection of silu(gate) * up."""
    norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    needs_masks: bool = True


def read_model(hf: Any, *, joins: bool) -> Model | None:
    """The weights of a model as a step reads them; None for a model that a step cannot compute.

    `joins` lays weights that read the same input into one storage (zhibei/model/joined.py).
    """
    inner = plain_model(hf)
    config = inner.config
    if config.model_type not in FAMILIES or not type(inner).__module__.startswith("transformers."):
        return None
    body = inner.base_model
    if isinstance(body, FSDPModule):  # its weights come and go: nothing may be remembered of where they lie
        return None
    layers = [_layer(module, config, index, joins=joins) for index, module in enumerate(body.layers)]
    found = tuple(layer for layer in layers if layer is not None)
    if len(found) < len(layers) or config.hidden_act != "silu":
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Model(
        embed=inner.get_input_embeddings(),
        rotary=body.rotary_emb,
        layers=found,
        norm=body.norm.weight,
        epsilon=config.rms_norm_eps,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_width=width,
    )


def places(model: Model) -> tuple[Any, ...]:
    """Where everything lies that a step reads: equal for two readings between which nothing has moved."""
    found: list[Any] = [model.norm.data_ptr()]
    for layer in model.layers:
        found += [layer.norm_in.data_ptr(), layer.norm_mlp.data_ptr()]
        for joined in (layer.query_key_value, layer.output, layer.gate_up, layer.down):
            found += [joined.factor, *(_lies(part) for part in joined.parts if joined.matrix is None)]
            tensors = [joined.matrix, joined.scales, joined.bias, joined.down, joined.up]
            found += [None if one is None else one.data_ptr() for one in tensors]
    return tuple(found)


def _lies(part: Part) -> tuple[Any, ...]:
    adapter = part.adapter
    return (id(part.layer), *((adapter.down.data_ptr(), adapter.up.data_ptr(), adapter.factor) if adapter else ()))


def _layer(module: Any, config: Any, index: int, *, joins: bool) -> Layer | None:
    attention, mlp = module.self_attn, module.mlp
    groups = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    joined = [join(group) if joins else _apart(group) for group in groups]
    query_key_value, output, gate_up, down = joined
    if query_key_value is None or output is None or gate_up is None or down is None:
        return None
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else True
    norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    return Layer(
        norm_in=module.input_layernorm.weight,
        norm_mlp=module.post_attention_layernorm.weight,
        norm_query=norms[0],
        norm_key=norms[1],
        query_key_value=query_key_value,
        output=output,
        gate_up=gate_up,
        down=down,
        window=getattr(config, "sliding_window", None) if slides else None,
    )


def _apart(modules: list[Any]) -> Joined | None:
    parts = tuple(part for part in map(part_of, modules) if part is not None)
    return Joined(parts) if len(parts) == len(modules) else None


def forward(
    model: Model,
    pieces: Pieces,
    caches: Sequence[Cache],
    tokens_B: torch.Tensor,
    positions_B: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    """Hidden states [B, D] after the final norm; keys and values of the tokens go into their columns."""
    stream_BD = model.embed(tokens_B)
    cos_B1W, sin_B1W = model.rotary(stream_BD, position_ids=positions_B.unsqueeze(1))
    windows = {layer.window for layer in model.layers} if pieces.needs_masks else set()
    masks = {window: _visible(positions_B, columns, window) for window in windows}
    place = Place(positions_B, cos_B1W.squeeze(1), sin_B1W.squeeze(1), columns, masks)
    for layer, cache in zip(model.layers, caches, strict=True):
        joined_BN = pieces.enter(stream_BD, layer.norm_in, model.epsilon, layer.query_key_value)
        stream_BD = pieces.leave(stream_BD, pieces.attend(joined_BN, model, layer, cache, place), layer.output)
        both_BN = pieces.enter(stream_BD, layer.norm_mlp, model.epsilon, layer.gate_up)
        stream_BD = pieces.leave_gated(stream_BD, both_BN, layer.down)
    return pieces.norm(stream_BD, model.norm, model.epsilon)


def enter(stream_BD: torch.Tensor, weight_D: torch.Tensor, epsilon: float, joined: Joined) -> torch.Tensor:
    """Projections of the normed stream."""
    return joined_product(norm(stream_BD, weight_D, epsilon), joined)


def leave(stream_BD: torch.Tensor, values_BN: torch.Tensor, joined: Joined) -> torch.Tensor:
    """The stream with a block's output."""
    return stream_BD + joined_product(values_BN, joined)


def leave_gated(stream_BD: torch.Tensor, both_BN: torch.Tensor, joined: Joined) -> torch.Tensor:
    """The stream with the output of a gated block: silu(gate) * up (arXiv:2002.05202)."""
    gate_BN, up_BN = both_BN.chunk(2, dim=-1)
    return stream_BD + joined_product(silu(gate_BN) * up_BN, joined)


def norm(values: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The norm by root mean square (arXiv:1910.07467), in fp32 and rounded before the weight, as transformers does."""
    wide = values.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(values.dtype)


def attend(
    joined_BN: torch.Tensor,
    model: Model,
    layer: Layer,
    cache: Cache,
    place: Place,
) -> torch.Tensor:
    """Attention of one new token of each row to the row's columns, its own included; rotary positions."""
    rows, width, key_heads = joined_BN.shape[0], model.head_width, model.num_key_heads
    sizes = [model.num_heads * width, key_heads * width, key_heads * width]
    query, key, value = (part.view(rows, -1, width) for part in joined_BN.split(sizes, dim=-1))
    if layer.norm_query is not None and layer.norm_key is not None:
        query, key = norm(query, layer.norm_query, model.epsilon), norm(key, layer.norm_key, model.epsilon)
    query, key = _rotated(query, place), _rotated(key, place)
    keys, values = cache
    rows_B = torch.arange(rows, device=joined_BN.device)
    keys[rows_B, :, place.positions_B] = key
    values[rows_B, :, place.positions_B] = value
    mixed_BKGW = scaled_dot_product_attention(
        query.view(rows, key_heads, -1, width),
        keys[:rows, :, : place.columns],
        values[:rows, :, : place.columns],
        attn_mask=place.masks[layer.window],
    )
    return mixed_BKGW.reshape(rows, -1)


def _rotated(heads_BHW: torch.Tensor, place: Place) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864), halves paired as in transformers' LLaMA."""
    left, right = heads_BHW.chunk(2, dim=-1)
    return heads_BHW * place.cos_BW.unsqueeze(1) + torch.cat((-right, left), dim=-1) * place.sin_BW.unsqueeze(1)


def _visible(positions_B: torch.Tensor, columns: int, window: int | None) -> torch.Tensor:
    distance_BC = positions_B.unsqueeze(1) - torch.arange(columns, device=positions_B.device)
    visible_BC = distance_BC >= 0
    if window is not None:
        visible_BC = visible_BC & (distance_BC < window)
    return visible_BC[:, None, None, :]


PLAIN = Pieces(enter, attend, leave, leave_gated, norm)
