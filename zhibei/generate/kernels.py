"""Triton kernels of the decode step on a GPU, and how the step is pieced together from them. Knows no model family.

With few rows a step is bound by reading the weights: `_few_rows` reads a matrix of int8 codes once, with the norm or
the gate in front of it and the bias, adapter and residual stream behind it. Other products are the library's.
Attention reads each row's own columns and no others, so nothing depends on the longest row.

Dimensions: B rows, N outputs, I inputs, C columns, W head width, G query heads per key head, R adapter rank.
"""

# pyright: reportIndexIssue=false
# (Triton's functions are launched by subscription: kernel[grid](...).)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from zhibei.generate import fast
from zhibei.model.joined import Joined, add_adapters_of, joined_product

FEW_ROWS = 16
"""Up to so many rows, int8 codes are read by `_few_rows`. On an H200 it read 16-bit weights at 0.9 TB/s for one row,
where the library needs 6.8 ms for 64 rows of a 7B model (docs/measurements.md), so those are left to the library; for
64 rows of codes it was slower than unpacking them."""
_PLAIN, _NORMED, _GATED = 0, 1, 2


@triton.jit
def _few_rows(
    x_ptr, w_ptr, scales_ptr, bias_ptr, norm_ptr, stream_ptr, low_ptr, up_ptr, out_ptr,
    rows, outputs, inputs, first_end, second_end, epsilon, factor,
    FRONT: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STREAM: tl.constexpr,
    RANK: tl.constexpr, NUM_LOW: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out = stream + front(x) W^T (scales) + bias + factor (low) up^T, for one block of outputs and all rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_I)
    in_n, in_b = n < outputs, b < rows
    width = inputs * (2 if FRONT == 2 else 1)
    total = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
    squares = tl.zeros([BLOCK_B], dtype=tl.float32)
    for start in range(0, inputs, BLOCK_I):
        at = start + i
        in_i = at < inputs
        w = tl.load(w_ptr + n[:, None].to(tl.int64) * inputs + at[None, :], mask=in_n[:, None] & in_i[None, :], other=0)
        both = in_b[:, None] & in_i[None, :]
        x = tl.load(x_ptr + b[:, None] * width + at[None, :], mask=both, other=0.0)
        if FRONT == 1:
            g = tl.load(norm_ptr + at, mask=in_i, other=0.0)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            x = (wide * g.to(tl.float32)[None, :]).to(x.dtype)
        if FRONT == 2:
            up = tl.load(x_ptr + b[:, None] * width + inputs + at[None, :], mask=both, other=0.0)
            gate = x.to(tl.float32)
            x = (gate * tl.sigmoid(gate)).to(up.dtype) * up
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total)
    if FRONT == 1:
        total *= tl.rsqrt(squares / inputs + epsilon)[:, None]
    if HAS_SCALES:
        total *= tl.load(scales_ptr + n, mask=in_n, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    place = b[:, None] * outputs + n[None, :]
    inside = in_b[:, None] & in_n[None, :]
    kind = out_ptr.dtype.element_ty
    if RANK > 0:
        group = (n >= first_end).to(tl.int32) + (n >= second_end).to(tl.int32)
        added = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
        for r in range(RANK):
            low = tl.load(low_ptr + b[:, None] * NUM_LOW + group[None, :] * RANK + r, mask=inside, other=0.0)
            up_n = tl.load(up_ptr + n.to(tl.int64) * RANK + r, mask=in_n, other=0.0)
            added += low.to(tl.float32) * up_n.to(tl.float32)[None, :]
        total += added * factor
    if HAS_STREAM:
        stream = tl.load(stream_ptr + place, mask=inside, other=0.0)
        total = total.to(kind).to(tl.float32) + stream.to(tl.float32)
    tl.store(out_ptr + place, total.to(kind), mask=inside)


@triton.jit
def _norm(x_ptr, weight_ptr, out_ptr, width, epsilon, BLOCK: tl.constexpr):
    """One row: its norm by root mean square, rounded before the weight."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide) / width + epsilon)).to(x.dtype)
    weight = tl.load(weight_ptr + at, mask=at < width, other=0.0)
    tl.store(out_ptr + row * width + at, (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype), mask=at < width)


@triton.jit
def _gate(both_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """silu(left half) * right half of one row's block."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both_ptr + row * 2 * width + at, mask=at < width, other=0.0)
    up = tl.load(both_ptr + row * 2 * width + width + at, mask=at < width, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out_ptr + row * width + at, (wide * tl.sigmoid(wide)).to(up.dtype) * up, mask=at < width)


@triton.jit
def _rotated(at_ptr, norm_ptr, cos, sin, w, epsilon, HAS_NORM: tl.constexpr, W: tl.constexpr):
    """Heads [G, W] at pointers `at_ptr` [G, 1], normed where the family does so, with rotary positions."""
    partner = tl.where(w < W // 2, w + W // 2, w - W // 2)
    sign = tl.where(w < W // 2, -1.0, 1.0)
    x = tl.load(at_ptr + w[None, :])
    y = tl.load(at_ptr + partner[None, :])
    kind = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / W + epsilon)[:, None]
        x = ((x * factor).to(kind).to(tl.float32) * tl.load(norm_ptr + w).to(tl.float32)[None, :]).to(kind)
        y = ((y * factor).to(kind).to(tl.float32) * tl.load(norm_ptr + partner).to(tl.float32)[None, :]).to(kind)
        x, y = x.to(tl.float32), y.to(tl.float32)
    return (x * cos[None, :] + y * sign[None, :] * sin[None, :]).to(kind)


@triton.jit
def _attend(
    joined_ptr, cos_ptr, sin_ptr, positions_ptr, keys_ptr, values_ptr, norm_query_ptr, norm_key_ptr, out_ptr,
    row_stride, slot_stride, head_stride, columns, window, scale, epsilon,
    HAS_NORM: tl.constexpr, KEY_HEADS: tl.constexpr, G: tl.constexpr, G_PADDED: tl.constexpr, W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row's key head and its query heads: rotate, write key and value, attend to the columns before and itself."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = tl.arange(0, W)
    g = tl.arange(0, G_PADDED)
    position = tl.minimum(tl.load(positions_ptr + row), columns - 1)
    cos = tl.load(cos_ptr + row * W + w).to(tl.float32)
    sin = tl.load(sin_ptr + row * W + w).to(tl.float32)
    base = joined_ptr + row * row_stride
    one = tl.zeros([1, 1], dtype=tl.int32)
    key = _rotated(base + (KEY_HEADS * G + head) * W + one, norm_key_ptr, cos, sin, w, epsilon, HAS_NORM, W)
    value = tl.load(base + (KEY_HEADS * G + KEY_HEADS + head) * W + w)
    g_real = tl.where(g < G, g, 0)
    query = _rotated(base + (head * G + g_real[:, None]) * W, norm_query_ptr, cos, sin, w, epsilon, HAS_NORM, W)
    held = row * slot_stride + head * head_stride
    tl.store(keys_ptr + held + position * W + w[None, :], key)
    tl.store(values_ptr + held + position * W + w, value)
    # The row's own column comes from here, not from memory, where others' writes may not be seen yet.
    best = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1) * scale
    weight = tl.full([G_PADDED], 1.0, dtype=tl.float32)
    mixed = tl.zeros([G_PADDED, W], dtype=tl.float32) + value.to(tl.float32)[None, :]
    first = tl.maximum(position - window + 1, 0) // BLOCK_C * BLOCK_C
    for start in range(first, position, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        seen = (c < position) & (c > position - window)
        keys = tl.load(keys_ptr + held + c[:, None] * W + w[None, :], mask=seen[:, None], other=0.0)
        values = tl.load(values_ptr + held + c[:, None] * W + w[None, :], mask=seen[:, None], other=0.0)
        if G_PADDED == 1:
            scores = tl.sum(keys.to(tl.float32) * query.to(tl.float32), axis=1)[None, :] * scale
        else:
            scores = tl.dot(query, tl.trans(keys)) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - higher)
        shares = tl.exp(scores - higher[:, None])
        weight = weight * shrink + tl.sum(shares, axis=1)
        if G_PADDED == 1:
            added = tl.sum(tl.trans(shares) * values.to(tl.float32), axis=0)[None, :]
        else:
            added = tl.dot(shares.to(values.dtype), values)
        mixed = mixed * shrink[:, None] + added
        best = higher
    mixed = mixed / weight[:, None]
    out = out_ptr + row * (KEY_HEADS * G * W) + (head * G + g[:, None]) * W + w[None, :]
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=(g < G)[:, None] & (w < W)[None, :])


def takes_few_rows(x_BI: torch.Tensor, joined: Joined) -> bool:
    """Whether `_few_rows` computes this product."""
    return joined.matrix is not None and joined.scales is not None and x_BI.shape[0] <= FEW_ROWS


@dataclass(frozen=True)
class Front:
    """What happens to the values before the product."""

    kind: int = _PLAIN
    weight: torch.Tensor | None = None
    epsilon: float = 0.0


def few_rows(x_BI: torch.Tensor, joined: Joined, front: Front, stream_BN: torch.Tensor | None = None) -> torch.Tensor:
    """A joined product with what stands before and behind it; the adapters' low side is a product of its own."""
    assert joined.matrix is not None
    low, rank, num_low = None, 0, 1
    if joined.down is not None and joined.up is not None:
        low = _launch(x_BI, joined.down, front)
        rank, num_low = joined.up.shape[1], joined.down.shape[0]
    ends = [part.size for part in joined.parts]
    edges = (ends[0], ends[0] + ends[1] if len(ends) > 1 else joined.size)
    adapter = (low, joined.up, rank, num_low, joined.factor, edges)
    return _launch(x_BI, joined.matrix, front, stream_BN, adapter, (joined.scales, joined.bias))


def _launch(
    x_BI: torch.Tensor,
    matrix: torch.Tensor,
    front: Front,
    stream: torch.Tensor | None = None,
    adapter: tuple[Any, ...] | None = None,
    rest: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    rows, (outputs, inputs) = x_BI.shape[0], matrix.shape
    out = x_BI.new_empty(rows, outputs)
    low, up, rank, num_low, factor, edges = adapter or (None, None, 0, 1, 0.0, (outputs, outputs))
    scales, bias = rest
    block_n, block_i, warps, stages = block_of(outputs, is_codes=scales is not None, rows=rows)
    # What a kernel is told not to read still needs an address.
    optional = [x_BI if one is None else one for one in (scales, bias, front.weight, stream, low, up)]
    _few_rows[(triton.cdiv(outputs, block_n),)](
        x_BI, matrix, *optional, out, rows, outputs, inputs, edges[0], edges[1], front.epsilon, factor,
        FRONT=front.kind, HAS_SCALES=scales is not None, HAS_BIAS=bias is not None, HAS_STREAM=stream is not None,
        RANK=rank, NUM_LOW=num_low, BLOCK_B=max(16, triton.next_power_of_2(rows)), BLOCK_N=block_n, BLOCK_I=block_i,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def block_of(outputs: int, *, is_codes: bool, rows: int) -> tuple[int, int, int, int]:
    """(outputs and inputs per block, warps, stages): enough blocks for all multiprocessors, enough bytes under way."""
    if rows > FEW_ROWS:  # the rows take most of the shared memory
        return 32, 128, 4, 4
    if outputs <= 512:
        return 16, 512, 4, 3
    wide = 32 if outputs > 8192 else 16
    return (wide, 256, 4, 4) if not is_codes else (wide, 256, 4, 5)


def norm(x_BD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The norm by root mean square of every row."""
    out = torch.empty_like(x_BD)
    block = triton.next_power_of_2(x_BD.shape[1])
    _norm[(x_BD.shape[0],)](x_BD, weight_D, out, x_BD.shape[1], epsilon, BLOCK=block, num_warps=8)
    return out


def enter(stream_BD: torch.Tensor, weight_D: torch.Tensor, epsilon: float, joined: Joined) -> torch.Tensor:
    """Projections of the normed stream."""
    if takes_few_rows(stream_BD, joined):
        return few_rows(stream_BD, joined, Front(_NORMED, weight_D, epsilon))
    return joined_product(norm(stream_BD, weight_D, epsilon), joined)


def leave(stream_BD: torch.Tensor, values_BN: torch.Tensor, joined: Joined) -> torch.Tensor:
    """The stream with a block's output."""
    if takes_few_rows(values_BN, joined):
        return few_rows(values_BN, joined, Front(), stream_BD)
    if joined.matrix is None or joined.scales is not None or joined.bias is not None:
        return stream_BD + joined_product(values_BN, joined)
    stream_BD.addmm_(values_BN, joined.matrix.t())
    return stream_BD if joined.down is None else add_adapters_of(values_BN, joined, stream_BD)


def leave_gated(stream_BD: torch.Tensor, both_BN: torch.Tensor, joined: Joined) -> torch.Tensor:
    """The stream with the output of a gated block."""
    if takes_few_rows(both_BN, joined):
        return few_rows(both_BN, joined, Front(_GATED), stream_BD)
    width = both_BN.shape[1] // 2
    out = both_BN.new_empty(both_BN.shape[0], width)
    _gate[(both_BN.shape[0], triton.cdiv(width, 1024))](both_BN, out, width, BLOCK=1024, num_warps=4)
    return leave(stream_BD, out, joined)


def attend(
    joined_BN: torch.Tensor, model: fast.Model, layer: fast.Layer, cache: fast.Cache, place: fast.Place
) -> torch.Tensor:
    """Attention of one new token of each row to the row's own columns."""
    keys, values = cache
    rows, width, key_heads = joined_BN.shape[0], model.head_width, model.num_key_heads
    group = model.num_heads // key_heads
    out = joined_BN.new_empty(rows, model.num_heads * width)
    has_norm = layer.norm_query is not None
    padded = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    _attend[(rows, key_heads)](
        joined_BN, place.cos_BW, place.sin_BW, place.positions_B, keys, values,
        layer.norm_query if has_norm else joined_BN, layer.norm_key if has_norm else joined_BN, out,
        joined_BN.shape[1], keys.stride(0), keys.stride(1), keys.shape[2], layer.window or 2**30, width**-0.5,
        model.epsilon,
        HAS_NORM=has_norm, KEY_HEADS=key_heads, G=group, G_PADDED=padded, W=width, BLOCK_C=64,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


KERNELS = fast.Pieces(enter, attend, leave, leave_gated, norm, needs_masks=False)
