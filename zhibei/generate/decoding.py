"""One token after another for a batch of prompts, with a key-value cache. Knows no stops and no text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.generate.draws import uniform
from zhibei.generate.filters import draw, shape_scores
from zhibei.generate.options import SamplingOptions
from zhibei.model.answering import plain_model

_DRAWS_AHEAD = 64


@dataclass(frozen=True)
class Drawn:
    """One new token of each row, with its log-probability when drawn and under the model itself (fp32)."""

    tokens_B: torch.Tensor
    logps_B: torch.Tensor
    model_logps_B: torch.Tensor


class Decoding:
    """A batch under way. `step()` draws the next token of every row, `keep()` drops rows that have ended.

    Prompts of unequal length are padded on the left and masked, with positions counted from each row's first token, so
    a row's tokens do not depend on the rows beside it. `rows` are the numbers that the draws of each row depend on.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        options: SamplingOptions,
        rows: Sequence[int],
        pad_id: int,
    ) -> None:
        from transformers import DynamicCache

        self._model, self._options, self._rows = model, options, list(rows)
        self.device = model.get_input_embeddings().weight.device
        accepted = inspect.signature(plain_model(model).forward).parameters
        self._only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted
        self._cache = DynamicCache(config=model.config)
        self._last_position = (context_tokens(model) or 2**31) - 1
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        padded = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._next_BT = torch.tensor(padded, device=self.device)
        self._lengths_B = torch.tensor(lengths, device=self.device)
        columns_T = torch.arange(longest, device=self.device)
        self._mask_BT = columns_T >= longest - self._lengths_B.unsqueeze(1)
        self._is_padded = min(lengths) < longest
        self._positions_BT = (columns_T - (longest - self._lengths_B).unsqueeze(1)).clamp(min=0)
        self._seen_BV: torch.Tensor | None = None
        self._num_drawn = 0
        self._uniform_BT = torch.empty(len(prompts), 0, dtype=torch.float64)

    @torch.no_grad()
    def step(self) -> Drawn:
        """Run the model on what is new (the prompts, then one token a row) and draw each row's next token."""
        inputs: dict[str, Any] = {"input_ids": self._next_BT, "past_key_values": self._cache, "use_cache": True}
        if self._is_padded:
            inputs["attention_mask"] = self._mask_BT.long()
        if self._takes_positions:
            inputs["position_ids"] = self._positions_BT
        logits_BV = self._model(**inputs, **self._only_last).logits[:, -1].float()
        drawn = self._draw(logits_BV)
        self._next_BT = drawn.tokens_B.unsqueeze(1)
        # Rows that have ended may run on beyond the context for a while; their tokens are not used.
        self._positions_BT = (self._lengths_B + self._num_drawn).clamp(max=self._last_position).unsqueeze(1)
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=True)
        self._num_drawn += 1
        return drawn

    def keep(self, indexes: Sequence[int]) -> None:
        """Go on with these rows only, given by their place in the batch."""
        index_B = torch.tensor(list(indexes), device=self.device)
        self._cache.batch_select_indices(index_B)
        self._rows = [self._rows[index] for index in indexes]
        self._next_BT, self._lengths_B = self._next_BT[index_B], self._lengths_B[index_B]
        self._mask_BT, self._positions_BT = self._mask_BT[index_B], self._positions_BT[index_B]
        self._uniform_BT = self._uniform_BT[index_B.to(self._uniform_BT.device)]
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[index_B]

    def _draw(self, logits_BV: torch.Tensor) -> Drawn:
        if self._options.repetition_penalty != 1:
            self._mark_seen(logits_BV)
        scores_BV = shape_scores(logits_BV, self._options, self._seen_BV)
        sums_B = logits_BV.logsumexp(dim=-1)
        if self._options.temperature == 0:
            tokens_B = scores_BV.argmax(dim=-1)
            logps_B = torch.zeros_like(sums_B)  # the only possible choice has probability 1
        else:
            tokens_B = draw(scores_BV, self._next_uniform())
            logps_B = _of(scores_BV, tokens_B) - scores_BV.logsumexp(dim=-1)
        return Drawn(tokens_B, logps_B, _of(logits_BV, tokens_B) - sums_B)

    def _next_uniform(self) -> torch.Tensor:
        place = self._num_drawn % _DRAWS_AHEAD
        if place == 0:
            self._uniform_BT = uniform(self._options.seed, self._rows, start=self._num_drawn, count=_DRAWS_AHEAD).to(
                self.device
            )
        return self._uniform_BT[:, place]

    def _mark_seen(self, logits_BV: torch.Tensor) -> None:
        """Note prompt and drawn tokens. Padding is not part of a row: it goes into a column that is cut off again."""
        vocabulary = logits_BV.shape[-1]
        if self._seen_BV is None:
            self._seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            new_BT = self._next_BT.masked_fill(~self._mask_BT, vocabulary)
        else:
            new_BT = self._next_BT
        wide_BV = torch.nn.functional.pad(self._seen_BV, (0, 1)).scatter(1, new_BT, True)
        self._seen_BV = wide_BV[:, :vocabulary]


def _of(scores_BV: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
    return scores_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1)


def context_tokens(model: Any) -> int | None:
    """How many tokens the model was made for (`max_position_embeddings`), or None when it states no limit."""
    return getattr(plain_model(model).config.get_text_config(), "max_position_embeddings", None)
