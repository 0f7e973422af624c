"""The processes that train one model together: who they are, and sums over them. Knows torch.distributed, no model.

Started by torchrun (or `zhibei launch`), each process finds RANK, WORLD_SIZE and LOCAL_RANK in its environment.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from zhibei.config.errors import UserError, as_told, from_told
from zhibei.model.meeting import mark, meeting

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
            mark("adds up tensors")
            dist.all_reduce(tensor)
        return tensor

    def same_as_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values, in place."""
        if self.are_several:
            mark("takes rank 0's values")
            dist.broadcast(tensor, src=0)
        return tensor

    def sum_on_host(self, *values: float) -> list[float]:
        """Sums of plain numbers over all ranks, without the devices."""
        if not self.are_several:
            return list(values)
        mark("adds up numbers")
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, group=_host_group())
        return numbers.tolist()

    def put_together(self, values_R: torch.Tensor, is_known_R: torch.Tensor) -> torch.Tensor:
        """Values of which each rank knows some, on the CPU; what several know they know alike."""
        if not self.are_several:
            return values_R
        mark("puts values together")
        both = torch.stack([values_R.double() * is_known_R, is_known_R.double()])
        dist.all_reduce(both, group=_host_group())
        return (both[0] / both[1].clamp(min=1)).to(values_R.dtype)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value (what JSON can hold) on every rank."""
        if not self.are_several:
            return value
        mark("sends to the others" if self.is_first else "waits for rank 0")
        sent = _as_bytes(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(len(sent))
        dist.broadcast(size, src=0, group=_host_group())
        held = sent if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(held, src=0, group=_host_group())
        return _from_bytes(held)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value (what JSON can hold), in the order of ranks, on every rank."""
        if not self.are_several:
            return [value]
        mark("gathers values")
        own = _as_bytes(value)
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(own)), group=_host_group())
        longest = int(max(sizes))
        held = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
        padded = torch.cat([own, torch.zeros(longest - len(own), dtype=torch.uint8)])
        dist.all_gather(held, padded, group=_host_group())
        return [_from_bytes(part[: int(size)]) for part, size in zip(held, sizes, strict=True)]

    def first_does(self, action: Callable[[], Any]) -> Any:
        """What rank 0 finds when it does this alone (what JSON can hold); the others wait.

        Raises on every rank the UserError that it raised there, so that none waits for one that has given up.
        """
        if not self.are_several:
            return action()
        found: Any = None
        problem: UserError | None = None
        if self.is_first:
            try:
                found = action()
            except UserError as error:
                problem = error
            except Exception as error:  # the others must hear of it before it ends this process
                self.from_first([None, as_told(UserError(f"rank 0 failed: {error}", expected="", fix="see rank 0"))])
                raise
        value, told = self.from_first([found, None if problem is None else as_told(problem)])
        if problem is not None:
            raise problem
        if told is not None:
            raise from_told(told)
        return value

    def first_then_all(self, action: Callable[[], Value]) -> Value:
        """What the action gives, done by rank 0 and then by the others, who find in a cache what it has made there."""
        own: list[Value] = []
        self.first_does(lambda: own.append(action()))
        return own[0] if own else action()


def _as_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(held: torch.Tensor) -> Any:
    return json.loads(bytes(held.tolist()).decode())


ALONE = Ranks()


@dataclass(frozen=True)
class Place:
    """Where a divided model computes, and in what; its parameters may lie elsewhere and be fp32."""

    device: torch.device
    dtype: torch.dtype
    divides_after_forward: bool = True
    """Whether a layer's weights are divided again at once, or only after the backward pass."""


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

    A group that exists already is used and left alone. Raises UserError when they cannot find one another, RankLost
    when one of them dies or hangs meanwhile, and the fault of another rank that ended with one.
    """
    asked = ranks_asked()
    if not asked.are_several:
        yield asked
        return
    with meeting(rank=asked.rank, world=asked.world, patience_seconds=patience_seconds) as here:
        is_ours = not dist.is_initialized()
        if is_ours:
            _connect(asked, device, here.store, patience_seconds)
        try:
            yield asked
        except RuntimeError as error:
            cause = here.pulse.explain() if FAILED_TOGETHER.search(str(error)) else None
            if cause is None:
                raise
            raise cause from error
        finally:
            if is_ours:
                _HOST_GROUPS.clear()
                dist.destroy_process_group()


FAILED_TOGETHER = re.compile(r"gloo|nccl|connection|timed? ?out|peer|socket|store", re.IGNORECASE)
"""What an operation among ranks says when another rank is the cause."""
PATIENCE_OF_OPERATIONS = 2.0
"""An operation among ranks itself fails only after the watch over the ranks had time to name the culprit."""


def _connect(asked: Ranks, device: torch.device, store: Any, patience_seconds: float) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=asked.rank,
            world_size=asked.world,
            timeout=timedelta(seconds=PATIENCE_OF_OPERATIONS * patience_seconds + 30),
            device_id=device if device.type == "cuda" else None,
        )
        # A thread of gloo that frees a tensor while the interpreter is taken down ends the process by a signal, though
        # all work was done: models must let go of their groups, whose threads then end, before that.
        atexit.register(gc.collect)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {asked.rank} of {asked.world} did not reach the others: {str(error).splitlines()[0]}",
            expected=f"all ranks at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            fix="look at MASTER_ADDR, the port, and which network interface is used (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME); zhibei launch checks these first",
            where="environment",
        ) from error


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


def units_of(hf: torch.nn.Module) -> list[Any]:
    """The modules that FSDP gathers and divides as one; none in a model that is not divided."""
    return [module for module in hf.modules() if isinstance(module, FSDPModule)]


@contextmanager
def held_whole(hf: torch.nn.Module, *, divides_after_forward: bool) -> Iterator[None]:
    """All layers on every rank while the block runs: sampling would gather each of them for each token."""
    units = units_of(hf)
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
        unit.stays_whole = True
    try:
        yield
    finally:
        for unit in units:
            unit.stays_whole = False
            unit.set_reshard_after_forward(divides_after_forward, recurse=False)
            unit.reshard()


def divide_after_looking(body: torch.nn.Module) -> None:
    """Divide layers again after a forward pass without gradients: no backward pass will, and until then parameters are
    not what learns, but whole copies in the type that computes."""

    def hook(module: Any, _arguments: Any, _output: Any) -> None:
        if not torch.is_grad_enabled() and not getattr(module, "stays_whole", False):
            for unit in units_of(module):
                unit.reshard()

    body.register_forward_hook(hook)
