"""Beam search finds what transformers finds, and refuses what would change nothing."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.generate.engine import Engine, Request
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate, stream

PROMPTS = [[1, 40, 50, 60], [1, 120, 7, 200, 33, 90], [1]]


def theirs(model, prompt, *, beams: int, stops: list[int], num_new: int = 14, penalty: float = 1.0) -> list[int]:
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_new,
        num_beams=beams,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=3,
        repetition_penalty=penalty,
        length_penalty=1.0,
        early_stopping=False,
    )[0, len(prompt) :].tolist()


def options(beams: int, num_new: int = 14, **more) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=num_new, temperature=0, beams=beams, **more)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("beams", [2, 4])
def test_the_text_is_that_of_transformers(family, beams):
    model = tiny_model(family)
    for prompt in PROMPTS:
        # Tokens that these models are fond of, so that texts end at different lengths.
        (greedy,) = generate(model, [prompt], options=options(1), stop_ids=())
        for stops in ([], [greedy.tokens[5]], [greedy.tokens[3], greedy.tokens[8], 2]):
            (ours,) = generate(model, [prompt], options=options(beams), stop_ids=stops)
            expected = theirs(model, prompt, beams=beams, stops=stops)
            assert ours.tokens == expected[: len(ours.tokens)]
            assert all(token == 3 for token in expected[len(ours.tokens) :]), "the rest is padding"
            assert ours.finish == ("stop" if ours.tokens[-1] in stops else "length")


def test_with_a_repetition_penalty_too():
    model = tiny_model()
    for prompt in PROMPTS:
        (ours,) = generate(model, [prompt], options=options(3, repetition_penalty=1.3), stop_ids=())
        assert ours.tokens == theirs(model, prompt, beams=3, stops=[], penalty=1.3)


def test_log_probabilities_are_the_models_and_beams_do_no_worse_than_greedy():
    model = tiny_model()
    for prompt in PROMPTS:
        (greedy,) = generate(model, [prompt], options=options(1), stop_ids=())
        (beams,) = generate(model, [prompt], options=options(8), stop_ids=())
        assert sum(beams.model_logps) >= sum(greedy.model_logps) - 1e-4
        with torch.no_grad():
            logps = model(torch.tensor([[*prompt, *beams.tokens]])).logits[0].log_softmax(-1)
        expected = [logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(beams.tokens)]
        assert beams.model_logps == pytest.approx(expected, abs=1e-4)


def test_a_stop_string_ends_the_text_and_a_stream_gives_it_at_once():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    (whole,) = generate(model, [PROMPTS[0]], options=options(3), stop_ids=(), decode=tokenizer.decode)
    stop = whole.text[4:6]
    chosen = options(3, stop_strings=(stop,))
    (cut,) = generate(model, [PROMPTS[0]], options=chosen, stop_ids=(), decode=tokenizer.decode)
    assert stop not in cut.text
    pieces = list(stream(model, PROMPTS[0], options=chosen, stop_ids=(), decode=tokenizer.decode))
    assert [piece.text for piece in pieces] == [cut.text]
    assert pieces[0].answer == cut


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    generate(model, [PROMPTS[0]], options=options(2), stop_ids=())
    assert model.training


def test_what_would_change_nothing_is_refused():
    with pytest.raises(UserError, match="beams is 4 and temperature"):
        SamplingOptions(beams=4)
    for beams in (0, 65, 1.5):
        with pytest.raises(UserError, match="beams"):
            SamplingOptions(beams=beams, temperature=0)
    engine = Engine(tiny_model(), slots=1)
    with pytest.raises(UserError, match="one token after the other"):
        engine.submit(Request(PROMPTS[0], options(2), stop_ids=()))
