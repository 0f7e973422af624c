"""Beam search: the likeliest whole text instead of the likeliest next token. Knows no template and no stage.

The rules are those of transformers (num_beams, length_penalty 1, early_stopping False): both find the same text.
Dimensions: K beams, V vocabulary, M candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zhibei.generate.answers import Answer, Growing, Token
from zhibei.generate.decoding import context_tokens
from zhibei.generate.filters import penalize_repetition
from zhibei.generate.options import SamplingOptions
from zhibei.generate.stops import Decode
from zhibei.model.answering import answering, going_on, plain_model

_NEVER = -1e9


@dataclass(frozen=True)
class _Beam:
    """A text under way: its tokens after the prompt, their log-probabilities and the sum that ranks it."""

    tokens: tuple[int, ...]
    model_logps: tuple[float, ...]
    score: float


def beam_search(
    model: Any,
    prompt: Sequence[int],
    *,
    options: SamplingOptions,
    stop_ids: Sequence[int],
    decode: Decode | None = None,
) -> Answer:
    """The best text that `options.beams` beams find, by the mean log-probability of its tokens.

    `Answer.logps` are 0: nothing was drawn. Raises UserError for an empty prompt, one beyond the context, or logits
    that are not finite.
    """
    growing = Growing(prompt, number=0, context=context_tokens(model), options=options, decode=decode)
    ends = _ends(frozenset(stop_ids), options.stop_strings, decode)
    with answering(model), torch.no_grad():
        best = _search(model, growing, options, ends=ends, num_stops=len(set(stop_ids)))
    for token, logp in zip(best.tokens, best.model_logps, strict=True):
        growing.take(Token(token, 0.0, logp), frozenset(stop_ids))
        if growing.ended:
            break
    return growing.answer()


def _ends(stops: frozenset[int], strings: Sequence[str], decode: Decode | None) -> Callable[[tuple[int, ...]], bool]:
    def ends(tokens: tuple[int, ...]) -> bool:
        if tokens[-1] in stops:
            return True
        text = decode(list(tokens)) if strings and decode else ""
        return any(string in text for string in strings)

    return ends


def _search(
    model: Any, growing: Growing, options: SamplingOptions, *, ends: Callable[[tuple[int, ...]], bool], num_stops: int
) -> _Beam:
    reader = _Reader(model, growing.prompt, options.beams)
    running = [_Beam((), (), 0.0 if number == 0 else _NEVER) for number in range(options.beams)]
    finished: list[tuple[float, _Beam]] = []
    num_candidates = max(2, 1 + num_stops) * options.beams
    for length in range(1, growing.budget + 1):
        logps_KV = reader.logps()
        candidates = _best(logps_KV, running, growing.prompt, options, num_candidates)
        over = [length == growing.budget or ends(beam.tokens) for _, beam in candidates]
        # Candidates beyond the beams are there only so that enough are left to go on with.
        finished += [
            (beam.score / length, beam)
            for (_, beam), is_over in zip(candidates[: options.beams], over, strict=False)
            if is_over
        ]
        finished = sorted(finished, key=lambda pair: -pair[0])[: options.beams]
        going = [pair for pair, is_over in zip(candidates, over, strict=True) if not is_over][: options.beams]
        if not going:
            break
        if len(finished) == options.beams and going[0][1].score / length <= finished[-1][0]:
            break
        # Stop strings can end more candidates than were kept in reserve; the last ones then stand in, never to win.
        going += [(source, _Beam(beam.tokens, beam.model_logps, _NEVER)) for source, beam in going[-1:]] * (
            options.beams - len(going)
        )
        running = [beam for _, beam in going]
        reader.go_on([source for source, _ in going], [beam.tokens[-1] for beam in running])
    return finished[0][1] if finished else running[0]


def _best(
    logps_KV: torch.Tensor, running: list[_Beam], prompt: list[int], options: SamplingOptions, count: int
) -> list[tuple[int, _Beam]]:
    """The best continuations of all beams, with the number of the beam that each continues."""
    ranked_KV = logps_KV
    if options.repetition_penalty != 1:
        seen_KV = torch.zeros_like(logps_KV, dtype=torch.bool)
        for number, beam in enumerate(running):
            seen_KV[number, torch.tensor([*prompt, *beam.tokens], device=logps_KV.device)] = True
        ranked_KV = penalize_repetition(logps_KV, seen_KV, options.repetition_penalty)
    scores_K1 = torch.tensor([[beam.score] for beam in running], device=logps_KV.device)
    vocabulary = logps_KV.shape[-1]
    scores_M, places_M = (ranked_KV + scores_K1).flatten().topk(min(count, logps_KV.numel()))
    logps_M = logps_KV.flatten()[places_M]
    found = []
    for score, place, logp in zip(scores_M.tolist(), places_M.tolist(), logps_M.tolist(), strict=True):
        source, token = divmod(place, vocabulary)
        beam = running[source]
        found.append((source, _Beam((*beam.tokens, token), (*beam.model_logps, logp), score)))
    return found


class _Reader:
    """The model over all beams, with a cache of transformers whose rows follow the beams."""

    def __init__(self, model: Any, prompt: list[int], num_beams: int) -> None:
        from transformers import DynamicCache

        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._going_on = going_on(model)
        self._cache = DynamicCache(config=plain_model(model).config)
        self._tokens_KT = torch.tensor([prompt] * num_beams, device=self._device)

    def logps(self) -> torch.Tensor:
        """Log-probabilities [K, V] of the next tokens, fp32."""
        output = self._model(input_ids=self._tokens_KT, **self._going_on(self._cache))
        return output.logits[:, -1].float().log_softmax(dim=-1)

    def go_on(self, sources: list[int], tokens: list[int]) -> None:
        """Row k continues what row `sources[k]` was, with token `tokens[k]`."""
        self._cache.batch_select_indices(torch.tensor(sources, device=self._device))
        self._tokens_KT = torch.tensor(tokens, device=self._device).unsqueeze(1)
