"""What sharding and offloading take off one GPU, and what they need instead (model/sharding.py). Knows no phases.

no_shard: every GPU holds everything. Otherwise each holds the first, second, ... equal part of every tensor's rows;
what learns lies in fp32 and is its own master, gradients are fp32 parts, what is frozen keeps its type. A layer is
gathered in the type that computes (of a packed one the codes): two at a time (the one in use and the next) with
full_shard and hybrid, all of them until the backward pass is over with shard_grad_op; embeddings and head are gathered
whole for a pass. hybrid divides among the GPUs of a node only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from zhibei.config.run import RunFile
from zhibei.plan.holdings import (
    Holdings,
    adapter_shapes,
    gathered_layers,
    in_model_order,
    part_elements,
    rounded,
    weight_bytes,
)
from zhibei.plan.job import Job
from zhibei.plan.shapes import ModelShape

GATHERED_LAYERS = 2
FP32 = 4


@dataclass(frozen=True, slots=True)
class Divided:
    """Holdings of one GPU, gather buffers beside them, and what went to the host instead (bytes per GPU)."""

    held: Holdings
    gathered: float = 0.0
    all_gathered: float = 0.0
    """The same while answers are written: every rank has all layers whole then (model/language_model.py)."""
    on_host: float = 0.0


def why_whole(run: RunFile) -> str | None:
    """The setting because of which every rank must hold whole models; None for a run whose weights can be divided."""
    section = run.training
    reasons = {
        "lora.modules_to_save": run.model.method != "full" and bool(run.lora.modules_to_save),
        f"{run.stage}.optimizer: {section.optimizer} (it keeps figures of whole matrices)": section.optimizer
        != "adamw",
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def ways_of(job: Job) -> int:
    """Among how many GPUs states are divided."""
    return {
        "no_shard": 1,
        "shard_grad_op": job.num_gpus,
        "full_shard": job.num_gpus,
        "hybrid": min(job.num_gpus, job.gpus_per_node),
    }[job.sharding]


def divided(shape: ModelShape, job: Job, held: Holdings) -> Divided:
    """One GPU's part; that of the first, which has no fewer rows of any tensor than the others."""
    ways = ways_of(job)
    part = held if ways == 1 else part_of(shape, job, held, ways)
    gathered, everything = gathered_bytes(shape, job) if ways > 1 else (0.0, 0.0)
    on_host = 0.0
    if job.offload != "none":
        # Masters on the host are whole fp32 copies (train/optimizer.py); with divided weights so are their parts.
        on_host += sum(rounded(FP32 * size) for size in part.trained_sizes) + part.states
        part = replace(part, masters=0, states=0)
    if job.offload == "all":
        on_host += part.weights + part.adapters + part.gradients
        part = replace(part, weights=0, adapters=0, gradients=0, gradient_sums=0)
    return Divided(part, gathered, everything, on_host)


def part_of(shape: ModelShape, job: Job, held: Holdings, ways: int) -> Holdings:
    """What the first of so many ranks holds of a model that is divided among them."""
    base = [part_elements(size, ways) for _, size in in_model_order(shape)]
    adapters = [part_elements(size, ways) for size in adapter_shapes(shape, job)]
    trained = adapters if job.trains_adapters else base
    in_fp32 = sum(rounded(FP32 * size) for size in trained)
    return replace(
        held,
        weights=weight_bytes(shape, job, ways=ways) if job.trains_adapters else in_fp32,
        adapters=in_fp32 if job.trains_adapters else 0,
        masters=0,
        states=2 * in_fp32,
        gradients=in_fp32,
        gradient_sums=0,
        trained_sizes=tuple(trained),
        trained=sum(trained),
        largest_trained=max(trained, default=0),
    )


def gathered_bytes(shape: ModelShape, job: Job) -> tuple[float, float]:
    """Whole weights in use on top of the parts, in the type that computes: while learning, with the whole gradients of
    one layer before they are divided (in that type, and in fp32 to be added up); and all of them, to answer."""
    layers = gathered_layers(shape, job)
    outside = job.item_bytes * shape.embedding_and_head_parameters
    held = sum(layers) if job.sharding == "shard_grad_op" else GATHERED_LAYERS * max(layers, default=0)
    gradients = 0 if job.trains_adapters else (job.item_bytes + FP32) * shape.largest_layer_parameters
    return held + outside + gradients, sum(layers) + outside
