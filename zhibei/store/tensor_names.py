"""Modules, linear layers, embedding and head of a model, told from names and shapes of tensors. Loads nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

# LLaMA and kin, GPT-2, GPT-NeoX, Falcon and BLOOM, ChatGLM, InternLM2, Meta's consolidated files.
EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.(?:base_layer\.)?weight$"
)
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output)\.(?:base_layer\.)?weight$")
POSITIONS = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings)\.weight$")
# How quantisers spell the matrix of a layer, and what they put beside it.
QUANTISED = re.compile(r"\.(qweight|weight_packed|SCB|weight\.(?:absmax|quant_map|nested_absmax|quant_state\..+))$")
DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "I32": "int32", "I64": "int64",
}  # fmt: skip


def embedding_name(tensors: Iterable[str]) -> str | None:
    """The tensor that holds one row per token id, or None."""
    return _shortest(name for name in tensors if EMBEDDING.search(name))


def head_name(tensors: Iterable[str]) -> str | None:
    """The tensor that turns the last state into logits, or None where it is tied to the embedding."""
    return _shortest(name for name in tensors if HEAD.search(name) and ".layers." not in name)


def _shortest(names: Iterable[str]) -> str | None:
    """Of several (towers of a multi-modal model have their own) the one nearest to the root."""
    return min(names, key=lambda name: (name.count("."), len(name)), default=None)


def module_names(tensors: Tensors) -> tuple[str, ...]:
    """Dotted names of all modules that hold a tensor, and of those around them, in the order of the files."""
    found: dict[str, None] = {}
    for name in tensors:
        parts = _module_of(name).split(".")
        found.update({".".join(parts[:length]): None for length in range(1, len(parts) + 1)})
    found.pop("", None)
    return tuple(found)


def _module_of(tensor: str) -> str:
    return (
        re.sub(r"\.weight$", "", QUANTISED.sub("", tensor)) if QUANTISED.search(tensor) else tensor.rpartition(".")[0]
    )


def linear_names(tensors: Tensors) -> tuple[str, ...]:
    """Dotted names of the modules with a matrix (stored plainly or quantised), embeddings and head left out."""
    found: dict[str, None] = {}
    for name, (_, shape) in tensors.items():
        if EMBEDDING.search(name) or HEAD.search(name) or POSITIONS.search(name):
            continue
        is_matrix = name.endswith(".weight") and len(shape) == 2
        if is_matrix or re.search(r"\.(?:qweight|weight_packed)$", name):
            found[_module_of(name)] = None
    return tuple(found)


def main_dtype(sizes: Mapping[str, int], tensors: Tensors) -> str:
    """The dtype of most bytes, as torch spells it; "" without tensors. `sizes` maps tensors to their bytes."""
    count: Counter[str] = Counter()
    for name, num_bytes in sizes.items():
        count[tensors[name][0]] += num_bytes
    most = count.most_common(1)
    return DTYPE_NAMES.get(most[0][0], most[0][0].lower()) if most else ""
