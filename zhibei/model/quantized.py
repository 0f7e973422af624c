"""A frozen base held in 8 or 4 bits: its linear layers, and the product with them. Knows layers, not rows or loops.

bitsandbytes quantises (LLM.int8, arXiv:2208.07339; NF4 with double quantisation, arXiv:2305.14314) and unpacks; the
layer around it is ours, for four reasons. The product is one operation that torch.compile sees from outside, so that
whole decoder layers compile and the unpacked matrix is never kept for the backward pass. Activations are not rounded:
int8 weights enter a product in the model's type, so LLM.int8's outliers (its threshold of 6.0 picks the activations
that are too large for 8 bits) need no path of their own. Two passes over the same rows, packed or padded, with or
without gradients, do the same arithmetic. And a layer never changes its weights: bitsandbytes' own 4-bit layer reorders
them in place on processors with AVX512-BF16 as soon as it runs without gradients, after which they cannot be read back.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from zhibei.config.errors import UserError
from zhibei.config.run import ModelSection
from zhibei.text.hub import no_fetched_kernels

QuantizeKind = Literal["none", "int8", "nf4"]
BLOCK, SCALES_BLOCK = 64, 256
"""Values that share one scale in a 4-bit matrix, and scales that share one when they are quantised themselves."""
FEW_ROWS = 16
"""Up to so many rows a product is bound by reading the weights: a kernel that reads them packed is faster."""


def import_bitsandbytes(asked_by: str = "model.quantize") -> Any:
    """bitsandbytes, without the code it would fetch from the hub. Raises UserError where it is missing or broken."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{asked_by} holds the base in few bits through bitsandbytes, which is not installed",
            expected="bitsandbytes 0.50",
            fix="pip install 'zhibei[bnb]', or leave the base unquantised",
            where=asked_by,
        )
    try:
        with no_fetched_kernels():
            import bitsandbytes
    except Exception as error:  # a build for another CUDA raises RuntimeError, OSError or ImportError
        raise UserError(
            f"bitsandbytes cannot be loaded ({type(error).__name__}: {error})",
            expected="a bitsandbytes that fits the installed torch",
            fix="pip install --upgrade 'zhibei[bnb]', or leave the base unquantised",
            where=asked_by,
        ) from error
    # It says once per layer and call that activations are cast to fp16, also while it only quantises weights.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def quantization_config(kind: str) -> Any:
    """What transformers is told while loading: which layers it packs, and how. Head, embeddings and norms stay.

    int8: a byte per value and an fp32 scale per row. nf4: half a byte per value, scales of 64 values held in 8 bits.
    """
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


@dataclass(frozen=True)
class Packing:
    """How a base comes into memory: `kind` none, int8, nf4 or fp4, and what transformers is told beside the rest."""

    kind: str
    options: Mapping[str, Any]

    @contextmanager
    def watched(self) -> Iterator[list[torch.Tensor]]:
        """Whether each matrix that is quantised within this was finite. Quantising passes over NaN without a trace."""
        flags: list[torch.Tensor] = []
        if self.kind == "none":
            yield flags
            return
        watched = (torch.ops.bitsandbytes.quantize_4bit.default, torch.ops.bitsandbytes.int8_vectorwise_quant.default)

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func in watched:
                    flags.append(torch.isfinite(args[0]).all())
                return func(*args, **(kwargs or {}))

        with Watch():
            yield flags


def packing_of(section: ModelSection, config: Any, weights: str) -> Packing:
    """How the weights of a folder or hub id are to be loaded, given its config.json.

    Weights that are stored in few bits stay as they are. Raises UserError for kinds that cannot be read here, for a
    kind other than the stored one, and for training all of the weights of a packed model.
    """
    wanted, stored = section.held_as, _stored_kind(config, weights)
    if stored == "none":
        options = {"quantization_config": quantization_config(wanted)} if wanted != "none" else {}
        return Packing(wanted, options)
    if wanted not in ("none", stored):
        raise UserError(
            f"model.quantize: {wanted}, but the weights of {weights} are stored as {stored}",
            expected=f"model.quantize: {stored}, or a folder with 16-bit weights",
            fix="name the folder that this one was quantised from, or set model.quantize to what is stored",
            where="model.quantize",
        )
    import_bitsandbytes("model.path")
    return Packing(stored, {})


def _stored_kind(config: Any, weights: str) -> str:
    named = getattr(config, "quantization_config", None)
    if not named:
        return "none"
    entry = named if isinstance(named, dict) else named.to_dict()
    if entry.get("quant_method") in ("bitsandbytes", None) and (entry.get("load_in_8bit") or entry.get("load_in_4bit")):
        return "int8" if entry.get("load_in_8bit") else str(entry.get("bnb_4bit_quant_type", "fp4"))
    raise UserError(
        f"the weights of {weights} are stored quantised as {entry.get('quant_method', 'an unknown kind')}",
        expected="16-bit weights, or weights that bitsandbytes quantised (8 bits, nf4 or fp4)",
        fix="use the model that this one was made from, and set model.quantize: nf4 or int8 to save memory",
        where="model.path",
    )


class QuantisedLinear(torch.nn.Linear):
    """A frozen linear layer whose matrix lies packed in buffers.

    It is a `Linear` because PEFT and others recognise layers by their class; nothing of Linear's own is used.
    `weight` unpacks the matrix, for those who ask for its type or norm; assigning to what it returns changes nothing.
    """

    def __init__(self, parts: Sequence[torch.Tensor], *, how: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.how, self.dtype = how, dtype
        self.num_parts = len(parts)
        for number, part in enumerate(parts):
            self.register_buffer(f"part_{number}", part)
        self.register_parameter("bias", None)

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The matrix [outputs, inputs], unpacked."""
        return unpacked(self.parts, self.how, self.out_features, self.in_features, self.dtype)

    @property
    def parts(self) -> list[torch.Tensor]:
        """The packed values, then their scales."""
        return [getattr(self, f"part_{number}") for number in range(self.num_parts)]

    def make_dividable(self) -> None:
        """Hold the codes as parameters: FSDP divides nothing else. Floating scales are few and stay whole everywhere,
        since what is gathered for a product comes in the model's type."""
        for number, part in enumerate(self.parts):
            if part.ndim and not part.is_floating_point():
                delattr(self, f"part_{number}")
                self.register_parameter(f"part_{number}", torch.nn.Parameter(part, requires_grad=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts, size = self.parts, (self.out_features, self.in_features)
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        num_rows = input.numel() // input.shape[-1]
        if not needs_gradient and num_rows <= FEW_ROWS and input.is_cuda:
            output = FEW_ROW_PRODUCTS[self.how.split()[0]](input, parts, self.how, size)
        else:
            output = torch.ops.zhibei.quantised_linear(input, parts, self.how, *size)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, how={self.how}"


def unpacked(parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """A packed matrix [outputs, inputs] in `dtype`."""
    return UNPACK[how.split()[0]](parts, how, outputs, inputs, dtype)


def _unpack_int8(
    parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """codes * largest value of the row / 127 (arXiv:2208.07339, eq. 4), multiplied in fp32 and rounded once."""
    codes_OI, largest_O = parts
    matrix_OI = torch.empty(outputs, inputs, dtype=dtype, device=codes_OI.device)
    return torch.mul(codes_OI, (largest_O / 127.0)[:, None], out=matrix_OI)


def _unpack_4bit(
    parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    # As one row: on processors with AVX512, bitsandbytes 0.50.2 takes the wrong scales for matrices whose rows are no
    # whole number of blocks (backends/cpu/ops.py counts blocks anew in each row).
    name, block = how.split()
    unpack = torch.ops.bitsandbytes.dequantize_4bit.default
    return unpack(parts[0], _scales(parts), int(block), name, [outputs * inputs], dtype).view(outputs, inputs)


def _scales(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The scale of each block in fp32; quantised scales are unpacked (arXiv:2305.14314, section 3, double quant)."""
    if len(parts) == 2:
        return parts[1]
    _, scales_8bit, second_scales, code, offset = parts
    unpack = torch.ops.bitsandbytes.dequantize_blockwise.default
    return unpack(scales_8bit, second_scales, code, SCALES_BLOCK, torch.float32) + offset


UNPACK: Mapping[str, Callable[..., torch.Tensor]] = {
    "int8": _unpack_int8, "nf4": _unpack_4bit, "fp4": _unpack_4bit,
}  # fmt: skip


@torch.library.custom_op("zhibei::quantised_linear", mutates_args=())
def quantised_linear(
    input: torch.Tensor, parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int
) -> torch.Tensor:
    """input @ matrix.T with a packed matrix, which lives unpacked only as long as the product takes."""
    return torch.nn.functional.linear(input, unpacked(parts, how, outputs, inputs, input.dtype))


@torch.library.custom_op("zhibei::quantised_linear_backward", mutates_args=())
def quantised_linear_backward(
    gradient: torch.Tensor, parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int
) -> torch.Tensor:
    """The gradient of the input: gradient @ matrix, unpacked once more instead of kept."""
    return gradient @ unpacked(parts, how, outputs, inputs, gradient.dtype)


@quantised_linear.register_fake
def _(input: torch.Tensor, parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


@quantised_linear_backward.register_fake
def _(gradient: torch.Tensor, parts: Sequence[torch.Tensor], how: str, outputs: int, inputs: int) -> torch.Tensor:
    return gradient.new_empty((*gradient.shape[:-1], inputs))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, parts, ctx.how, ctx.outputs, ctx.inputs = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    of_input = torch.ops.zhibei.quantised_linear_backward(gradient, parts, ctx.how, ctx.outputs, ctx.inputs)
    return of_input, [None] * len(parts), None, None, None


quantised_linear.register_autograd(_backward, setup_context=_keep)


# The compiler weighs what to keep by the work it would be to make it again, and counts an unknown operation as none.
@register_flop_formula([torch.ops.zhibei.quantised_linear, torch.ops.zhibei.quantised_linear_backward])
def _flops(rows: Sequence[int], _parts: Any, _how: str, outputs: int, inputs: int, **_: Any) -> int:
    return 2 * (torch.Size(rows).numel() // rows[-1]) * outputs * inputs


def _few_rows_int8(input: torch.Tensor, parts: Sequence[torch.Tensor], how: str, size: tuple[int, int]) -> torch.Tensor:
    """Scaled afterwards, so that a compiler can join the conversion to the product. 127 codes are exact in 16 bits."""
    codes_OI, largest_O = parts
    if input.dtype == torch.float16:  # sums of codes leave its range
        return torch.ops.zhibei.quantised_linear(input, parts, how, *size)
    product = torch.nn.functional.linear(input, codes_OI.to(input.dtype))
    return (product.float() * (largest_O / 127.0)).to(input.dtype)


def _few_rows_4bit(input: torch.Tensor, parts: Sequence[torch.Tensor], how: str, size: tuple[int, int]) -> torch.Tensor:
    name, block = how.split()
    if size[1] % int(block):
        return torch.ops.zhibei.quantised_linear(input, parts, how, *size)
    product = torch.ops.bitsandbytes.gemm_4bit.default
    if len(parts) == 2:
        return product(input, parts[0], list(size), parts[1], int(block), name)
    packed, scales_8bit, second_scales, code, offset = parts
    nested = {"absmax_8bit": scales_8bit, "absmax_code": code, "absmax_offset": offset}
    return product(input, packed, list(size), second_scales, int(block), name, **nested)


FEW_ROW_PRODUCTS: Mapping[str, Callable[..., torch.Tensor]] = {
    "int8": _few_rows_int8, "nf4": _few_rows_4bit, "fp4": _few_rows_4bit,
}  # fmt: skip


def put_own_layers(hf: Any, dtype: torch.dtype) -> Any:
    """The model with bitsandbytes' layers exchanged for ours, on the same packed tensors; plain to everyone else."""
    bitsandbytes = import_bitsandbytes()
    found = [
        (name, module)
        for name, module in hf.named_modules()
        if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    ]
    for name, module in found:
        parts, how = _packed_by_bitsandbytes(module, is_8bit=isinstance(module, bitsandbytes.nn.Linear8bitLt))
        _exchange(hf, name, parts, how=how, dtype=dtype)
    forget_loading(hf)
    return hf


def forget_loading(hf: Any) -> None:
    """Take away what would make transformers and PEFT look for bitsandbytes' layers."""
    for name in ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        hf.__dict__.pop(name, None)
    for config in {id(config): config for config in (hf.config, hf.config.get_text_config())}.values():
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)


def described(model: torch.nn.Module) -> dict[str, Any]:
    """How the packed layers of a model lie in memory, in what JSON can hold."""
    return {
        name: {
            "how": layer.how,
            "dtype": str(layer.dtype),
            "parts": [[str(part.dtype), list(part.shape)] for part in layer.parts],
        }
        for name, layer in quantised_layers(model).items()
    }


def put_described(model: torch.nn.Module, layers: Mapping[str, Any]) -> None:
    """Put packed layers without values (on the meta device) into a model that has plain ones there."""
    for name, told in layers.items():
        parts = [torch.empty(size, dtype=_dtype_of(kind), device="meta") for kind, size in told["parts"]]
        _exchange(model, name, parts, how=told["how"], dtype=_dtype_of(told["dtype"]))


def _dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def _packed_by_bitsandbytes(module: Any, *, is_8bit: bool) -> tuple[list[torch.Tensor], str]:
    """What one of its layers holds, and how."""
    weight = module.weight
    if is_8bit:
        return [weight.data, weight.SCB if weight.SCB is not None else module.state.SCB], "int8"
    state = weight.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [weight.data, state.absmax, *nested], f"{state.quant_type} {state.blocksize}"


def _exchange(
    model: torch.nn.Module, name: str, parts: Sequence[torch.Tensor], *, how: str, dtype: torch.dtype
) -> None:
    """Put a packed layer in the place of the linear layer of this name."""
    old: Any = model.get_submodule(name)
    own = QuantisedLinear(parts, how=how, shape=(old.out_features, old.in_features), dtype=dtype)
    if old.bias is not None:
        own.bias = torch.nn.Parameter(old.bias.data, requires_grad=False)
    own.train(old.training)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, own)


def quantised_layers(model: torch.nn.Module) -> dict[str, QuantisedLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether any layer of a transformers or PEFT model is held packed. Adapters cannot be merged into such a base."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and packed layers, each once."""
    tensors = [*model.parameters(), *(part for layer in quantised_layers(model).values() for part in layer.parts)]
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
