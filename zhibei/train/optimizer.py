"""Optimisers that keep fp32 master weights whatever the model computes in. Knows parameters, not losses.

The arithmetic of the updates is torch's (AdamW, Adafactor) or bitsandbytes' (8-bit AdamW).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from zhibei.config.errors import UserError
from zhibei.config.run import TrainingSection
from zhibei.model.ranks import own_part
from zhibei.text.hub import no_fetched_kernels
from zhibei.train.split_adamw import SplitAdamW

# fp32 copies of gradients live only for the parameters updated together: at most so many elements at a time.
ELEMENTS_PER_UPDATE = 2**28


class Optimizer(Protocol):
    """What a step and a checkpoint need of an optimiser. `parameters` are what it updates: of a divided model the
    parts that this rank holds."""

    parameters: dict[str, torch.nn.Parameter]

    def step(self, gradients: Mapping[str, torch.Tensor], *, learning_rate: float, scale: float) -> None: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None: ...


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], section: TrainingSection, *, on_host: bool = False
) -> Optimizer:
    """AdamW on bf16 weights keeps its masters split (two bytes less per weight); everything else keeps fp32 copies.

    A score head is fp32 on a bf16 body: each kind is then updated by its own. Raises UserError for an optimiser that
    would have to see whole matrices where ranks hold parts. `on_host`: masters and moments lie in host memory and are
    updated there; gradients travel there and weights back.
    """
    if section.optimizer != "adamw" and any(isinstance(p, DTensor) for p in parameters.values()):
        raise UserError(
            f"{section.optimizer} keeps figures of whole matrices (means of rows, blocks of values), and the model is "
            "divided among ranks",
            expected="an optimiser whose state is divided like the weights: adamw",
            fix="set optimizer: adamw, or distributed.sharding: no_shard",
            where="optimizer",
        )
    parameters = {name: held_part(parameter) for name, parameter in parameters.items()}
    if on_host:
        return MasterOptimizer(parameters, section, home=torch.device("cpu"))
    bf16 = {name: p for name, p in parameters.items() if p.dtype == torch.bfloat16}
    others = {name: p for name, p in parameters.items() if name not in bf16}
    if section.optimizer != "adamw" or not bf16:
        return MasterOptimizer(parameters, section)
    if not others:
        return SplitAdamW(parameters, section)
    return PartedOptimizer(SplitAdamW(bf16, section), MasterOptimizer(others, section), parameters)


def held_part(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A divided parameter's part on this rank, in the same memory; any other parameter itself."""
    if not isinstance(parameter, DTensor):
        return parameter
    return torch.nn.Parameter(own_part(parameter.detach()), requires_grad=parameter.requires_grad)


class PartedOptimizer:
    """bf16 parameters with split masters, and the others beside them."""

    def __init__(
        self, split: SplitAdamW, others: MasterOptimizer, parameters: Mapping[str, torch.nn.Parameter]
    ) -> None:
        self.split, self.others, self.parameters = split, others, dict(parameters)

    def step(self, gradients: Mapping[str, torch.Tensor], *, learning_rate: float, scale: float) -> None:
        """One update of both parts."""
        for part in (self.split, self.others):
            own = {name: gradient for name, gradient in gradients.items() if name in part.parameters}
            if own:
                part.step(own, learning_rate=learning_rate, scale=scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state of both parts as named tensors."""
        return {**self.split.tensors(), **self.others.tensors()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put `tensors()` of an earlier run back. Raises UserError when they belong to other parameters."""
        own = {key: value for key, value in tensors.items() if key.rsplit("::", 1)[0] in self.others.parameters}
        self.others.load(own)
        self.split.load({key: value for key, value in tensors.items() if key not in own})


class MasterOptimizer:
    """Updates fp32 masters and copies them into the model's parameters.

    A parameter that is fp32 already is its own master, unless masters lie elsewhere (`home`); nothing is held twice.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        section: TrainingSection,
        *,
        home: torch.device | None = None,
    ) -> None:
        self.parameters = dict(parameters)

        def is_own_master(parameter: torch.nn.Parameter) -> bool:
            return parameter.dtype == torch.float32 and home in (None, parameter.device)

        self.masters = {
            name: p if is_own_master(p) else torch.nn.Parameter(p.detach().to(home or p.device, torch.float32))
            for name, p in self.parameters.items()
        }
        decayed = [master for master in self.masters.values() if master.ndim >= 2]
        plain = [master for master in self.masters.values() if master.ndim < 2]
        groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.inner = OPTIMIZERS[section.optimizer]([group for group in groups if group["params"]], section)

    def step(self, gradients: Mapping[str, torch.Tensor], *, learning_rate: float, scale: float) -> None:
        """One update with gradients (any dtype) times `scale`; parameters without a gradient stay as they are."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        for names in self._parts(gradients):
            for name in names:
                self.masters[name].grad = gradients[name].to(self.masters[name].device).float() * scale
            self.inner.step()
            for name in names:
                master, parameter = self.masters[name], self.parameters[name]
                master.grad = None
                if master is not parameter:
                    parameter.data.copy_(master.data)

    def _parts(self, gradients: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
        part: list[str] = []
        elements = 0
        for name in gradients:
            part.append(name)
            elements += gradients[name].numel()
            if elements >= ELEMENTS_PER_UPDATE:
                yield part
                part, elements = [], 0
        if part:
            yield part

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state as named tensors: masters that are not the parameters themselves, and the moments."""
        found: dict[str, torch.Tensor] = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                found[f"{name}::master"] = master.data
            for key, value in self.inner.state.get(master, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"{name}::{key}"] = value
                elif isinstance(value, (int, float)):
                    found[f"{name}::{key}"] = torch.tensor(value, dtype=torch.float64)
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put `tensors()` of an earlier run back. Raises UserError when they belong to other parameters."""
        unknown = {key.rsplit("::", 1)[0] for key in tensors} - set(self.masters)
        if unknown:
            raise UserError(
                f"the checkpoint's optimiser state is for other parameters, e.g. {sorted(unknown)[0]}",
                expected="a checkpoint of the same model and method",
                fix="resume with the run file the run was started with",
            )
        plain_numbers = type(self.inner).__module__.startswith("bitsandbytes")
        for key in tensors:
            name, entry = key.rsplit("::", 1)
            master, value = self.masters[name], tensors[key]
            if entry == "master":
                master.data.copy_(value)
            elif value.ndim == 0 and plain_numbers:
                self.inner.state[master][entry] = int(value)
            else:
                # Adam's step counter stays where torch keeps it: on the host unless the kernel is fused.
                fused = any(group.get("fused") for group in self.inner.param_groups)
                place = master.device if value.ndim or fused else torch.device("cpu")
                self.inner.state[master][entry] = value.to(place)


def _adamw(groups: list[dict[str, Any]], section: TrainingSection) -> torch.optim.Optimizer:
    on_gpu = groups[0]["params"][0].device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(section.beta1, section.beta2), eps=section.epsilon, fused=on_gpu or None
    )


def _adamw_8bit(groups: list[dict[str, Any]], section: TrainingSection) -> torch.optim.Optimizer:
    """Block-wise 8-bit states (arXiv:2110.02861); needs bitsandbytes."""
    try:
        with no_fetched_kernels():
            bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError:
        raise UserError(
            "sft.optimizer: adamw_8bit, but bitsandbytes is not installed",
            expected="the package bitsandbytes",
            fix="pip install 'zhibei[bnb]', or set sft.optimizer: adamw",
            where="sft.optimizer",
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups, lr=0.0, betas=(section.beta1, section.beta2), eps=section.epsilon)


def _adafactor(groups: list[dict[str, Any]], section: TrainingSection) -> torch.optim.Optimizer:
    """Factored second moments (arXiv:1804.04235), with the rate of the schedule instead of its own."""
    return torch.optim.Adafactor(groups, lr=0.0)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], TrainingSection], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
}
