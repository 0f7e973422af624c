"""Attention over packed rows that never see one another, registered with transformers. Knows borders, not rows.

Dimensions: B batch (1 when packed), H query heads, K key heads, T tokens, D head width, R rows in the pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

VARLEN = "zhibei_varlen"
DOCUMENTS = "zhibei_documents"
# Arguments some families pass that these kernels do not implement; ignoring them would be silently wrong.
UNSUPPORTED = ("s_aux", "position_bias", "sinks")


class RowLengths:
    """Row lengths in a box that torch.compile does not look into (a bare tuple would be compiled in)."""

    __slots__ = ("lengths",)

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


def register() -> None:
    """Make both kernels known to transformers; the mask functions return none, since borders do the masking."""
    for name, function in ((VARLEN, varlen_attention), (DOCUMENTS, document_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


def plain_attention(config: Any, *, has_sdpa: bool = True) -> str:
    """transformers' own attention for unpacked batches and sampling. Soft-capped scores need eager: transformers 5.17
    takes sdpa for them and leaves the cap out, later versions refuse."""
    has_softcap = config.to_dict().get("attn_logit_softcapping") is not None
    return "eager" if has_softcap or not has_sdpa else "sdpa"


def varlen_is_available(device: torch.device) -> bool:
    """Whether torch's variable-length flash attention runs here: CUDA of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """One flash-attention kernel over all rows of the pack (CUDA); grouped-query heads and sliding windows included."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse(module, options)
    if options.get("softcap") is not None:
        raise NotImplementedError("the varlen kernel has no soft cap; load_model picks 'documents' for such families")
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query_BHTD, key_BKTD, value_BKTD))
    # torch 2.10 has no enable_gqa here; repeating heads is exact everywhere.
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    window = options.get("sliding_window")
    borders, longest = options["borders"], options["longest"]
    mixed = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        borders,
        borders,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed[None], None


@torch.compiler.disable
def document_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Exact attention row by row, on any device: the work is the sum of squares, not the square of the sum."""
    _refuse(module, options)
    groups = query_BHTD.shape[1] // key_BKTD.shape[1]
    window, softcap, scale = options.get("sliding_window"), options.get("softcap"), options.get("scaling")
    if groups > 1:
        key_BKTD, value_BKTD = (x.repeat_interleave(groups, dim=1) for x in (key_BKTD, value_BKTD))
    # One split per tensor: its backward is one concatenation, not a sum of as many padded slices as there are rows.
    lengths = options["rows"].lengths
    parts = zip(*(x.split(lengths, dim=2) for x in (query_BHTD, key_BKTD, value_BKTD)), strict=True)
    mixed = [_one_row(query, key, value, scale=scale, window=window, softcap=softcap) for query, key, value in parts]
    return torch.cat(mixed, dim=2).transpose(1, 2), None


def _one_row(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    *,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention inside one row; the band mask of a sliding window is built only for rows longer than it."""
    num_tokens = query_BHTD.shape[2]
    if softcap is None and (window is None or num_tokens <= window):
        return scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, is_causal=True, scale=scale)
    position_T = torch.arange(num_tokens, device=query_BHTD.device)
    distance_TT = position_T[:, None] - position_T[None, :]
    visible_TT = (distance_TT >= 0) & (distance_TT < (window or num_tokens))
    if softcap is None:
        return scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, attn_mask=visible_TT, scale=scale)
    factor = query_BHTD.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTT = softcap * torch.tanh(query_BHTD @ key_BHTD.transpose(2, 3) * factor / softcap)
    weights_BHTT = scores_BHTT.masked_fill(~visible_TT, float("-inf")).float().softmax(dim=-1)
    return weights_BHTT.to(value_BHTD.dtype) @ value_BHTD


def _refuse(module: torch.nn.Module, options: dict[str, Any]) -> None:
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} passes {name}, which packed attention does not know")
    if options.get("dropout") and module.training:
        raise NotImplementedError("attention dropout is not available for packed rows")
