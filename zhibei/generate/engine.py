"""Continuous batching on the training weights: slots answer side by side and take the next prompt as soon as they end.

Knows models through roads (generate/decoding.py); no template, no stage, no threads: one thread drives it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.generate.answers import Growing, Piece, Token
from zhibei.generate.choosing import Chooser, Drawn, refuse_beams
from zhibei.generate.decoding import Road, context_tokens, road_of
from zhibei.generate.options import SamplingOptions
from zhibei.generate.stops import Decode
from zhibei.model.answering import answering

# On a GPU, reading a token waits for the device: results are read while the next step is already under way.
STEPS_IN_FLIGHT = {"cpu": 1, "cuda": 2}
# Prompt tokens read at once. More would hold up the answers under way for longer.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
# Reading one prompt costs about as much as reading several: freed slots wait for company, but not for long.
_FREE_SHARE = 8
_MOST_STEPS_WAITED = 8
MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered."""

    prompt: Sequence[int]
    """Token ids."""
    options: SamplingOptions
    stop_ids: Sequence[int]
    """Tokens at which the answer ends."""
    number: int = 0
    """The row that draws depend on, besides the seed and the position."""
    decode: Decode | None = None
    """Turns token ids into text; stop strings need it."""
    top_logprobs: int = 0
    """Likeliest tokens that are noted at each place, 0 to 20."""
    pieces: bool = True
    """Text comes as it grows; otherwise only with the whole answer, which costs less."""
    mask: Callable[[Sequence[int]], torch.Tensor] | None = None
    """Which tokens may come next (bool [V]), given those drawn so far; a grammar, for instance."""


@dataclass
class _Active:
    """An answer in a slot."""

    id: int
    request: Request
    growing: Growing
    stops: frozenset[int]
    num_launched: int = 0
    """Tokens whose computation was begun."""

    @property
    def length(self) -> int:
        """Tokens that are in the cache, or on their way into it."""
        return len(self.growing.prompt) + self.num_launched - 1


def begun(request: Request, context: int | None, *, shows_text: bool) -> Growing:
    """The answer to a request before its first token. Raises UserError for what no engine can do."""
    refuse_beams(request.options)
    return Growing(
        request.prompt,
        number=request.number,
        context=context,
        options=request.options,
        decode=request.decode,
        shows_text=shows_text,
    )


class Engine:
    """Answers requests with a causal model of transformers or PEFT, at most `slots` at a time.

    The weights are read as they are when a step runs; none are copied. An answer depends on the weights, its request
    and nothing else: not on its neighbours, its slot or the time it came. `cache_tokens` is the most tokens, prompt
    and answer together, that a slot has room for; None means the model's context. Memory for them is taken as it is
    needed, up to `cache_bytes` of `zhibei.plan.rollout_cache`.

    While there is work the model is set up to answer; when the last answer is out, or after `close`, it is as before.
    """

    def __init__(self, model: Any, *, slots: int, cache_tokens: int | None = None, pad_id: int = 0) -> None:
        if slots < 1 or (cache_tokens is not None and cache_tokens < 1):
            raise UserError(
                f"an engine of {slots} slots with room for {cache_tokens} tokens each",
                expected="at least one slot, and room for at least one token",
                fix="ask for more slots or tokens",
                where="engine",
            )
        self._model, self._slots, self._pad_id = model, slots, pad_id
        self._context = context_tokens(model)
        self._room = min(cache_tokens or 2**31, self._context or 2**31)
        self._device = model.get_input_embeddings().weight.device
        self._chooser = Chooser(slots, self._device)
        self._tokens_S = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._positions_S = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._road: Road | None = None
        self._working = ExitStack()
        self._is_working = False
        self._waiting: deque[_Active] = deque()
        self._active: list[_Active] = []
        self._in_flight: deque[tuple[list[_Active], torch.Tensor]] = deque()
        self._steps_waited = 0
        self._next_id = 0

    @property
    def num_active(self) -> int:
        """Answers under way."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests that no slot was free for yet."""
        return len(self._waiting)

    @property
    def road(self) -> str:
        """How logits are computed: `fast`, `slots` or `alone` (generate/decoding.py); "" before the first step."""
        return self._road.name if self._road else ""

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises UserError if it can never be answered."""
        if not 0 <= request.top_logprobs <= MOST_ALTERNATIVES:
            raise UserError(
                f"top_logprobs is {request.top_logprobs}",
                expected=f"0 to {MOST_ALTERNATIVES}",
                fix="ask for fewer alternatives",
                where=f"prompt {request.number}",
            )
        growing = begun(request, self._context, shows_text=request.pieces)
        if len(growing.prompt) + growing.budget > self._room:
            raise UserError(
                f"{len(growing.prompt)} prompt tokens and {growing.budget} new ones do not fit into a slot",
                expected=f"at most {self._room} tokens in all",
                fix="shorten the prompt, lower max_new_tokens, or give the engine more cache_tokens",
                where=f"prompt {request.number}",
            )
        self._next_id += 1
        self._waiting.append(_Active(self._next_id, request, growing, frozenset(request.stop_ids)))
        return self._next_id

    def cancel(self, id: int) -> None:
        """Forget a request, queued or under way; its slot is free at the next step. Unknown ids are ignored."""
        self._waiting = deque(one for one in self._waiting if one.id != id)
        self._free([slot for slot, one in enumerate(self._active) if one.id == id])
        self._rest()

    def close(self) -> None:
        """Drop everything under way and leave the model as it was."""
        self._waiting.clear()
        self._active.clear()
        self._in_flight.clear()
        self._rest()

    @torch.no_grad()
    def step(self) -> list[tuple[int, Piece]]:
        """Advance all slots by one token; the text that came, by request. The last piece of a request carries its
        Answer. Raises UserError for logits that are not finite, after which the engine is empty."""
        try:
            self._begin()
            self._admit()
            pieces: list[tuple[int, Piece]] = []
            while self._in_flight and any(one.request.mask for one in self._active):
                pieces += self._read()  # what may come next depends on what has come
            if self._going():
                self._launch()
            lag = STEPS_IN_FLIGHT.get(self._device.type, 1)
            while self._in_flight and (len(self._in_flight) >= lag or not self._going()):
                pieces += self._read()
        except BaseException:
            self.close()
            raise
        self._rest()
        return pieces

    def _begin(self) -> None:
        """Set the model up to answer, and look at it again: adapters may have been switched since the last time."""
        if self._is_working or not self._waiting:
            return
        self._working.enter_context(answering(self._model))
        self._is_working = True
        if self._road is None or not self._road.refresh(self._model):
            self._road = road_of(self._model, slots=self._slots, columns=self._room, pad_id=self._pad_id)

    def _rest(self) -> None:
        """Give the model back when there is nothing to do."""
        if self._is_working and not (self._waiting or self._active or self._in_flight):
            self._working.close()
            self._is_working = False

    def _going(self) -> bool:
        """Whether some answer may get another token."""
        return any(one.num_launched < one.growing.budget for one in self._active)

    def _admit(self) -> None:
        """Fill free slots: at once when there are enough of them, or when they were free for some steps."""
        free = self._slots - len(self._active)
        if not self._waiting or not free:
            self._steps_waited = 0
            return
        worthwhile = min(len(self._waiting), max(1, self._slots // _FREE_SHARE))
        if free < worthwhile and self._active and self._steps_waited < _MOST_STEPS_WAITED:
            self._steps_waited += 1
            return
        self._steps_waited = 0
        self._prefill(self._next_prompts())

    def _next_prompts(self) -> list[_Active]:
        """Waiting requests that are read together."""
        most = PREFILL_TOKENS.get(self._device.type, 4096)
        batch: list[_Active] = []
        longest = 0
        while self._waiting and len(self._active) + len(batch) < self._slots:
            longest = max(longest, len(self._waiting[0].growing.prompt))
            if batch and longest * (len(batch) + 1) > most:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _prefill(self, batch: list[_Active]) -> None:
        assert self._road is not None
        slots = list(range(len(self._active), len(self._active) + len(batch)))
        prompts = [one.growing.prompt for one in batch]
        for slot, one in zip(slots, batch, strict=True):
            self._chooser.admit(
                slot,
                one.request.options,
                number=one.request.number,
                budget=one.growing.budget,
                alternatives=one.request.top_logprobs,
            )
        logits_BV = self._road.prefill(prompts, slots)
        drawn = self._chooser.choose_first(logits_BV, slots, prompts, _allowed(batch, logits_BV))
        self._active += batch
        where = slice(slots[0], slots[-1] + 1)
        self._tokens_S[where] = drawn.tokens_B
        self._positions_S[where] = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        self._fly(batch, drawn)

    def _launch(self) -> None:
        """One token more for every slot. A slot whose answer is complete, but not read yet, runs idly along."""
        assert self._road is not None
        num_rows = len(self._active)
        columns = max(one.length for one in self._active) + 1
        positions_B = self._positions_S[:num_rows].clamp(max=columns - 1)
        logits_BV = self._road.step(self._tokens_S[:num_rows], positions_B, columns=columns)
        drawn = self._chooser.choose(logits_BV, _allowed(self._active, logits_BV))
        self._tokens_S[:num_rows] = drawn.tokens_B
        self._positions_S[:num_rows] += 1
        self._fly(self._active, drawn)

    def _fly(self, batch: list[_Active], drawn: Drawn) -> None:
        for one in batch:
            one.num_launched = min(one.num_launched + 1, one.growing.budget)
        self._in_flight.append((list(batch), drawn.packed()))

    def _read(self) -> list[tuple[int, Piece]]:
        """Take in the oldest results that are still out."""
        batch, values = self._in_flight.popleft()
        pieces: list[tuple[int, Piece]] = []
        columns = zip(*values.tolist(), strict=True)
        live = {one.id for one in self._active}
        for one, (token, logp, model_logp, *likeliest) in zip(batch, columns, strict=True):
            if one.id not in live:
                continue
            text = one.growing.take(
                Token(int(token), logp, model_logp, _alternatives(likeliest, one.request.top_logprobs)), one.stops
            )
            if one.growing.ended:
                pieces.append((one.id, Piece(text, one.growing.answer())))
            elif text:
                pieces.append((one.id, Piece(text)))
        self._free([slot for slot, one in enumerate(self._active) if one.growing.ended])
        return pieces

    def _free(self, slots: Sequence[int]) -> None:
        """Close the gaps: answers under way always fill the first slots."""
        for slot in sorted(slots, reverse=True):
            last = len(self._active) - 1
            if slot != last:
                assert self._road is not None
                self._road.move(last, slot, num_tokens=self._active[last].length)
                self._chooser.move(last, slot)
                self._tokens_S[slot], self._positions_S[slot] = self._tokens_S[last], self._positions_S[last]
                self._active[slot] = self._active[last]
            self._active.pop()


def _allowed(batch: Sequence[_Active], logits_BV: torch.Tensor) -> torch.Tensor | None:
    """What the masks of these rows let through; None where there is no mask."""
    if not any(one.request.mask for one in batch):
        return None
    allowed_BV = torch.ones_like(logits_BV, dtype=torch.bool)
    for row, one in enumerate(batch):
        if one.request.mask is not None:
            allowed_BV[row] = one.request.mask(one.growing.token_ids).to(logits_BV.device)
    return allowed_BV


def _alternatives(likeliest: list[float], num: int) -> list[tuple[int, float]] | None:
    if not num:
        return None
    half = len(likeliest) // 2
    return [(int(token), logp) for token, logp in zip(likeliest[:half], likeliest[half:], strict=True)][:num]
