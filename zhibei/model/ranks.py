"""The processes that train one model together: who they are, and sums over them. Knows torch.distributed, no model.

Started by torchrun (or `zhibei launch`), each process finds RANK, WORLD_SIZE and LOCAL_RANK in its environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial

from zhibei.config.errors import UserError

Value = TypeVar("Value")
PATIENCE_SECONDS = 600
"""How long a collective operation waits for the slowest rank before it fails."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. One process alone is rank 0 of 1, and every sum over ranks is the value itself.

    `local`, `per_node`: the same within this node.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    per_node: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.world > 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place. Every rank must call it, in the same order."""
        if self.are_several:
            dist.all_reduce(tensor)
        return tensor

    def sum_on_host(self, *values: float) -> list[float]:
        """Sums of plain numbers over all ranks, without the devices."""
        if not self.are_several:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, group=_host_group())
        return numbers.tolist()

    def from_first(self, value: Value) -> Value:
        """Rank 0's value on every rank. Plain values only; they travel between processes of one run."""
        if not self.are_several:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=_host_group())
        return held[0]

    def gathered(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks, on every rank."""
        if not self.are_several:
            return [value]
        held: list[Any] = [None] * self.world
        dist.all_gather_object(held, value, group=_host_group())
        return held

    def wait(self) -> None:
        """Until every rank is here."""
        if self.are_several:
            dist.barrier(group=_host_group())


ALONE = Ranks()


@dataclass(frozen=True)
class Place:
    """Where a divided model computes, and in what; its parameters may lie elsewhere and be fp32."""

    device: torch.device
    dtype: torch.dtype


def whole(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A parameter's values, put together from all ranks where it is divided; gradients flow back as sums."""
    held = parameter if dtype is None else parameter.to(dtype)
    if not isinstance(held, DTensor):
        return held
    return held.full_tensor(grad_placements=[Partial()] * held.device_mesh.ndim)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def ranks_asked() -> Ranks:
    """What the environment says, whether or not the ranks have met yet. Raises UserError for a half-set environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ.get(name) for name in names}
    if given["WORLD_SIZE"] in (None, "1"):
        return ALONE
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {given['WORLD_SIZE']}, and {', '.join(missing)} is not set",
            expected="an environment as torchrun makes it: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT",
            fix="start with  zhibei launch ..., or torchrun; or unset WORLD_SIZE for a single process",
            where="environment",
        )
    rank, world, local = (int(str(given[name])) for name in names)
    return Ranks(rank, world, local, int(os.environ.get("LOCAL_WORLD_SIZE", world)))


@contextmanager
def met(device: torch.device, *, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[Ranks]:
    """The ranks, connected while the block runs: NCCL between GPUs, gloo between processors.

    Raises UserError when they cannot find one another. A group that exists already is used and left alone.
    """
    asked = ranks_asked()
    if not asked.are_several or dist.is_initialized():
        yield asked
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=patience_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {asked.rank} of {asked.world} did not reach the others: {str(error).splitlines()[0]}",
            expected=f"all ranks at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            fix="look at MASTER_ADDR, the port, and which network interface is used (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME); zhibei launch checks these first",
            where="environment",
        ) from error
    try:
        yield asked
    finally:
        _HOST_GROUPS.clear()
        dist.destroy_process_group()


_HOST_GROUPS: list[Any] = []


def _host_group() -> Any:
    """A gloo group for what lies on the hosts; the default group where that is gloo already."""
    if dist.get_backend() == "gloo":
        return None
    if not _HOST_GROUPS:
        _HOST_GROUPS.append(dist.new_group(backend="gloo"))
    return _HOST_GROUPS[0]


def current() -> Ranks:
    """The ranks of this process: connected ones, or this one alone."""
    return ranks_asked() if dist.is_available() and dist.is_initialized() else ALONE
