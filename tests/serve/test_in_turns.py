"""Speakers that can only stream, in a server: answers take turns, choices differ, what they cannot do is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.serve.test_opening import HELLO
from tests.tiny import tiny_model_folder
from zhibei.config.errors import UserError
from zhibei.generate.engine import Request
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import Prompt, open_speaker
from zhibei.serve.in_turns import InTurns
from zhibei.text.messages import Message


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return open_speaker(str(tiny_model_folder(tmp_path_factory.mktemp("m"))), template="vicuna_v1.1", device="cpu")


def request(speaker, **more) -> Request:
    options = SamplingOptions(max_new_tokens=8, temperature=1.0, seed=5)
    prompt = speaker.prompt([Message("user", HELLO[0]["content"])], options).tokens
    return Request(prompt, options, speaker.stop_ids, **more)


def answers(engine: InTurns, ids: list[int]) -> list[str]:
    texts, done = dict.fromkeys(ids, ""), {}
    while len(done) < len(ids):
        for id, piece in engine.step():
            texts[id] += piece.text
            done |= {id: piece.answer} if piece.answer else {}
    assert [texts[id] for id in ids] == [done[id].text for id in ids]
    return [texts[id] for id in ids]


@pytest.mark.parametrize("slots", [1, 2])
def test_each_gets_the_answer_of_its_speaker_and_choices_differ(speaker, slots):
    engine = InTurns(speaker, name="tiny", slots=slots)
    ids = [engine.submit(request(speaker, number=number)) for number in (0, 1, 2)]
    assert (engine.num_active, engine.num_waiting) == (0, 3)
    first, second, third = answers(engine, ids)
    alone = list(speaker.stream(Prompt(list(request(speaker).prompt)), request(speaker).options))[-1].answer
    assert first == alone.text
    assert len({first, second, third}) == 3
    assert (engine.num_active, engine.num_waiting) == (0, 0)


def test_a_cancelled_answer_makes_room(speaker):
    engine = InTurns(speaker, name="tiny")
    first, second = engine.submit(request(speaker)), engine.submit(request(speaker))
    engine.step()
    engine.cancel(first)
    engine.cancel(first)
    assert engine.num_active == 0
    assert answers(engine, [second])
    waiting = engine.submit(request(speaker))
    engine.cancel(waiting)
    assert engine.num_waiting == 0


def test_what_it_cannot_do_is_refused_by_the_name_that_clients_know():
    engine = InTurns(SimpleNamespace(name="/secret/path.gguf"), name="tiny")
    for more in ({"top_logprobs": 2}, {"mask": lambda drawn: None}):
        asked = Request([1], SamplingOptions(), (), **more)
        with pytest.raises(UserError, match="asked of tiny") as error:
            engine.submit(asked)
        assert error.value.where in more
        assert "secret" not in str(error.value)
