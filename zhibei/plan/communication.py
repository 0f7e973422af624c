"""Bytes that ranks send one another in an optimiser step, and how long links take. Knows sizes and links, no cards.

Rings and trees move the same (arXiv:1910.02054, section 7): to gather or to scatter S bytes over N ranks each receives
S (N - 1) / N; to add up S bytes everywhere, twice that. What is moved is what model/sharding.py and train/step.py do:

no_shard: gradients of what learns are added up once a step, in fp32.
full_shard: layers are gathered in every pass, forward and again backward, in the type that computes (of packed ones the
codes); embedding and head once. Gradients are scattered in every pass: of layers in fp32, of embedding and head in the
type that computes.
shard_grad_op: the same, but layers are gathered once a pass.
hybrid: the same within each node; then the nodes add up the parts, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from zhibei.plan.division import FP32, ways_of
from zhibei.plan.holdings import adapter_sizes, gathered_layers
from zhibei.plan.job import Job
from zhibei.plan.machines import Machine
from zhibei.plan.shapes import ModelShape

LINK_GB_PER_S = {"nvlink": 150.0, "pcie": 12.0, "none": 12.0}
"""What a collective is taken to reach per GPU within a node; half the data sheets or less. Assumed, not measured."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one GPU receives in one optimiser step. `across`: of these, what nodes that hold copies exchange."""

    gathered: float = 0.0
    scattered: float = 0.0
    added_up: float = 0.0
    across: float = 0.0

    @property
    def total(self) -> float:
        return self.gathered + self.scattered + self.added_up


NOTHING_MOVED = Traffic()


def traffic_of(shape: ModelShape, job: Job) -> Traffic:
    """What a step of this job moves."""
    if job.num_gpus < 2:
        return NOTHING_MOVED
    learned = sum(adapter_sizes(shape, job)) if job.trains_adapters else shape.num_parameters
    ways = ways_of(job)
    if ways == 1:
        return Traffic(added_up=2 * FP32 * learned * _share(job.num_gpus))
    item, passes = job.item_bytes, job.num_passes
    outside = shape.embedding_and_head_parameters
    inside = shape.num_parameters - outside - shape.layer_parameters
    gathered_once = sum(gathered_layers(shape, job)) + item * (inside + (learned if job.trains_adapters else 0))
    times = 1 if job.sharding == "shard_grad_op" else 2
    gathered = passes * (times * gathered_once + item * outside) * _share(ways)
    in_fp32 = learned if job.trains_adapters else shape.num_parameters - outside
    scattered = passes * (FP32 * in_fp32 + (0 if job.trains_adapters else item * outside)) * _share(ways)
    copies = job.num_gpus // ways
    across = 2 * passes * FP32 * learned / ways * _share(copies) if copies > 1 else 0.0
    return Traffic(gathered, scattered, across, across)


def _share(count: int) -> float:
    return (count - 1) / count


def seconds_of(job: Job, machine: Machine, moved: Traffic) -> float:
    """How long the links take. Between nodes all GPUs of a node share its link: gathering everywhere what is divided
    over all nodes brings it to each node once, while parts of copies cross once for every GPU."""
    inside = moved.total / (LINK_GB_PER_S[machine.gpu_link] * 1e9)
    if machine.num_nodes < 2:
        return inside
    once = 0.0 if job.sharding == "hybrid" else moved.total
    crossing = once + moved.across * job.gpus_per_node
    return max(inside, crossing / (max(machine.node_link_gb_per_s, 0.05) * 1e9))
