"""Answers to prompts, whole or as they grow, with their log-probabilities. Knows no template and no stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zhibei.config.errors import UserError
from zhibei.generate.decoding import Decoding, Drawn, context_tokens
from zhibei.generate.options import SamplingOptions
from zhibei.generate.stops import Decode, TextTail
from zhibei.model.answering import answering

# On a GPU, looking at tokens waits for the device; rows that have ended run on for a few steps instead.
_STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}


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

    @property
    def content_tokens(self) -> list[int]:
        """`tokens` without the stop token."""
        return self.tokens[: self.num_content_tokens]


@dataclass(frozen=True)
class Piece:
    """Text that came since the last piece. The last piece carries the whole answer."""

    text: str
    answer: Answer | None = None


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    options: SamplingOptions,
    stop_ids: Sequence[int],
    pad_id: int = 0,
    decode: Decode | None = None,
) -> list[Answer]:
    """Answer every prompt (token ids) with a causal model of transformers or PEFT; answers come in the prompts' order.

    An answer depends on the model, its prompt, the options and, unless greedy, its number among the prompts; never on
    the other prompts. The global random state and the model's train/eval state are left as they were. Gradients are
    not recorded. `decode` turns token ids into text; stop strings need it.

    Raises UserError for an empty prompt, a prompt beyond the context, or logits that are not finite.
    """
    rows = [
        _Row(prompt, number=number, model=model, options=options, decode=decode)
        for number, prompt in enumerate(prompts)
    ]
    stops = frozenset(stop_ids)
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    with answering(model):
        for start in range(0, len(rows), options.batch_rows):
            _answer_batch(model, by_length[start : start + options.batch_rows], options, stops, pad_id)
    return [row.answer() for row in rows]


def stream(
    model: Any, prompt: Sequence[int], *, options: SamplingOptions, stop_ids: Sequence[int], decode: Decode
) -> Iterator[Piece]:
    """The answer that `generate` gives to this one prompt, piece by piece.

    Pieces hold whole characters and never a part of a stop string; put together they are `Answer.text`. Until the
    iterator is exhausted or closed the model stays in eval mode. Raises what `generate` raises.
    """
    row = _Row(prompt, number=0, model=model, options=options, decode=decode, shows_text=True)
    stops = frozenset(stop_ids)
    with answering(model):
        decoding = Decoding(model, [row.prompt], options=options, rows=[0], pad_id=0)
        while not row.ended:
            ((token,), (logp,), (model_logp,)) = _values(decoding.step()).tolist()
            text = row.take(int(token), logp, model_logp, stops)
            if text and not row.ended:
                yield Piece(text)
            elif row.ended:
                yield Piece(text, row.answer())


def _values(drawn: Drawn) -> torch.Tensor:
    """Token ids and both log-probabilities as float64 [3, B], exact for each, so that one copy brings them all."""
    return torch.stack([drawn.tokens_B.double(), drawn.logps_B.double(), drawn.model_logps_B.double()])


def _answer_batch(model: Any, rows: list[_Row], options: SamplingOptions, stops: frozenset[int], pad_id: int) -> None:
    decoding = Decoding(
        model, [row.prompt for row in rows], options=options, rows=[row.number for row in rows], pad_id=pad_id
    )
    looks_every = _STEPS_BETWEEN_LOOKS.get(decoding.device.type, 1)
    active = list(rows)
    unread: list[torch.Tensor] = []
    most_steps = max(row.budget for row in rows)
    for num_steps in range(1, most_steps + 1):
        unread.append(_values(decoding.step()))
        if len(unread) < looks_every and num_steps < most_steps:
            continue
        for tokens, logps, model_logps in torch.stack(unread).tolist():
            for row, token, logp, model_logp in zip(active, tokens, logps, model_logps, strict=True):
                if not row.ended:
                    row.take(int(token), logp, model_logp, stops)
        unread.clear()
        going = [index for index, row in enumerate(active) if not row.ended]
        if not going:
            return
        # Copying the cache costs about as much as a step, so it waits until a quarter of the rows have ended.
        if len(going) <= len(active) * 3 // 4:
            decoding.keep(going)
            active = [active[index] for index in going]


class _Row:
    """One answer under way: where it ends, and why."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        number: int,
        model: Any,
        options: SamplingOptions,
        decode: Decode | None,
        shows_text: bool = False,
    ) -> None:
        if options.stop_strings and decode is None:
            raise ValueError("stop strings need a decode function")
        self.number = number
        self.prompt, self.budget, self._notice = _fit(list(prompt), number, context_tokens(model), options)
        self._tokens: list[int] = []
        self._logps: list[float] = []
        self._model_logps: list[float] = []
        self._decode = decode
        self._tail = TextTail(decode, options.stop_strings) if decode and (shows_text or options.stop_strings) else None
        self._finish: Literal["stop", "length"] | None = None
        self._num_content = 0

    @property
    def ended(self) -> bool:
        return self._finish is not None

    def take(self, token: int, logp: float, model_logp: float, stops: frozenset[int]) -> str:
        """Add a token; the text that became certain by it."""
        if not math.isfinite(model_logp):
            raise UserError(
                "the model's logits are not finite (nan or inf)",
                expected="finite logits",
                fix="the weights are damaged, or overflow in this precision: check the folder with `zhibei verify`, "
                "or use fp32 or bf16 in place of fp16",
                where=f"answer to prompt {self.number}, token {len(self._tokens)}",
            )
        self._tokens.append(token)
        self._logps.append(logp)
        self._model_logps.append(model_logp)
        text = ""
        if token in stops:
            self._finish = "stop"
        else:
            self._num_content += 1
            text = self._tail.feed(token) if self._tail else ""
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
        if self._finish is None:
            raise RuntimeError("an answer was asked for before it ended")
        text = self._tail.text if self._tail else None
        if self._decode and not self._tail:
            text = self._decode(self._tokens[: self._num_content])
        return Answer(
            tokens=self._tokens,
            logps=self._logps,
            model_logps=self._model_logps,
            finish=self._finish,
            num_content_tokens=self._num_content,
            text=text,
            notice=self._notice,
        )


def _fit(prompt: list[int], number: int, context: int | None, options: SamplingOptions) -> tuple[list[int], int, str]:
    """Prompt, tokens it may get, and what had to be changed for both to fit into the context."""
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
