"""Continuous batching: answers depend on their request alone, whatever is beside them, before them or taken away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from zhibei.config.errors import UserError
from zhibei.generate.answers import Answer
from zhibei.generate.engine import STEPS_IN_FLIGHT, Engine, Request
from zhibei.generate.options import SamplingOptions
from zhibei.generate.sampler import generate

TOKENIZER = tiny_tokenizer()
PROMPTS = [[1, 40, 41], [1, 90], [1, *range(50, 70)], [1], [1, *range(100, 111)], [1, 7, 8, 9], [1, 11], [1, 12, 13]]
WAYS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20, "seed": 3},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.7, "repetition_penalty": 1.3, "seed": 9},
]


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def requests() -> list[Request]:
    """Eight requests, each its own way, of unequal lengths."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        options = SamplingOptions(max_new_tokens=8 + 3 * number, **WAYS[number % 4])  # type: ignore[arg-type]
        found.append(Request(prompt, options, (2, 9, 30), number=number, decode=decode))
    return found


def finished(engine: Engine) -> dict[int, Answer]:
    answers = {}
    while engine.num_active or engine.num_waiting:
        answers.update({id: piece.answer for id, piece in engine.step() if piece.answer is not None})
    return answers


def alone(model: Any, request: Request) -> Answer:
    engine = Engine(model, slots=1)
    id = engine.submit(request)
    return finished(engine)[id]


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_an_answer_is_what_its_request_gets_alone(slots: int, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected = [alone(model, request) for request in requests()]
    assert len({len(answer.tokens) for answer in expected}) > 3
    monkeypatch.setitem(STEPS_IN_FLIGHT, "cpu", lag)
    engine = Engine(model, slots=slots, cache_tokens=64)
    ids = [engine.submit(request) for request in requests()]
    assert (engine.num_active, engine.num_waiting) == (0, 8)
    answers = finished(engine)
    assert [answers[id].tokens for id in ids] == [answer.tokens for answer in expected]
    assert [answers[id].text for id in ids] == [answer.text for answer in expected]


def test_what_comes_late_and_what_is_cancelled_changes_nothing_for_the_others() -> None:
    model = tiny_model()
    expected = [alone(model, request) for request in requests()]
    engine = Engine(model, slots=3, cache_tokens=64)
    ids = [engine.submit(request) for request in requests()[:4]]
    answers: dict[int, Answer] = {}
    for step in range(60):
        answers.update({id: piece.answer for id, piece in engine.step() if piece.answer is not None})
        if step == 2:
            engine.cancel(ids[1])
        if step == 4:
            ids += [engine.submit(request) for request in requests()[4:]]
            engine.cancel(ids[-1])
            engine.cancel(12345)
    assert set(answers) == set(ids) - {ids[1], ids[-1]}
    for place, id in enumerate(ids):
        if id in answers:
            assert answers[id].tokens == expected[place].tokens


def test_slots_are_filled_again_and_pieces_make_the_text() -> None:
    engine = Engine(tiny_model(), slots=2, cache_tokens=64)
    ids = [engine.submit(request) for request in requests()]
    texts, most = dict.fromkeys(ids, ""), 0
    ended: list[int] = []
    while engine.num_active or engine.num_waiting:
        for id, piece in engine.step():
            assert id not in ended
            texts[id] += piece.text
            if piece.answer is not None:
                ended.append(id)
                assert piece.answer.text == texts[id]
        most = max(most, engine.num_active)
    assert most == 2
    assert sorted(ended) == ids


def test_the_likeliest_tokens_are_those_of_the_model() -> None:
    model = tiny_model()
    request = Request([1, 40, 41], SamplingOptions(max_new_tokens=6, temperature=0), (), top_logprobs=3)
    other = Request([1, 90], SamplingOptions(max_new_tokens=6, temperature=0), (), top_logprobs=0)
    engine = Engine(model, slots=2)
    first, second = engine.submit(request), engine.submit(other)
    answers = finished(engine)
    assert answers[second].alternatives is None
    found = answers[first].alternatives
    assert found is not None
    with torch.no_grad():
        logits_TV = model(torch.tensor([[1, 40, 41, *answers[first].tokens[:-1]]])).logits[0, 2:]
    top = logits_TV.log_softmax(-1).topk(3)
    assert [[token for token, _ in place] for place in found] == top.indices.tolist()
    torch.testing.assert_close(torch.tensor([[logp for _, logp in place] for place in found]), top.values)
    assert [place[0][1] for place in found] == pytest.approx(answers[first].model_logps)


def test_requests_that_can_never_be_answered_are_refused_when_they_come() -> None:
    engine = Engine(tiny_model(), slots=2, cache_tokens=32)
    short = SamplingOptions(max_new_tokens=8)
    with pytest.raises(UserError, match="do not fit into a slot"):
        engine.submit(Request([1] * 30, short, ()))
    with pytest.raises(UserError, match="no tokens"):
        engine.submit(Request([], short, ()))
    with pytest.raises(UserError, match="top_logprobs is 21"):
        engine.submit(Request([1], short, (), top_logprobs=21))
    with pytest.raises(UserError, match="exceed the model's context"):
        engine.submit(Request([1] * 250, short, ()))
    with pytest.raises(UserError, match="engine of 0 slots"):
        Engine(tiny_model(), slots=0)
    assert engine.num_waiting == 0


def test_the_model_is_as_before_whenever_there_is_nothing_to_do() -> None:
    model = tiny_model().train()
    engine = Engine(model, slots=2)
    id = engine.submit(requests()[0])
    assert model.training
    engine.step()
    assert not model.training
    engine.cancel(id)
    assert model.training
    engine.submit(requests()[0])
    engine.step()
    engine.close()
    assert model.training
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    engine.submit(requests()[1])
    with pytest.raises(UserError, match="not finite"):
        engine.step()
    assert model.training
    assert (engine.num_active, engine.num_waiting) == (0, 0)


def test_an_update_of_the_weights_is_seen_by_an_engine_that_exists() -> None:
    model = tiny_model()
    engine = Engine(model, slots=2)
    ids = [engine.submit(request) for request in requests()[:2]]
    before = finished(engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([PROMPTS[2]])).logits.square().mean().backward()
    optimizer.step()
    again = [engine.submit(request) for request in requests()[:2]]
    after = finished(engine)
    assert [after[id].tokens for id in again] == [alone(model, request).tokens for request in requests()[:2]]
    assert [after[id].tokens for id in again] != [before[id].tokens for id in ids]


def test_adapters_switched_between_two_answers_are_seen() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    engine = Engine(model, slots=1)
    request = requests()[0]

    def answer() -> list[int]:
        id = engine.submit(request)
        return finished(engine)[id].tokens

    adapted = answer()
    with model.disable_adapter():
        plain = answer()
    assert plain == alone(tiny_model(), request).tokens
    assert adapted != plain
    assert answer() == adapted


def test_more_prompts_than_slots_are_answered_as_if_there_were_room_for_all() -> None:
    model = tiny_model()
    prompts = [PROMPTS[number % 8] for number in range(40)]
    options = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=4, batch_rows=40)
    whole = generate(model, prompts, options=options, stop_ids=[2, 9, 30])
    few = generate(model, prompts, options=SamplingOptions(**{**vars(options), "batch_rows": 5}), stop_ids=[2, 9, 30])
    assert [answer.tokens for answer in few] == [answer.tokens for answer in whole]
