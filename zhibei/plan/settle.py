"""What `auto` becomes: the micro-batch and the checkpointing that the plan chose. Knows plans, not trainers.

Training uses one GPU without offloading so far, so that is what is planned here; `zhibei plan` also looks further.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zhibei.config.run import RunFile
from zhibei.plan.job import Rows
from zhibei.plan.machines import Machine
from zhibei.plan.search import AUTO, CPU_BUDGET, CPU_CHECKPOINTING, Search, Wishes, search, wishes_of
from zhibei.plan.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Settled:
    """`values` fill the fields that were left to the plan; `search` is None where the model's sizes are not known."""

    values: dict[str, Any]
    search: Search | None = None
    machine: Machine | None = None


def settle(run: RunFile, shape: ModelShape | None, machine: Machine, rows: Rows) -> Settled:
    """Plan the run as it will be trained, and the values of fields that say auto.

    Without a GPU, or for a model whose sizes are not known: passes of 4096 tokens (or the longest row), nothing
    recomputed. When nothing fits, the smallest plan is taken: `zhibei check` says what would have to give.
    """
    one = replace(machine, gpus=machine.gpus[:1], num_nodes=1)
    found = None
    if shape is not None:
        wishes = wishes_of(run)
        found = search(
            run, shape, one, rows, Wishes(wishes.micro_batch_tokens, wishes.checkpointing, "no_shard", "none")
        )
    values: dict[str, Any] = {}
    has_plan = found is not None and bool(one.gpus)
    if run.training.micro_batch_tokens == AUTO:
        budget = found.chosen.micro_batch_tokens if found is not None and has_plan else max(CPU_BUDGET, rows.longest)
        values[f"{run.stage}.micro_batch_tokens"] = budget
    if run.model.activation_checkpointing == AUTO:
        how = found.chosen.job.checkpointing if found is not None and has_plan else CPU_CHECKPOINTING
        values["model.activation_checkpointing"] = how
    return Settled(values, found, one)
