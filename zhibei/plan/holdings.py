"""What lies in memory during the whole run: weights, adapters, masters, optimiser states, gradients. Knows no phases.

Sources: `zhibei/train/split_adamw.py` and `optimizer.py` (states), `zhibei/train/step.py` (gradient sums),
bitsandbytes (8-bit states of 256-value blocks, 4-bit weights of 64-value blocks), torch's Adafactor (factored states).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from zhibei.plan.job import Job
from zhibei.plan.shapes import ModelShape

ALLOCATION = 512  # torch's allocator rounds every tensor up to this (c10/cuda/CUDACachingAllocator)
BLOCK_8BIT, SMALL_8BIT = 256, 4096  # bitsandbytes: block size, and below which tensors keep fp32 states
BLOCK_NF4, BLOCK_SCALES, CODE_VALUES = 64, 256, 256
"""Values per scale, scales per scale of theirs, and values of the code that 8-bit scales are written in."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Bytes on one GPU before anything is divided among GPUs."""

    weights: int
    adapters: int
    masters: int
    states: int
    gradients: int
    """All gradients in the model's type."""
    gradient_sums: int
    """fp32 sums of several passes; 0 where gradients are fp32 already or one pass is a step."""
    trained: int
    """Parameters that learn."""
    trained_sizes: tuple[int, ...]
    """Elements of each tensor that learns, in the order in which the optimiser meets them."""
    largest_trained: int
    largest: int
    """Elements of the largest tensor of all."""
    unpacked: int
    """Bytes of the largest packed matrix in the model's type, in which it lies while a product takes; 0: none is."""
    frozen_head: bool
    frozen_embedding: bool
    states_from_first_update: bool
    """Whether the optimiser makes its states in its first step."""


def rounded(num_bytes: float) -> int:
    """As the allocator hands it out."""
    return -(-math.ceil(num_bytes) // ALLOCATION) * ALLOCATION


def holdings_of(shape: ModelShape, job: Job) -> Holdings:
    """What the model and its optimiser hold. `shape` is without a head where the stage has none (reward)."""
    base = {name: math.prod(size) for name, size in in_model_order(shape)}
    adapters = adapter_sizes(shape, job)
    copied = saved_modules(base, job)
    trained = list(base.values()) if not job.trains_adapters else [*adapters, *copied]
    item = job.item_bytes
    is_split = job.optimizer == "adamw" and job.precision == "bf16"
    if is_split:
        masters, states = sum(rounded(2 * n) for n in trained), sum(2 * rounded(4 * n) for n in trained)
    else:
        masters = 0 if item == 4 else sum(rounded(4 * n) for n in trained)
        shapes = dict(shape.tensors())
        tensors = [shapes[name] for name in base] if not job.trains_adapters else None
        states = OPTIMIZER_STATES[job.optimizer](
            tensors or [*adapter_shapes(shape, job), *((1, size) for size in copied)]
        )
    return Holdings(
        weights=weight_bytes(shape, job),
        adapters=sum(rounded(item * n) for n in (*adapters, *copied)) if job.trains_adapters else 0,
        masters=masters,
        states=states,
        gradients=sum(rounded(item * n) for n in trained),
        gradient_sums=sum(rounded(4 * n) for n in trained) if item != 4 and job.num_passes > 1 else 0,
        trained=sum(trained),
        trained_sizes=tuple(trained),
        largest_trained=max(trained, default=0),
        largest=max(base.values()),
        unpacked=unpacked_bytes(shape, job),
        frozen_head=job.stage == "reward"
        or (job.trains_adapters and not any("lm_head" in name for name in job.modules_to_save)),
        frozen_embedding=is_frozen(job, "embed"),
        states_from_first_update=not is_split,
    )


def is_frozen(job: Job, part: str) -> bool:
    """Whether adapters leave a part outside of the layers as it is."""
    return job.trains_adapters and not any(part in name for name in job.modules_to_save)


def in_model_order(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """Embeddings, layers, then the final norm and the head, as models list their parameters."""
    tensors = list(shape.tensors())
    first = [pair for pair in tensors if pair[0] in shape.outside and len(pair[1]) == 2 and "lm_head" not in pair[0]]
    last = [pair for pair in tensors if pair[0] in shape.outside and pair not in first]
    return [*first, *(pair for pair in tensors if pair[0] not in shape.outside), *last]


def weight_bytes(shape: ModelShape, job: Job, *, ways: int = 1) -> int:
    """The base: in the model's type, or its linears as int8 or nf4 and the rest in the model's type. `ways`: what the
    first of so many ranks holds of it."""
    packed = packed_names(shape, job)
    total = 0
    for name, size in shape.tensors():
        if name in packed:
            codes, scales = PACKED[job.quantize](math.prod(size), size[0])
            total += sum(rounded(part_elements(part, ways)) for part in codes) + sum(map(rounded, scales))
        else:
            total += rounded(job.item_bytes * part_elements(size, ways))
    return total


def packed_names(shape: ModelShape, job: Job) -> set[str]:
    """The tensors that are held in few bits."""
    return {f"{linear.name}.weight" for linear in shape.linears()} if job.quantize != "none" else set()


def part_elements(size: Iterable[int], ways: int) -> int:
    """Of a tensor whose rows are dealt out as torch.chunk deals them: the first rank's."""
    rows, *rest = size
    return -(-rows // ways) * math.prod(rest)


def gathered_layers(shape: ModelShape, job: Job) -> list[int]:
    """Bytes of each layer's weights when ranks put it together: in the type that computes, or its codes."""
    packed = packed_names(shape, job)
    found = []
    for number, layer in enumerate(shape.layers):
        total = 0
        for name, size in layer.items():
            if f"{shape.layer_prefix}.{number}.{name}" in packed:
                total += sum(math.prod(part) for part in PACKED[job.quantize](math.prod(size), size[0])[0])
            else:
                total += job.item_bytes * math.prod(size)
        found.append(total)
    return found


def unpacked_bytes(shape: ModelShape, job: Job) -> int:
    """The largest matrix that products unpack (zhibei/model/quantized.py)."""
    if job.quantize == "none":
        return 0
    return rounded(job.item_bytes * max(linear.inputs * linear.outputs for linear in shape.linears()))


Packed = tuple[list[tuple[int, ...]], list[int]]
"""Sizes of a packed matrix' codes (a byte each, dealt out among ranks), and bytes of its scales (whole everywhere)."""


def _int8(elements: int, rows: int) -> Packed:
    """LLM.int8 (arXiv:2208.07339): a byte per value and an fp32 scale per row."""
    return [(rows, elements // rows)], [4 * rows]


def _nf4(elements: int, rows: int) -> Packed:
    """QLoRA (arXiv:2305.14314): half a byte per value; scales of 64-value blocks, themselves held in 8 bits."""
    del rows
    blocks = -(-elements // BLOCK_NF4)
    return [(-(-elements // 2),), (blocks,)], [4 * -(-blocks // BLOCK_SCALES), 4 * CODE_VALUES, 4]


PACKED: Mapping[str, Callable[[int, int], Packed]] = {"int8": _int8, "nf4": _nf4}


def adapter_sizes(shape: ModelShape, job: Job) -> list[int]:
    """Elements of the two matrices of every adapter."""
    if not job.trains_adapters:
        return []
    adapted = [linear for linear in shape.linears() if linear.last_name in job.targets]
    return [size for linear in adapted for size in (job.rank * linear.inputs, job.rank * linear.outputs)]


def saved_modules(base: Mapping[str, int], job: Job) -> list[int]:
    """Elements of the trained copies that modules_to_save asks for; the frozen originals stay."""
    wanted = job.modules_to_save if job.trains_adapters else ()
    return [size for name, size in base.items() if any(part in name.split(".") for part in wanted)]


def adapter_shapes(shape: ModelShape, job: Job) -> list[tuple[int, ...]]:
    """The two matrices of every adapter."""
    adapted = [linear for linear in shape.linears() if linear.last_name in job.targets]
    return [pair for linear in adapted for pair in ((job.rank, linear.inputs), (linear.outputs, job.rank))]


def _adamw(shapes: list[tuple[int, ...]]) -> int:
    return sum(2 * rounded(4 * math.prod(shape)) for shape in shapes)


def _adamw_8bit(shapes: list[tuple[int, ...]]) -> int:
    total = 0
    for shape in shapes:
        elements = math.prod(shape)
        if elements < SMALL_8BIT:
            total += 2 * rounded(4 * elements)
        else:
            total += 2 * (rounded(elements) + rounded(4 * -(-elements // BLOCK_8BIT)))
    return total


def _adafactor(shapes: list[tuple[int, ...]]) -> int:
    """Row and column means of matrices, every element of vectors (arXiv:1804.04235)."""
    return sum(
        rounded(4 * math.prod(shape[:-1])) + rounded(4 * math.prod(shape) // shape[-2])
        if len(shape) >= 2
        else rounded(4 * math.prod(shape))
        for shape in shapes
    )


OPTIMIZER_STATES: Mapping[str, Callable[[list[tuple[int, ...]]], int]] = {
    "adamw": _adamw, "adamw_8bit": _adamw_8bit, "adafactor": _adafactor,
}  # fmt: skip
