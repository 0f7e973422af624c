"""AdamW on bf16 weights with exact fp32 masters in two more bytes per weight. Knows parameters, not losses.

A bf16 number is the upper half of an fp32 number. The master's bits are `(weight << 16) + low` with a signed 16-bit
`low`, so weight (2 bytes) and low (2 bytes) hold the fp32 master exactly, and nothing is stored twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.config.run import TrainingSection


class SplitAdamW:
    """AdamW (arXiv:1711.05101, algorithm 2) whose update is one pass over memory; compiled on a GPU."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], section: TrainingSection) -> None:
        self.parameters = dict(parameters)
        self.section = section
        self.num_steps = 0
        self.low = {name: torch.zeros_like(p, dtype=torch.int16) for name, p in self.parameters.items()}
        self.exp_avg = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}

    def step(self, gradients: Mapping[str, torch.Tensor], *, learning_rate: float, scale: float) -> None:
        """One update with gradients (any dtype) times `scale`; parameters without a gradient stay as they are."""
        self.num_steps += 1
        section = self.section
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            decay = section.weight_decay if parameter.ndim >= 2 else 0.0
            # Numbers that change every step travel as a tensor: as plain floats they would be compiled in.
            numbers = torch.tensor(
                [
                    scale,
                    1 - learning_rate * decay,
                    learning_rate / (1 - section.beta1**self.num_steps),
                    (1 - section.beta2**self.num_steps) ** 0.5,
                ],
                dtype=torch.float32,
            )
            update = _compiled_update() if parameter.device.type == "cuda" else update_in_place
            update(
                (parameter.data.view(-1), self.low[name].view(-1)),
                gradient.reshape(-1),
                (self.exp_avg[name].view(-1), self.exp_avg_sq[name].view(-1)),
                _on(parameter.device, numbers),
                (section.beta1, section.beta2, section.epsilon),
            )

    def master(self, name: str) -> torch.Tensor:
        """The fp32 master of a parameter, put together."""
        return join(self.parameters[name].data, self.low[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All state as named tensors; the upper halves of the masters are the model's own weights."""
        found = {"::num_steps": torch.tensor(self.num_steps)}
        for kind, group in self._groups().items():
            found |= {f"{name}::{kind}": value for name, value in group.items()}
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put `tensors()` of an earlier run back. Raises UserError when they belong to other parameters."""
        if set(tensors) != set(self.tensors()):
            differing = sorted(set(tensors) ^ set(self.tensors()))
            raise UserError(
                f"the checkpoint's optimiser state is for other parameters, e.g. {differing[0]}",
                expected="a checkpoint of the same model, method, precision and optimiser",
                fix="resume with the run file the run was started with",
            )
        self.num_steps = int(tensors["::num_steps"])
        for kind, group in self._groups().items():
            for name, value in group.items():
                value.copy_(tensors[f"{name}::{kind}"])

    def _groups(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"low": self.low, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """fp32 from its bf16 upper half and the signed 16-bit rest; exact."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 nearest to the fp32 master, and the rest of its bits; `join` gives the master back bit for bit."""
    bits = master.view(torch.int32)
    upper = master.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    rest = bits - (upper << 16)
    # A tie rounded down leaves +32768, one more than int16 holds; the other neighbour is as near and leaves -32768.
    is_tie = (rest == 32768).to(torch.int32)
    upper, rest = upper + is_tie, rest - (is_tie << 16)
    return upper.to(torch.int16).view(torch.bfloat16), rest.to(torch.int16)


def update_in_place(
    weights: tuple[torch.Tensor, torch.Tensor],
    gradient_N: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    numbers: torch.Tensor,
    constants: tuple[float, float, float],
) -> None:
    """One AdamW update of N weights, their low halves and both moments.

    `numbers`: gradient scale, 1 - rate * decay, rate / (1 - beta1^t), sqrt(1 - beta2^t). `constants`: betas, epsilon.
    """
    weight_N, low_N = weights
    exp_avg_N, exp_avg_sq_N = moments
    beta1, beta2, epsilon = constants
    scaled_N = gradient_N.float() * numbers[0]
    first_N = beta1 * exp_avg_N + (1 - beta1) * scaled_N
    second_N = beta2 * exp_avg_sq_N + (1 - beta2) * scaled_N * scaled_N
    moved_N = join(weight_N, low_N) * numbers[1] - numbers[2] * first_N / (second_N.sqrt() / numbers[3] + epsilon)
    upper_N, rest_N = split(moved_N)
    weight_N.copy_(upper_N)
    low_N.copy_(rest_N)
    exp_avg_N.copy_(first_N)
    exp_avg_sq_N.copy_(second_N)


@functools.cache
def _compiled_update() -> Callable[..., Any]:
    return torch.compile(update_in_place, dynamic=True)


def _on(device: torch.device, numbers: torch.Tensor) -> torch.Tensor:
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)
