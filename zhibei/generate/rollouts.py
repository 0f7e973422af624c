"""Answers that a policy wrote, with everything learning needs to know of them. Knows sampling, no rewards and no loop.

Dimensions: B answers, T tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate
from zhibei.generate.stops import Decode


@dataclass(frozen=True)
class Rollout:
    """B prompts and the answers to them, in order. Lists hold one entry per answer."""

    prompts: list[list[int]]
    """Token ids of the prompts."""
    answers: list[list[int]]
    """Token ids of the answers, the terminator included where one came."""
    logps: list[list[float]]
    """Log-probability (nats) of each answer token under the distribution it was drawn from."""
    finish: list[Literal["stop", "length"]]
    """Whether an answer ended by itself or was cut off."""
    texts: list[str]
    """The answers in words, without terminator."""

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def rows(self) -> list[list[int]]:
        """Prompt and answer of each, end to end."""
        return [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return [len(answer) for answer in self.answers]

    @property
    def mask_BT(self) -> torch.Tensor:
        """True on the tokens of the answers, which begin at the left."""
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    def grid(self, values: Sequence[Sequence[float]]) -> torch.Tensor:
        """Numbers per answer token as [B, T], 0 behind each answer."""
        return grid(values)


def grid(values: Sequence[Sequence[float]]) -> torch.Tensor:
    """Rows of unequal length side by side as float32 [B, T], 0 behind the end of each."""
    longest = max(len(row) for row in values)
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in values], dtype=torch.float32)


def write_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    options: SamplingOptions,
    stop_ids: Sequence[int],
    pad_id: int,
    decode: Callable[[list[int]], str] | Decode,
    numbers: Sequence[int] | None = None,
) -> Rollout:
    """The model's answers to these prompts, written with the weights it has now; no copy of them is made.

    What is drawn for a prompt depends on the options' seed and on its number among the prompts (`numbers` where these
    are some of them), never on how many are answered at once. Raises what `generate` raises.
    """
    answers = generate(
        model, prompts, options=options, stop_ids=stop_ids, pad_id=pad_id, decode=decode, numbers=numbers
    )
    return Rollout(
        prompts=[list(prompt) for prompt in prompts],
        answers=[answer.tokens for answer in answers],
        logps=[answer.logps for answer in answers],
        finish=[answer.finish for answer in answers],
        texts=[answer.text or "" for answer in answers],
    )
