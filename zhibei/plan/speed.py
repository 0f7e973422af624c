"""How long a run takes, from a stated model of throughput: arithmetic over what a card reaches of its peak.

A token costs 6 operations per parameter it passes (4 where the base is frozen), plus its attention. The shares of the
peak are those of benchmarks/results/sft.json (7B shape, H200: 53 % in full, 47 % with adapters); other cards and small
models reach less or more. `corrected` replaces the model by what a few real steps showed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from zhibei.plan.communication import NOTHING_MOVED, Traffic, seconds_of, traffic_of
from zhibei.plan.job import Job
from zhibei.plan.machines import Gpu, Machine
from zhibei.plan.shapes import ModelShape

SHARE_OF_PEAK: Mapping[bool, float] = {True: 0.53, False: 0.47}
"""By whether all weights learn."""
CHECKPOINTING_SPEED: Mapping[str, float] = {"none": 1.0, "selective": 0.99, "full": 0.77}
NOT_COMPILED = 0.74
PASS_OVERHEAD_TOKENS = 600
"""A pass costs about as much as so many tokens more: kernels start, and small products fill a card badly."""
HOST_LINK_GB_PER_S, HOST_UPDATE_GB_PER_S = 12.0, 15.0
FP32_SHARE = 0.125
"""fp32 products run at an eighth of the half-precision peak where TF32 is off."""


@dataclass(frozen=True, slots=True)
class Speed:
    """`tokens_per_s`: real tokens on all GPUs together, communication included. `is_measured`: by a probe.
    `efficiency`: of what as many GPUs would do that need not wait for one another."""

    tokens_per_s: float
    communication_share: float = 0.0
    is_measured: bool = False
    efficiency: float = 1.0
    traffic: Traffic = NOTHING_MOVED

    def hours(self, total_tokens: float) -> float:
        return total_tokens / self.tokens_per_s / 3600


def speed_of(shape: ModelShape, job: Job, machine: Machine, *, tokens_per_step: float) -> Speed | None:
    """Tokens per second of a job; None where the card's peak is not known or there is no card."""
    gpu = machine.smallest_gpu
    if gpu is None or gpu.half_tflops <= 0:
        return None
    compute = tokens_per_step / job.num_gpus / _tokens_per_s_of_one(shape, job, gpu)
    traffic = traffic_of(shape, job)
    moved = seconds_of(job, machine, traffic) + _offload_seconds(shape, job)
    # Gathering runs beside computing; what is longer decides, and a tenth of the other shows.
    seconds = max(compute, moved) + 0.1 * min(compute, moved)
    return Speed(
        tokens_per_step / seconds,
        communication_share=moved / (compute + moved),
        efficiency=compute / seconds,
        traffic=traffic,
    )


def corrected(speed: Speed, measured_tokens_per_s: float) -> Speed:
    """The same with what real steps gave instead of the model."""
    return replace(speed, tokens_per_s=measured_tokens_per_s, is_measured=True)


def operations_per_token(shape: ModelShape, job: Job) -> float:
    """Forward and backward: 6 per parameter, 4 where weights need no gradient; attention over half a row's pairs."""
    factor = 4 if job.trains_adapters else 6
    products = shape.active_parameters - (0 if shape.is_tied else shape.embedding_parameters)
    attention = 2 * shape.num_layers * shape.query_width * job.row_tokens
    return factor * products + factor * attention


def _tokens_per_s_of_one(shape: ModelShape, job: Job, gpu: Gpu) -> float:
    share = SHARE_OF_PEAK[not job.trains_adapters] * CHECKPOINTING_SPEED[job.checkpointing]
    share *= 1.0 if job.is_compiled else NOT_COMPILED
    share *= FP32_SHARE if job.item_bytes == 4 else 1.0
    share *= job.pass_tokens / (job.pass_tokens + PASS_OVERHEAD_TOKENS)
    return share * gpu.half_tflops * 1e12 / operations_per_token(shape, job)


def _offload_seconds(shape: ModelShape, job: Job) -> float:
    """Gradients down, weights up, and the update in the host's memory; with `all` the weights of every pass too."""
    if job.offload == "none":
        return 0.0
    share = shape.num_parameters / job.num_gpus if not job.trains_adapters else 0.01 * shape.num_parameters
    seconds = 2 * job.item_bytes * share / (HOST_LINK_GB_PER_S * 1e9) + 24 * share / (HOST_UPDATE_GB_PER_S * 1e9)
    if job.offload == "all":
        moved = 2 * job.num_passes * job.item_bytes * shape.num_parameters / job.num_gpus
        seconds += moved / (HOST_LINK_GB_PER_S * 1e9)
    return seconds
