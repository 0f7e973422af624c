"""A model in memory whose linear layers are packed as loading from a folder packs them. Knows nothing of measuring."""

from __future__ import annotations

from typing import Any

import torch

from zhibei.model.quantized import QuantisedLinear, import_bitsandbytes


def pack(hf: Any, kind: str) -> Any:
    """The model with every linear layer but the head packed as int8 or nf4, one after the other."""
    head = hf.get_output_embeddings()
    for name, module in list(hf.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            parent, _, last = name.rpartition(".")
            setattr(hf.get_submodule(parent), last, packed(module, kind))
    return hf


def packed(layer: torch.nn.Linear, kind: str) -> QuantisedLinear:
    """One layer, quantised by bitsandbytes."""
    functional = import_bitsandbytes().functional
    matrix = layer.weight.data
    if kind == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16))
        own = QuantisedLinear([codes, largest], how="int8", shape=matrix.shape, dtype=matrix.dtype)
    else:
        values, state = functional.quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
        parts = [values, state.absmax, state.state2.absmax, state.state2.code, state.offset]
        own = QuantisedLinear(parts, how="nf4 64", shape=matrix.shape, dtype=matrix.dtype)
    own.bias = layer.bias
    return own
