"""What sharding and offloading take off one GPU, and what they need instead. Knows no phases.

Names of the guide: no_shard (every GPU holds everything), shard_grad_op (gradients and optimiser states divided),
full_shard (weights too), hybrid (full_shard inside a node, copies across nodes). torch's FSDP2 gathers a layer at a
time, so two layers (the one in use and the next) and embeddings with head lie undivided on each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from zhibei.plan.holdings import Holdings
from zhibei.plan.job import Job
from zhibei.plan.shapes import ModelShape

GATHERED_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Divided:
    """Holdings of one GPU, gather buffers beside them, and what went to the host instead (bytes per GPU)."""

    held: Holdings
    gathered: float = 0.0
    on_host: float = 0.0


def ways_of(job: Job) -> int:
    """Among how many GPUs states are divided."""
    return {
        "no_shard": 1,
        "shard_grad_op": job.num_gpus,
        "full_shard": job.num_gpus,
        "hybrid": min(job.num_gpus, job.gpus_per_node),
    }[job.sharding]


def divided(shape: ModelShape, job: Job, held: Holdings) -> Divided:
    """One GPU's part."""
    ways = ways_of(job)
    divides_weights = job.sharding in ("full_shard", "hybrid") and ways > 1
    part = replace(
        held,
        weights=held.weights // ways if divides_weights else held.weights,
        masters=held.masters // ways,
        states=held.states // ways,
        gradients=held.gradients // ways,
        gradient_sums=held.gradient_sums // ways,
        trained_sizes=tuple(max(1, size // ways) for size in held.trained_sizes) if ways > 1 else held.trained_sizes,
        trained=max(1, held.trained // ways),
        largest_trained=held.largest_trained // ways,
    )
    gathers = divides_weights or job.offload == "all"
    gathered = _gathered(shape, job) if gathers else 0.0
    on_host = 0.0
    if job.offload != "none":
        on_host += part.masters + part.states
        part = replace(part, masters=0, states=0)
    if job.offload == "all":
        on_host += part.weights + part.gradients + part.gradient_sums
        part = replace(part, weights=0, gradients=0, gradient_sums=0)
    return Divided(part, gathered, on_host)


def _gathered(shape: ModelShape, job: Job) -> float:
    outside = shape.embedding_parameters + shape.head_parameters
    return job.item_bytes * (GATHERED_LAYERS * shape.largest_layer_parameters + outside)
