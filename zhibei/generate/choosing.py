"""Which token comes next, for rows that each have their own options. Knows logits and draws, no model and no text.

Dimensions: S slots, B rows, V vocabulary, T draws, N alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.config.errors import UserError
from zhibei.generate.draws import uniform
from zhibei.generate.filters import draw, shape_scores
from zhibei.generate.options import SamplingOptions

_NO_OPTIONS = SamplingOptions(temperature=0)


@dataclass(frozen=True)
class Drawn:
    """One new token of each row, with its log-probability when drawn and under the model itself (fp32)."""

    tokens_B: torch.Tensor
    logps_B: torch.Tensor
    model_logps_B: torch.Tensor
    likeliest: tuple[torch.Tensor, torch.Tensor] | None = None
    """Log-probabilities and ids [B, N] of the likeliest tokens, where a row asked for them."""

    def packed(self) -> torch.Tensor:
        """Everything as float64 [3 + 2 N, B], exact for each, so that one copy brings it all."""
        rows = [self.tokens_B.double(), self.logps_B.double(), self.model_logps_B.double()]
        if self.likeliest is not None:
            logps_BN, ids_BN = self.likeliest
            rows += [*ids_BN.double().unbind(1), *logps_BN.double().unbind(1)]
        return torch.stack(rows)


def refuse_beams(options: SamplingOptions) -> None:
    """Raises UserError where several texts at once are asked of what follows one."""
    if options.beams > 1:
        raise UserError(
            f"beams is {options.beams}, but this engine draws one token after the other",
            expected="beams 1",
            fix="ask for beams in zhibei chat, of a model that is no GGUF file",
            where="sampling options",
        )


class Chooser:
    """Draws the next token of every row; a row's draws depend on its seed, number and position only."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._options = [_NO_OPTIONS] * slots
        self._alternatives = [0] * slots
        self._uniform_ST = torch.zeros(slots, 1, dtype=torch.float64, device=device)
        self._drawn_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._seen_SV: torch.Tensor | None = None
        self._prefix_groups: tuple[int, list[_Group]] | None = None

    def admit(self, slot: int, options: SamplingOptions, *, number: int, budget: int, alternatives: int = 0) -> None:
        """A new answer of at most `budget` tokens begins in this slot."""
        refuse_beams(options)
        self._prefix_groups = None
        self._options[slot], self._alternatives[slot] = options, alternatives
        self._drawn_S[slot] = 0
        if options.temperature > 0:
            if budget > self._uniform_ST.shape[1]:
                more = budget - self._uniform_ST.shape[1]
                self._uniform_ST = torch.nn.functional.pad(self._uniform_ST, (0, more))
            draws_1T = uniform(options.seed, [number], start=0, count=budget)
            self._uniform_ST[slot, :budget] = draws_1T[0].to(self._device)

    def move(self, source: int, target: int) -> None:
        """The answer in one slot goes on in another."""
        self._prefix_groups = None
        self._options[target], self._alternatives[target] = self._options[source], self._alternatives[source]
        for tensor in (self._uniform_ST, self._drawn_S, self._seen_SV):
            if tensor is not None:
                tensor[target] = tensor[source]

    def choose_first(
        self,
        logits_BV: torch.Tensor,
        slots: Sequence[int],
        prompts: Sequence[list[int]],
        allowed_BV: torch.Tensor | None = None,
    ) -> Drawn:
        """The first token of the answers in these slots; where given, one of the allowed ones."""
        for slot, prompt in zip(slots, prompts, strict=True):
            if self._options[slot].repetition_penalty != 1:
                if self._seen_SV is None:
                    shape = (len(self._options), logits_BV.shape[-1])
                    self._seen_SV = torch.zeros(shape, dtype=torch.bool, device=self._device)
                self._seen_SV[slot] = False
                self._seen_SV[slot, torch.tensor(prompt, device=self._device)] = True
        where = torch.tensor(list(slots), device=self._device)
        return self._choose(logits_BV, where, self._groups_of(slots), self._most_alternatives(slots), allowed_BV)

    def choose(self, logits_BV: torch.Tensor, allowed_BV: torch.Tensor | None = None) -> Drawn:
        """The next token of the first B slots; where given, one of the allowed ones."""
        num_rows = logits_BV.shape[0]
        if self._prefix_groups is None or self._prefix_groups[0] != num_rows:
            self._prefix_groups = num_rows, self._groups_of(range(num_rows))
        alternatives = self._most_alternatives(range(num_rows))
        return self._choose(logits_BV, slice(0, num_rows), self._prefix_groups[1], alternatives, allowed_BV)

    def _choose(
        self,
        logits_BV: torch.Tensor,
        where: Any,
        groups: list[_Group],
        alternatives: int,
        allowed_BV: torch.Tensor | None,
    ) -> Drawn:
        sums_B = logits_BV.logsumexp(dim=-1)
        # A row whose answer has ended may run on for a while; its draws are not used.
        places_B = self._drawn_S[where].clamp(max=self._uniform_ST.shape[1] - 1)
        uniform_B = self._uniform_ST[where].gather(1, places_B.unsqueeze(1)).squeeze(1)
        seen_BV = None if self._seen_SV is None else self._seen_SV[where]
        open_BV = logits_BV if allowed_BV is None else logits_BV.masked_fill(~allowed_BV, -torch.inf)
        if len(groups) == 1:
            tokens_B, logps_B = _draw(open_BV, groups[0].options, uniform_B, seen_BV)
        else:
            tokens_B = torch.zeros_like(places_B)
            logps_B = torch.zeros_like(sums_B)
            for group in groups:
                rows = group.rows
                seen = None if seen_BV is None else seen_BV[rows]
                tokens_B[rows], logps_B[rows] = _draw(open_BV[rows], group.options, uniform_B[rows], seen)
        self._drawn_S[where] += 1
        if seen_BV is not None and self._seen_SV is not None:
            self._seen_SV[where] = seen_BV.scatter(1, tokens_B.unsqueeze(1), True)
        likeliest = None
        if alternatives:
            top = logits_BV.topk(min(alternatives, logits_BV.shape[-1]), dim=-1)
            likeliest = top.values - sums_B.unsqueeze(1), top.indices
        return Drawn(tokens_B, logps_B, _of(logits_BV, tokens_B) - sums_B, likeliest)

    def _most_alternatives(self, slots: Sequence[int]) -> int:
        return max((self._alternatives[slot] for slot in slots), default=0)

    def _groups_of(self, slots: Sequence[int]) -> list[_Group]:
        """Rows whose tokens are chosen in the same way."""
        by_shape: dict[tuple[float, ...], list[int]] = {}
        options: dict[tuple[float, ...], SamplingOptions] = {}
        for row, slot in enumerate(slots):
            one = self._options[slot]
            shape = (one.temperature, one.top_k, one.top_p, one.min_p, one.repetition_penalty)
            by_shape.setdefault(shape, []).append(row)
            options[shape] = one
        return [_Group(options[shape], torch.tensor(rows, device=self._device)) for shape, rows in by_shape.items()]


@dataclass(frozen=True)
class _Group:
    options: SamplingOptions
    rows: torch.Tensor


def _draw(
    logits_BV: torch.Tensor, options: SamplingOptions, uniform_B: torch.Tensor, seen_BV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and their log-probability under the distribution that they come from."""
    scores_BV = shape_scores(logits_BV, options, seen_BV if options.repetition_penalty != 1 else None)
    if options.temperature == 0:
        # The only possible choice has probability 1.
        return scores_BV.argmax(dim=-1), logits_BV.new_zeros(logits_BV.shape[0])
    tokens_B = draw(scores_BV, uniform_B)
    return tokens_B, _of(scores_BV, tokens_B) - scores_BV.logsumexp(dim=-1)


def _of(scores_BV: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
    return scores_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)
