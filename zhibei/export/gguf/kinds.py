"""Which type each tensor of a GGUF file gets: the mixtures that llama.cpp's own quantiser writes. Knows no bytes.

The rules are those of llama-quant.cpp (ggml-org/llama.cpp, 2026): more bits for values and for what leads out of a
feed-forward block in the first and last eighth of the layers and every third between, six bits for the output matrix,
and a type with smaller blocks where a row is no multiple of the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zhibei.config.errors import UserError


@dataclass(frozen=True)
class Kind:
    """One way of writing a model: llama.cpp's number for it, and the type of most of its matrices."""

    name: str
    number: int
    type: str
    wants_importance: bool = False


_KINDS = (
    Kind("F32", 0, "F32"),
    Kind("F16", 1, "F16"),
    Kind("BF16", 32, "BF16"),
    Kind("Q8_0", 7, "Q8_0"),
    Kind("Q6_K", 18, "Q6_K"),
    Kind("Q5_K_M", 17, "Q5_K"),
    Kind("Q5_K_S", 16, "Q5_K"),
    Kind("Q4_K_M", 15, "Q4_K"),
    Kind("Q4_K_S", 14, "Q4_K"),
    Kind("Q4_0", 2, "Q4_0"),
    Kind("Q3_K_M", 12, "Q3_K"),
    Kind("Q2_K", 10, "Q2_K"),
    Kind("IQ4_NL", 25, "IQ4_NL"),
    Kind("IQ4_XS", 30, "IQ4_XS"),
    Kind("IQ3_M", 27, "IQ3_S", wants_importance=True),
    Kind("IQ3_S", 26, "IQ3_S", wants_importance=True),
    Kind("IQ3_XXS", 23, "IQ3_XXS", wants_importance=True),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
PLAIN = ("F32", "F16", "BF16")

BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "IQ4_NL": 32}
"""Values in a block; 256 for every type not named."""
BLOCK_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "IQ4_NL": 18,
    "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136, "IQ3_S": 110, "IQ3_XXS": 98,
    "IQ2_S": 82,
}  # fmt: skip
_FALLBACKS = {
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """What the mixtures depend on besides a tensor's name."""

    architecture: str
    num_layers: int
    heads_per_kv: int
    is_tied: bool
    has_importance: bool = False

    @property
    def is_70b(self) -> bool:
        """llama.cpp gives values more bits where 8 heads share them and there are 80 layers."""
        wanted = {"llama": self.heads_per_kv > 1, "qwen2": True}
        return self.num_layers == 80 and wanted.get(self.architecture, False)


def find_kind(name: str) -> Kind:
    """The kind called `name` in any spelling, e.g. "q4_k_m". Raises UserError with the list."""
    wanted = name.upper().replace("-", "_")
    if wanted not in KINDS:
        raise UserError(
            f"no GGUF type is called {name!r}",
            expected=f"one of {', '.join(KINDS)}",
            fix="Q8_0 loses next to nothing, Q4_K_M is the usual small one",
            where="types",
        )
    return KINDS[wanted]


def row_bytes(type_name: str, width: int) -> int:
    """Bytes of one row of `width` values."""
    return width // BLOCKS.get(type_name, 256) * BLOCK_BYTES[type_name]


def types_of(kind: Kind, tensors: Mapping[str, Sequence[int]], shape: Shape) -> dict[str, str]:
    """The type of every tensor, from its name and shape [rows, ..., width]."""
    return {name: _type_of(kind, name, sizes, shape) for name, sizes in tensors.items()}


def _type_of(kind: Kind, name: str, sizes: Sequence[int], shape: Shape) -> str:
    if len(sizes) < 2 or "_norm.weight" in name or not name.endswith("weight"):
        return "F32"
    if kind.name in PLAIN:
        return kind.type
    width = sizes[-1]
    if name == "output.weight" or (shape.is_tied and name == "token_embd.weight"):
        return fitting(_output_type(kind, width), width)
    layer = int(found.group(1)) if (found := LAYER.match(name)) else 0
    wanted = kind.type
    for part, rule in _RULES.items():
        if part in name:
            wanted = rule(kind, layer, shape)
    return fitting(wanted, width)


def fitting(type_name: str, width: int) -> str:
    """The type itself, or the one llama.cpp takes where a row is no multiple of its block."""
    if width % BLOCKS.get(type_name, 256) == 0:
        return type_name
    other = _FALLBACKS.get(type_name, "F16")
    return other if width % BLOCKS.get(other, 256) == 0 else "F16"


def _output_type(kind: Kind, width: int) -> str:
    if width % BLOCKS.get(kind.type, 256) or kind.type == "Q8_0":
        return "Q8_0"
    return "Q5_K" if kind.name == "IQ3_XXS" else "Q6_K"


def gets_more_bits(layer: int, num_layers: int) -> bool:
    """The first eighth, the last eighth, and every third layer between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _values(kind: Kind, layer: int, shape: Shape) -> str:
    wide = shape.heads_per_kv >= 4
    more = gets_more_bits(layer, shape.num_layers)
    found = {
        "Q2_K": "Q4_K" if wide else "Q3_K",
        "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
        "Q4_K_S": "Q5_K" if layer < 4 else "Q4_K",
        "Q4_K_M": "Q6_K" if more else "Q4_K",
        "Q5_K_M": "Q6_K" if more else "Q5_K",
        "IQ4_NL": "Q5_K" if wide else kind.type,
        "IQ4_XS": "Q5_K" if wide else kind.type,
        "IQ3_M": "Q4_K",
        "IQ3_S": "Q4_K" if wide else kind.type,
        "IQ3_XXS": "Q4_K" if wide else "IQ3_XXS" if shape.has_importance else "IQ3_S",
    }.get(kind.name, kind.type)
    return "Q5_K" if shape.is_70b and found in ("Q3_K", "Q4_K") else found


def _down(kind: Kind, layer: int, shape: Shape) -> str:
    is_early = layer < shape.num_layers // 8
    more = gets_more_bits(layer, shape.num_layers)
    return {
        "Q2_K": "Q3_K",
        "Q3_K_M": "Q5_K" if layer < shape.num_layers // 16 else "Q4_K",
        "Q4_K_S": "Q5_K" if is_early else "Q4_K",
        "Q4_K_M": "Q6_K" if more else "Q4_K",
        "Q5_K_M": "Q6_K" if more else "Q5_K",
        "Q4_0": "Q4_1" if shape.has_importance and is_early else "Q4_0",
        "IQ4_NL": "Q5_K" if is_early and not shape.has_importance else kind.type,
        "IQ4_XS": "Q5_K" if is_early and not shape.has_importance else kind.type,
        "IQ3_M": "Q4_K" if is_early else kind.type,
        "IQ3_XXS": kind.type if shape.has_importance else "Q4_K" if is_early else "Q3_K",
    }.get(kind.name, kind.type)


def _attention_output(kind: Kind, layer: int, shape: Shape) -> str:
    found = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "IQ3_M": "Q4_K", "IQ3_XXS": "IQ3_S"}
    return found.get(kind.name, kind.type)


def _queries_and_keys(kind: Kind, layer: int, shape: Shape) -> str:
    return "IQ2_S" if kind.name == "IQ3_XXS" else kind.type


def _embedding(kind: Kind, layer: int, shape: Shape) -> str:
    return "IQ3_S" if kind.name == "IQ3_XXS" else kind.type


_RULES: dict[str, Callable[[Kind, int, Shape], str]] = {
    "token_embd.weight": _embedding,
    "attn_q.weight": _queries_and_keys,
    "attn_k.weight": _queries_and_keys,
    "attn_v.weight": _values,
    "attn_qkv.weight": _values,
    "attn_output.weight": _attention_output,
    "ffn_down": _down,
}
