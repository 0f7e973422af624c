"""Answers whose next token must be among some: the mask is obeyed, and nothing else changes."""

from __future__ import annotations

import torch

from tests.tiny import tiny_model
from zhibei.generate.engine import Engine, Request
from zhibei.generate.options import SamplingOptions


def run(model, requests):
    engine = Engine(model, slots=3)
    ids = [engine.submit(request) for request in requests]
    answers = {}
    while len(answers) < len(ids):
        answers |= {id: piece.answer for id, piece in engine.step() if piece.answer}
    return [answers[id] for id in ids]


def request(mask=None, temperature: float = 1.0) -> Request:
    options = SamplingOptions(max_new_tokens=12, temperature=temperature, seed=3)
    return Request(prompt=[1, 40, 50], options=options, stop_ids=(), mask=mask)


def even_then_odd(drawn):
    allowed_V = torch.zeros(300, dtype=torch.bool)
    allowed_V[len(drawn) % 2 :: 2] = True
    return allowed_V


def test_only_allowed_tokens_come_and_the_mask_sees_what_was_drawn():
    for temperature in (0.0, 1.0):
        plain, masked, beside = run(
            tiny_model(), [request(None, temperature), request(even_then_odd, temperature), request(None, temperature)]
        )
        assert [token % 2 for token in masked.tokens] == [place % 2 for place in range(12)]
        assert plain.tokens == beside.tokens == run(tiny_model(), [request(None, temperature)])[0].tokens


def test_a_mask_that_allows_everything_changes_nothing():
    everything = request(lambda drawn: torch.ones(300, dtype=torch.bool))
    masked, plain = run(tiny_model(), [everything, request()])
    assert (masked.tokens, masked.logps, masked.model_logps) == (plain.tokens, plain.logps, plain.model_logps)


def test_log_probabilities_are_those_of_the_model_not_of_the_mask():
    (only_one,) = run(tiny_model(), [request(lambda drawn: torch.arange(300) == 7)])
    assert only_one.tokens == [7] * 12
    assert only_one.logps == [0.0] * 12, "there was one choice"
    assert all(logp < -0.1 for logp in only_one.model_logps)
