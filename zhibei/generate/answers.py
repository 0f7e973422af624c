"""An answer, finished or under way: its tokens, its text, where it ends and why. Knows no model and no batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zhibei.config.errors import UserError
from zhibei.generate.options import SamplingOptions
from zhibei.generate.stops import Decode, TextTail

Alternatives = list[tuple[int, float]]
"""Token ids and their log-probabilities under the model, the likeliest first."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    tokens: list[int]
    """Token ids drawn, the stop token included when one ended the answer."""
    logps: list[float]
    """Log-probability (nats) of each token under the distribution it was drawn from: after penalty, temperature and
    filters. With temperature 0 there was one choice only, so 0."""
    model_logps: list[float]
    """Log-probability (nats) of each token under the model itself: temperature 1, no filters."""
    finish: Literal["stop", "length"]
    """`stop`: a stop token or stop string came. `length`: the answer was cut off."""
    num_content_tokens: int
    """How many of `tokens` come before the stop token."""
    text: str | None = None
    """The words, without stop token and stop string; None when no `decode` was given."""
    notice: str = ""
    """What was done because prompt and answer exceed the model's context; empty as a rule."""
    alternatives: list[Alternatives] | None = None
    """The likeliest tokens at each place, where they were asked for."""

    @property
    def content_tokens(self) -> list[int]:
        """`tokens` without the stop token."""
        return self.tokens[: self.num_content_tokens]


@dataclass(frozen=True)
class Piece:
    """Text that came since the last piece. The last piece carries the whole answer."""

    text: str
    answer: Answer | None = None


@dataclass(frozen=True)
class Token:
    """One drawn token with its log-probability when drawn and under the model itself."""

    id: int
    logp: float
    model_logp: float
    alternatives: Alternatives | None = None


class Growing:
    """One answer under way: where it ends, and why. `budget` is the most tokens it may get."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        number: int,
        context: int | None,
        options: SamplingOptions,
        decode: Decode | None,
        shows_text: bool = False,
    ) -> None:
        if options.stop_strings and decode is None:
            raise ValueError("stop strings need a decode function")
        self.number = number
        self.prompt, self.budget, self._notice = fit(list(prompt), number, context, options)
        self._tokens: list[Token] = []
        self._decode = decode
        self._tail = TextTail(decode, options.stop_strings) if decode and (shows_text or options.stop_strings) else None
        self._finish: Literal["stop", "length"] | None = None
        self._num_content = 0

    @property
    def ended(self) -> bool:
        return self._finish is not None

    @property
    def token_ids(self) -> list[int]:
        """What was drawn so far."""
        return [token.id for token in self._tokens]

    def take(self, token: Token, stops: frozenset[int]) -> str:
        """Add a token; the text that became certain by it. Raises UserError for a log-probability that is no number."""
        if not math.isfinite(token.model_logp):
            raise UserError(
                "the model's logits are not finite (nan or inf)",
                expected="finite logits",
                fix="the weights are damaged, or overflow in this precision: check the folder with `zhibei verify`, "
                "or use fp32 or bf16 in place of fp16",
                where=f"answer to prompt {self.number}, token {len(self._tokens)}",
            )
        self._tokens.append(token)
        text = ""
        if token.id in stops:
            self._finish = "stop"
        else:
            self._num_content += 1
            text = self._tail.feed(token.id) if self._tail else ""
            if self._tail and self._tail.stopped:
                self._finish = "stop"
            elif len(self._tokens) == self.budget:
                self._finish = "length"
        if self.ended and self._tail:
            text += self._tail.finish()
            if self._tail.stopped:
                self._finish = "stop"
        return text

    def answer(self) -> Answer:
        """The finished answer."""
        if self._finish is None:
            raise RuntimeError("an answer was asked for before it ended")
        ids = [token.id for token in self._tokens]
        text = self._tail.text if self._tail else None
        if self._decode and not self._tail:
            text = self._decode(ids[: self._num_content])
        others = [token.alternatives for token in self._tokens if token.alternatives is not None]
        return Answer(
            tokens=ids,
            logps=[token.logp for token in self._tokens],
            model_logps=[token.model_logp for token in self._tokens],
            finish=self._finish,
            num_content_tokens=self._num_content,
            text=text,
            notice=self._notice,
            alternatives=others if others else None,
        )


def fit(prompt: list[int], number: int, context: int | None, options: SamplingOptions) -> tuple[list[int], int, str]:
    """Prompt, tokens it may get, and what had to be changed for both to fit into the context.

    Raises UserError for an empty prompt, and for one that does not fit where `overflow` forbids changing it.
    """
    where = f"prompt {number}"
    if not prompt:
        raise UserError(
            "the prompt has no tokens",
            expected="at least one token, such as BOS",
            fix="use a template or tokenizer that begins with BOS, or write a prompt",
            where=where,
        )
    wanted = options.max_new_tokens
    if context is None or len(prompt) + wanted <= context:
        return prompt, wanted, ""
    if options.overflow == "fewer_tokens" and len(prompt) < context:
        room = context - len(prompt)
        return prompt, room, f"at most {room} new tokens instead of {wanted}: the context of {context} tokens is full"
    if options.overflow == "cut_prompt" and wanted < context:
        cut = len(prompt) + wanted - context
        return prompt[cut:], wanted, f"the oldest {cut} tokens of the prompt were left out: context of {context} tokens"
    raise UserError(
        f"{len(prompt)} prompt tokens and {wanted} new ones exceed the model's context of {context}",
        expected=f"at most {context} tokens in all",
        fix="shorten the prompt, lower max_new_tokens, or choose overflow: fewer_tokens or cut_prompt",
        where=where,
    )
