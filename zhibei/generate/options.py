"""How answers are drawn, checked when it is written down. Knows no model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from zhibei.config.errors import UserError

Overflow = Literal["error", "fewer_tokens", "cut_prompt"]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, and when an answer ends.

    The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Raises UserError for a
    value outside of its range.
    """

    max_new_tokens: int = 256
    """Longest answer, in tokens, its terminator included."""
    temperature: float = 0.7
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 switches it off."""
    top_p: float = 1.0
    """The smallest set of tokens that holds this probability (arXiv:1904.09751); 1 switches it off."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely one (arXiv:2407.01082); 0 switches it off."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt and answer so far are divided by it, or multiplied when negative
    (arXiv:1909.05858); 1 switches it off."""
    beams: int = 1
    """Texts that are followed at once, of which the likeliest is the answer; more than 1 needs temperature 0."""
    seed: int = 0
    """Draws are a pure function of seed, row and position."""
    stop_strings: tuple[str, ...] = ()
    """Texts at which an answer ends; they are not part of its text."""
    overflow: Overflow = "error"
    """When prompt and answer exceed the model's context: an error, an answer with fewer tokens, or a prompt
    without its oldest tokens. The last two leave a notice in the answer."""
    batch_rows: int = 64
    """Rows generated at once: memory and speed, never the answers."""

    def __post_init__(self) -> None:
        for name, (fits, expected) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value, whole=name in _WHOLE) or not fits(value):
                raise UserError(
                    f"{name} is {value!r}",
                    expected=expected,
                    fix=f"choose another {name}",
                    where="sampling options",
                )
        if self.beams > 1 and self.temperature > 0:
            raise UserError(
                f"beams is {self.beams} and temperature {self.temperature}",
                expected="temperature 0 with more than one beam: beams look for the likeliest text and draw nothing",
                fix="set temperature to 0, or beams to 1",
                where="sampling options",
            )
        if self.overflow not in get_args(Overflow):
            raise UserError(
                f"overflow is {self.overflow!r}",
                expected=f"one of {', '.join(get_args(Overflow))}",
                fix="choose another overflow",
                where="sampling options",
            )
        if any(not text for text in self.stop_strings):
            raise UserError(
                "an empty stop string would end every answer at once",
                expected="stop strings of at least one character",
                fix="leave the empty one out",
                where="sampling options",
            )


_WHOLE = ("max_new_tokens", "top_k", "beams", "seed", "batch_rows")

_RANGES = {
    "max_new_tokens": (lambda value: value >= 1, "a whole number from 1"),
    "temperature": (lambda value: value >= 0, "a number from 0 (0 is greedy)"),
    "top_k": (lambda value: value >= 0, "a whole number from 0 (0 switches it off)"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, up to 1 (1 switches it off)"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1 (0 switches it off)"),
    "repetition_penalty": (lambda value: value > 0, "a number above 0 (1 switches it off)"),
    "beams": (lambda value: 1 <= value <= 64, "a whole number from 1 to 64 (1 switches it off)"),
    "seed": (lambda value: 0 <= value < 2**63, "a whole number from 0"),
    "batch_rows": (lambda value: value >= 1, "a whole number from 1"),
}


def _is_number(value: object, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return math.isfinite(value)
