"""What `auto` becomes: the micro-batch, the checkpointing and the sharding that the plan chose. Knows plans, not
trainers.

Planned is what the ranks that are there will do, on as many GPUs; `zhibei plan` also looks further.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zhibei.config.run import RunFile
from zhibei.plan.division import why_whole
from zhibei.plan.job import Rows
from zhibei.plan.machines import Machine
from zhibei.plan.search import AUTO, CPU_BUDGET, CPU_CHECKPOINTING, Search, search, wishes_of
from zhibei.plan.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Settled:
    """`values` fill the fields that were left to the plan; `search` is None where the model's sizes are not known."""

    values: dict[str, Any]
    search: Search | None = None
    machine: Machine | None = None


def settle(
    run: RunFile, shape: ModelShape | None, machine: Machine, rows: Rows, *, ranks: int = 1, per_node: int = 1
) -> Settled:
    """Plan the run as it will be trained by so many ranks, `per_node` of them on each node, and the values of fields
    that say auto. Each rank has one GPU like the first of `machine`.

    Without a GPU, or for a model whose sizes are not known: passes of 4096 tokens (or the longest row), nothing
    recomputed, and of several ranks each has a part of what learns, where it can be divided and is not adapters. When
    nothing fits, the smallest plan is taken: `zhibei check` says what would have to give.
    """
    used = replace(machine, gpus=machine.gpus[:1] * per_node, num_nodes=ranks // per_node)
    found = None
    if shape is not None:
        # What the run file does not ask for is not offloaded: it is a way to train where nothing else fits.
        found = search(run, shape, used, rows, replace(wishes_of(run), offload=run.distributed.offload))
    values: dict[str, Any] = {}
    has_plan = found is not None and bool(used.gpus)
    if run.distributed.sharding == AUTO:
        by_rule = "full_shard" if ranks > 1 and run.model.method == "full" and why_whole(run) is None else "no_shard"
        values["distributed.sharding"] = found.chosen.job.sharding if found is not None and has_plan else by_rule
    if run.training.micro_batch_tokens == AUTO:
        budget = found.chosen.micro_batch_tokens if found is not None and has_plan else max(CPU_BUDGET, rows.longest)
        values[f"{run.stage}.micro_batch_tokens"] = budget
    if run.model.activation_checkpointing == AUTO:
        how = found.chosen.job.checkpointing if found is not None and has_plan else CPU_CHECKPOINTING
        values["model.activation_checkpointing"] = how
    return Settled(values, found, used)
