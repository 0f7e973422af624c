"""Trains a few steps as one of several ranks and writes what came out; started by tests, never imported by them.

python -m tests.train.rank_driver JOBS.json OUT.pt        (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
"""

import atexit
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.rank_run import require_no_threads_of_gloo
from tests.train.test_step import some_rows
from zhibei.config.run import LoraSection, ModelSection, SftSection
from zhibei.data.batches import Batches, BatchPlan
from zhibei.losses.tokens import TokenLoss
from zhibei.model.load import Need, load_for_training
from zhibei.model.ranks import Ranks, met, own_part, whole
from zhibei.model.savings import checkpoint_activations
from zhibei.model.sharding import shard
from zhibei.train.optimizer import make_optimizer
from zhibei.train.step import Stepper
from zhibei.train.token_loss import token_loss

CPU = torch.device("cpu")


def run_job(job: dict, ranks: Ranks) -> dict:
    """Gradients of the first step, losses of all, bytes that this rank holds."""
    section = ModelSection(path=job["folder"], method=job["method"], quantize=job.get("quantize", "none"))
    is_skeleton = job["sharding"] != "no_shard" and not ranks.is_first
    need = Need(CPU, "fp32", packing=job["packing"], longest_row=64, seed=1, is_skeleton=is_skeleton)
    model = load_for_training(section, LoraSection(dropout=0.0), need)
    if job["method"] != "full":
        random = torch.Generator().manual_seed(5)
        for name, parameter in model.trainable().items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=random)
    checkpoint_activations(model, job.get("checkpointing", "none"))
    shard(model, job["sharding"], ranks=ranks, device=CPU, compute_dtype=torch.float32)
    learning = model.trainable()
    optimizer = make_optimizer(learning, SftSection(learning_rate=3e-3))
    stepper = Stepper(model, optimizer, token_loss(TokenLoss()), max_grad_norm=1.0, parameters=learning, ranks=ranks)
    gradients: dict[str, torch.Tensor] = {}
    update = optimizer.step

    def seeing(found, *, learning_rate, scale):
        if not gradients:
            for name, parameter in learning.items():
                part = found[name]
                gradients[name] = (
                    whole(
                        type(parameter.data).from_local(
                            part,
                            parameter.device_mesh,
                            parameter.placements,
                            shape=parameter.shape,
                            stride=parameter.stride(),
                        )
                    )
                    if hasattr(parameter, "device_mesh")
                    else part.clone()
                )
        update(found, learning_rate=learning_rate, scale=scale)

    optimizer.step = seeing
    plan = BatchPlan(
        global_batch=16,
        micro_batch_tokens=job["tokens"],
        packing=job["packing"],
        seed=3,
        rank=ranks.rank,
        world=ranks.world,
    )
    batches = Batches(some_rows(job.get("rows", 48)), plan, epochs=20)
    losses, norms, counting, num_passes = [], [], Counting(), 0
    for step in range(job["steps"]):
        passes = batches.micro_batches(step)
        if job.get("unequal"):
            passes = unequal(batches, step, ranks)
        with counting if step == 1 else nullcontext():
            record = stepper.step(passes, learning_rate=3e-3)
        num_passes = record.num_micro_batches if step <= 1 else num_passes
        losses.append(record.loss)
        norms.append(record.grad_norm)
    held_anyway = [part for name, part in model.hf.named_buffers() if ".part_" in name]
    held = {
        "parameters": sum(own_part(p).numel() * p.element_size() for p in (*model.hf.parameters(), *held_anyway)),
        "gradients": sum(own_part(p).numel() * 4 for p in learning.values()),
        "optimizer": sum(t.nbytes for t in optimizer.tensors().values() if t.ndim),
    }
    share = (ranks.world - 1) / ranks.world
    moved = {name: size * share for name, size in counting.moved.items()}
    found = {"losses": losses, "norms": norms, "gradients": gradients, "held": held, "units": record.num_units}
    return {**found, "moved": moved, "num_passes": num_passes}


class Counting(TorchDispatchMode):
    """Bytes of the tensors that are gathered, scattered and added up (twice: there and back) while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = {"gathered": 0, "scattered": 0, "added_up": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        flat = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if "copy_in" in name:
            pass  # within this rank
        elif "allgather" in name or "all_gather" in name:
            every = [*flat, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
            self.moved["gathered"] += max(tensor.nbytes for tensor in every)
        elif "reduce_scatter" in name:
            self.moved["scattered"] += max(tensor.nbytes for tensor in flat)
        elif "allreduce" in name or "all_reduce" in name:
            self.moved["added_up"] += 2 * sum(tensor.nbytes for tensor in flat)
        return result


def unequal(batches: Batches, step: int, ranks: Ranks) -> list:
    """One item for rank 0, three for rank 1, of the first four of the step, an item a pass."""
    alone = dataclasses.replace(batches.plan, rank=0, world=1)
    items = Batches(batches.rows, alone, epochs=20).items_of_step(step)[:4]
    mine = {1: items, 2: items[:1] if ranks.rank == 0 else items[1:]}[ranks.world]
    return [batches.batch_of(np.asarray([item])) for item in mine]


def main() -> None:
    atexit.register(require_no_threads_of_gloo)
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with met(CPU, patience_seconds=120) as ranks:
        found = [run_job(job, ranks) for job in jobs]
        if ranks.is_first:
            held = ranks.gathered([job["held"] for job in found])
            for number, job in enumerate(found):
                job["held"] = [of_rank[number] for of_rank in held]
            torch.save(found, sys.argv[2])
        else:
            ranks.gathered([job["held"] for job in found])


if __name__ == "__main__":
    main()
