"""Linear layers that read the same input, laid side by side in one storage. Knows layers and adapters, no cache.

One product with the joined matrix gives what the layers give one by one, with fewer and wider kernels. Nothing is
copied for good: each layer's own parameter becomes a view of its rows, so whoever changes the parameter in place (an
optimiser, a checkpoint being read) changes the joined matrix, and the other way round.

Dimensions: N outputs of all layers together, I inputs, R rank of the adapter, G layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.model.quantized import QuantisedLinear


@dataclass(frozen=True)
class Adapter:
    """A low-rank addition: factor * (x A^T) B^T (arXiv:2106.09685)."""

    down: torch.Tensor
    """A, [R, I]."""
    up: torch.Tensor
    """B, [outputs, R]."""
    factor: float


@dataclass(frozen=True)
class Part:
    """One linear layer: a matrix (plain, or codes with a scale per row, or a packed layer) and perhaps an adapter."""

    layer: Any
    bias: torch.Tensor | None
    adapter: Adapter | None

    @property
    def size(self) -> int:
        return self.layer.out_features

    @property
    def how(self) -> str:
        """plain, int8, or the name of another packing."""
        return self.layer.how.split()[0] if isinstance(self.layer, QuantisedLinear) else "plain"

    @property
    def matrix(self) -> torch.Tensor:
        """What is stored: the weight, or the codes."""
        return self.layer.part_0 if self.how == "int8" else self.layer.weight


@dataclass(frozen=True)
class Joined:
    """Layers that read one input. `matrix` [N, I] (with `scales` [N] for int8 codes) exists once they are joined."""

    parts: tuple[Part, ...]
    matrix: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    down: torch.Tensor | None = None
    """A of all adapters, [G R, I]."""
    up: torch.Tensor | None = None
    """B of all adapters, [N, R]."""

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def factor(self) -> float:
        return next((part.adapter.factor for part in self.parts if part.adapter), 0.0)

    def is_current(self) -> bool:
        """Whether the layers still are views of the joined storage (moving a model to another device undoes it)."""
        if self.matrix is None:
            return False
        rows = 0
        for part in self.parts:
            if part.matrix.data_ptr() != self.matrix[rows:].data_ptr():
                return False
            rows += part.size
        return True


def part_of(module: Any) -> Part | None:
    """A linear layer as transformers, PEFT or this package made it; None for anything that is more than that."""
    adapter = None
    layer = module
    if hasattr(module, "base_layer"):
        layer = module.base_layer
        if module.merged or getattr(module, "lora_variant", None):
            return None
        names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
        if len(names) > 1 or type(module).__module__.split(".")[:3] != ["peft", "tuners", "lora"]:
            return None
        if names:
            down, up = module.lora_A[names[0]], module.lora_B[names[0]]
            if up.bias is not None:
                return None
            adapter = Adapter(down.weight, up.weight, float(module.scaling[names[0]]))
    is_plain = type(layer) is torch.nn.Linear
    if not is_plain and not isinstance(layer, QuantisedLinear):
        return None
    return Part(layer, layer.bias, adapter)


def product(x_BI: torch.Tensor, part: Part) -> torch.Tensor:
    """What the layer gives."""
    is_plain = part.how == "plain"
    out_BN = torch.nn.functional.linear(x_BI, part.layer.weight, part.bias) if is_plain else part.layer(x_BI)
    if part.adapter is None:
        return out_BN
    low_BR = torch.nn.functional.linear(x_BI.to(part.adapter.down.dtype), part.adapter.down)
    return out_BN + (torch.nn.functional.linear(low_BR, part.adapter.up) * part.adapter.factor).to(out_BN.dtype)


def join(modules: Sequence[Any]) -> Joined | None:
    """Lay these layers' matrices, biases and adapters side by side; None where one of them is no plain linear layer.

    Layers that cannot be laid side by side (packed in 4 bits, or of different kinds) stay apart: `matrix` is None.
    """
    parts = tuple(part_of(module) for module in modules)
    found = tuple(part for part in parts if part is not None)
    if len(found) < len(parts):
        return None
    kinds = {(part.how, part.matrix.dtype if part.how in ("plain", "int8") else None) for part in found}
    adapters = [part.adapter for part in found if part.adapter is not None]
    alike = {(one.down.shape[0], one.factor, one.down.dtype) for one in adapters}
    if len(kinds) > 1 or len(alike) > 1 or found[0].how not in ("plain", "int8"):
        return Joined(found)
    matrix = _side_by_side([part.matrix for part in found], into=_places(found))
    scales = None
    if found[0].how == "int8":
        scales = torch.cat([part.layer.part_1.float() / 127.0 for part in found])
    bias = _biases(found, matrix)
    down, up = _adapters(found) if adapters else (None, None)
    return Joined(tuple(part for part in map(part_of, modules) if part is not None), matrix, scales, bias, down, up)


def _places(parts: Sequence[Part]) -> list[Any]:
    def place(part: Part) -> Any:
        def put(view: torch.Tensor) -> None:
            if part.how == "int8":
                part.layer.part_0 = view
            else:
                part.layer.weight.data = view

        return put

    return [place(part) for part in parts]


def _side_by_side(tensors: Sequence[torch.Tensor], *, into: Sequence[Any]) -> torch.Tensor:
    """The tensors below one another in one storage, each replaced by its view; as they are when they lie so already."""
    first = tensors[0]
    lies_so, rows = True, 0
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        expected = first.storage_offset() + rows * first.stride(0)
        lies_so = lies_so and same and tensor.is_contiguous() and tensor.storage_offset() == expected
        rows += tensor.shape[0]
    size = (rows, *first.shape[1:])
    if lies_so:
        return first.detach().as_strided(size, first.stride(), first.storage_offset())
    joined = torch.cat([tensor.detach() for tensor in tensors])
    for put, view in zip(into, joined.split([tensor.shape[0] for tensor in tensors]), strict=True):
        put(view)
    return joined


def _biases(parts: Sequence[Part], matrix: torch.Tensor) -> torch.Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    dtype = matrix.dtype if matrix.is_floating_point() else next(p.bias.dtype for p in parts if p.bias is not None)
    filled = [matrix.new_zeros(part.size, dtype=dtype) if part.bias is None else part.bias for part in parts]
    return _side_by_side(filled, into=[_data_of(part.bias) for part in parts])


def _data_of(parameter: Any) -> Any:
    def put(view: torch.Tensor) -> None:
        if parameter is not None:
            parameter.data = view

    return put


def _adapters(parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of all parts; a part without an adapter gets zeros."""
    known = next(part.adapter for part in parts if part.adapter)
    downs = [part.adapter.down if part.adapter else torch.zeros_like(known.down) for part in parts]
    ups = [part.adapter.up if part.adapter else known.up.new_zeros(part.size, known.up.shape[1]) for part in parts]
    places = [[_data_of(getattr(part.adapter, name, None)) for part in parts] for name in ("down", "up")]
    return _side_by_side(downs, into=places[0]), _side_by_side(ups, into=places[1])


def joined_product(x_BI: torch.Tensor, joined: Joined) -> torch.Tensor:
    """What all layers give, side by side [B, N]."""
    if joined.matrix is None or joined.scales is not None:
        # Codes are unpacked one layer after the other: that is what the memory plan counts.
        outs = [product(x_BI, part) for part in joined.parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
    out_BN = torch.nn.functional.linear(x_BI, joined.matrix, joined.bias)
    return out_BN if joined.down is None else add_adapters_of(x_BI, joined, out_BN)


def add_adapters_of(x_BI: torch.Tensor, joined: Joined, out_BN: torch.Tensor) -> torch.Tensor:
    """Add the low-rank products of all parts, in place; returns the sum."""
    assert joined.down is not None
    assert joined.up is not None
    rank = joined.up.shape[1]
    low_BR = torch.nn.functional.linear(x_BI.to(joined.down.dtype), joined.down)
    rows = 0
    for number, part in enumerate(joined.parts):
        if part.adapter is not None:
            low = low_BR[:, number * rank : (number + 1) * rank]
            added = torch.nn.functional.linear(low, joined.up[rows : rows + part.size]) * joined.factor
            out_BN[:, rows : rows + part.size] += added.to(out_BN.dtype)
        rows += part.size
    return out_BN
