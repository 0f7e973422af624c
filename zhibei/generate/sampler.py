"""Answers to prompts, whole or as they grow, with their log-probabilities. Knows no template and no stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zhibei.generate.answers import Answer, Growing, Piece
from zhibei.generate.beams import beam_search
from zhibei.generate.decoding import context_tokens
from zhibei.generate.engine import Engine, Request
from zhibei.generate.options import SamplingOptions
from zhibei.generate.stops import Decode


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    options: SamplingOptions,
    stop_ids: Sequence[int],
    pad_id: int = 0,
    decode: Decode | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer every prompt (token ids) with a causal model of transformers or PEFT; answers come in the prompts' order.

    At most `options.batch_rows` are answered at once; where one ends, the next prompt takes its place. An answer
    depends on the model, its prompt, the options and, unless greedy, its number among the prompts (or of `numbers`,
    where these prompts are some of a larger set); never on the other prompts. The global random state and the model's
    train/eval state are left as they were. Gradients are not recorded. `decode` turns token ids into text; stop strings
    need it.

    Raises UserError for an empty prompt, a prompt beyond the context, or logits that are not finite.
    """
    if options.beams > 1:
        return [beam_search(model, prompt, options=options, stop_ids=stop_ids, decode=decode) for prompt in prompts]
    requests = [
        Request(prompt, options, stop_ids, number=number, decode=decode, pieces=False)
        for number, prompt in zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True)
    ]
    if not requests:
        return []
    engine = Engine(
        model,
        slots=min(options.batch_rows, len(requests)),
        cache_tokens=max(_tokens_of(model, request) for request in requests),
        pad_id=pad_id,
    )
    # Prompts of like length are read together. The longest come first: what comes last is over soonest.
    by_length = sorted(requests, key=lambda request: len(request.prompt), reverse=True)
    number_of = {engine.submit(request): request.number for request in by_length}
    answers: dict[int, Answer] = {}
    while engine.num_active or engine.num_waiting:
        for id, piece in engine.step():
            if piece.answer is not None:
                answers[number_of[id]] = piece.answer
    return [answers[request.number] for request in requests]


def stream(
    model: Any, prompt: Sequence[int], *, options: SamplingOptions, stop_ids: Sequence[int], decode: Decode
) -> Iterator[Piece]:
    """The answer that `generate` gives to this one prompt, piece by piece.

    Pieces hold whole characters and never a part of a stop string; put together they are `Answer.text`. Until the
    iterator is exhausted or closed the model stays in eval mode. Raises what `generate` raises.
    """
    if options.beams > 1:  # which text wins is known at the end only
        answer = beam_search(model, prompt, options=options, stop_ids=stop_ids, decode=decode)
        yield Piece(answer.text or "", answer)
        return
    request = Request(prompt, options, stop_ids, decode=decode)
    engine = Engine(model, slots=1, cache_tokens=_tokens_of(model, request))
    engine.submit(request)
    try:
        while engine.num_active or engine.num_waiting:
            for _, piece in engine.step():
                yield piece
    finally:
        engine.close()


def _tokens_of(model: Any, request: Request) -> int:
    """Tokens of prompt and longest answer."""
    growing = Growing(
        request.prompt,
        number=request.number,
        context=context_tokens(model),
        options=request.options,
        decode=request.decode,
    )
    return len(growing.prompt) + growing.budget
