"""Optimiser states of one form as another optimiser keeps them. Knows tensors' names, not files or ranks.

Full training in bf16 by one process keeps the lower halves of its masters (`NAME::low`, with one counter of steps for
all). Parts of a divided model are fp32 and their own masters; on the host, and beside fp16 weights, masters are tensors
of their own (`NAME::master`). All hold the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from zhibei.train.optimizer import Optimizer
from zhibei.train.split_adamw import join, split

Maker = Callable[[], torch.Tensor]
NUM_STEPS = "::num_steps"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Made(Mapping[str, torch.Tensor]):
    """Tensors that are made when asked for."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self._makers = makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()


def load_states(optimizer: Optimizer, stored: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Put stored states into an optimiser, whatever form they were saved in, and into its parameters what these states
    say more exactly than the stored `weights` do. Raises UserError when they belong to other parameters."""
    wanted = optimizer.tensors()
    makers: dict[str, Maker] = {name: functools.partial(stored.__getitem__, name) for name in stored}
    exact: dict[str, Maker] = {}
    for name in optimizer.parameters:
        master = _master(name, stored, weights)
        if f"{name}::low" in stored and f"{name}::low" not in wanted:
            _split_to_master(name, makers, master, is_own=f"{name}::master" not in wanted, exact=exact)
        elif f"{name}::low" in wanted and f"{name}::low" not in stored:
            _master_to_split(name, makers, master, exact)
        elif f"{name}::master" in wanted and f"{name}::master" not in stored:
            makers[f"{name}::master"] = master
    if NUM_STEPS not in wanted:
        makers.pop(NUM_STEPS, None)
    optimizer.load(Made(makers))
    for name, make in exact.items():
        optimizer.parameters[name].data.copy_(make())


def _master(name: str, stored: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> Maker:
    """The fp32 values of a parameter, from whatever holds them."""
    if f"{name}::master" in stored:
        return functools.partial(stored.__getitem__, f"{name}::master")
    if f"{name}::low" in stored:
        return lambda: join(weights[name], stored[f"{name}::low"])
    return lambda: weights[name].float()


def _split_to_master(
    name: str, makers: dict[str, Maker], master: Maker, *, is_own: bool, exact: dict[str, Maker]
) -> None:
    num_steps = makers[NUM_STEPS]
    makers.pop(f"{name}::low")
    makers[f"{name}::step"] = lambda: num_steps().float()
    if is_own:
        exact[name] = master
    else:
        makers[f"{name}::master"] = master


def _master_to_split(name: str, makers: dict[str, Maker], master: Maker, exact: dict[str, Maker]) -> None:
    step = makers.pop(f"{name}::step", lambda: torch.tensor(0))  # before the first step there are no moments yet
    makers.pop(f"{name}::master", None)
    makers[NUM_STEPS] = lambda: step().long()
    for kind in MOMENTS:
        makers.setdefault(f"{name}::{kind}", lambda: torch.zeros_like(master()))
    makers[f"{name}::low"] = lambda: split(master())[1]
    exact[name] = lambda: split(master())[0]
