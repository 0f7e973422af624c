"""The API as OpenAI's own client uses it, on a tiny model: answers, streams, choices, usage, log-probabilities."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.serve.live import Live, serving
from tests.tiny import tiny_model_folder
from zhibei.generate.options import SamplingOptions
from zhibei.serve.chat import open_speaker
from zhibei.serve.opening import Loading, Wanted, open_all
from zhibei.serve.settings import ServerSettings
from zhibei.text.messages import Message

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Hello"}]


def opened(*wanted: Wanted, template: str = "vicuna_v1.1", **settings):
    chosen = ServerSettings(**settings)
    return open_all(wanted, chosen, Loading(template=template, device="cpu"), watch=lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def live(folder):
    with serving(opened(Wanted("tiny", str(folder)), slots=4)) as server:
        yield server


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def speaker(folder):
    return open_speaker(str(folder), template="vicuna_v1.1", device="cpu")


def alone(speaker, messages, **options):
    chosen = SamplingOptions(**options)
    rows = [Message(one["role"], one["content"]) for one in messages]
    return speaker.answer([speaker.prompt(rows, chosen)], chosen)[0]


def test_the_models_and_what_is_known_of_them(client, folder):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "zhibei")
    assert client.models.retrieve("tiny").context_tokens == 256


def test_a_greedy_answer_is_that_of_chat(client, speaker):
    said = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12)
    answer = alone(speaker, HELLO, temperature=0, max_new_tokens=12)
    (choice,) = said.choices
    assert (choice.message.content, choice.finish_reason) == (answer.text, answer.finish)
    assert said.usage.completion_tokens == len(answer.tokens)
    assert said.usage.prompt_tokens == speaker.count([Message("user", "Hello")])
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens


def test_a_seeded_answer_with_every_sampling_option_is_that_of_chat(client, speaker):
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    more = {"top_k": 40, "min_p": 0.02, "repetition_penalty": 1.2}
    said = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=20, extra_body=more, **options
    )
    assert said.choices[0].message.content == alone(speaker, HELLO, max_new_tokens=20, **options, **more).text


def test_a_stream_is_the_whole_answer_in_pieces(client, speaker):
    events = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    answer = alone(speaker, HELLO, temperature=0, max_new_tokens=12)
    *pieces, usage = events
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in pieces) == answer.text
    assert [event.choices[0].finish_reason for event in pieces][-1] == answer.finish
    assert all(event.usage is None for event in pieces)
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(answer.tokens)


def test_several_choices_differ_and_come_again_with_the_same_seed(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 12, "n": 3, "seed": 5}
    first, second = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]


def test_without_a_seed_answers_differ(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 24}
    assert len({client.chat.completions.create(**ask).choices[0].message.content for _ in range(3)}) > 1


def test_choices_of_a_stream_keep_their_numbers(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 1.0, "max_tokens": 12, "n": 2, "seed": 5}
    whole = client.chat.completions.create(**ask)
    texts = ["", ""]
    for event in client.chat.completions.create(**ask, stream=True):
        (choice,) = event.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client, speaker):
    text = alone(speaker, HELLO, temperature=0, max_new_tokens=40).text
    stop = text[8:11]
    said = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=40, stop=[stop])
    assert said.choices[0].message.content == text[: text.index(stop)]
    assert said.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_models_own(client, speaker):
    said = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    answer = alone(speaker, HELLO, temperature=0, max_new_tokens=8)
    rows = said.choices[0].logprobs.content
    assert [row.logprob for row in rows] == pytest.approx(answer.model_logps[: len(rows)], abs=1e-5)
    for row in rows:
        assert len(row.top_logprobs) == 3
        assert row.top_logprobs[0].logprob == pytest.approx(row.logprob, abs=1e-5), "greedy takes the likeliest"
        if "\ufffd" not in row.token:
            assert bytes(row.bytes).decode() == row.token
    if "\ufffd" not in answer.text:
        assert "".join(row.token for row in rows) == answer.text


def test_a_stream_reports_them_with_the_end_of_an_answer(client):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 8, "logprobs": True}
    whole = client.chat.completions.create(**ask).choices[0].logprobs.content
    streamed = [event.choices[0].logprobs for event in client.chat.completions.create(**ask, stream=True)]
    assert [row.logprob for entry in streamed if entry for row in entry.content] == [row.logprob for row in whole]


def test_completions_continue_texts_and_token_ids(client, speaker):
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    ids = [speaker.tokenizer.bos_id, *speaker.tokenizer.encode("The cat")]
    by_text = client.completions.create(prompt="The cat", logprobs=2, **ask)
    by_ids = client.completions.create(prompt=ids, **ask)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage.prompt_tokens == len(ids)
    assert len(by_text.choices[0].logprobs.top_logprobs[0]) == 2
    several = client.completions.create(prompt=["The cat", "The dog"], n=2, **ask)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == by_text.choices[0].text
    pieces = [event.choices[0].text for event in client.completions.create(prompt="The cat", stream=True, **ask)]
    assert "".join(pieces) == by_text.choices[0].text


def test_embeddings_are_vectors_of_length_one_however_they_are_written(client):
    by_base64 = client.embeddings.create(model="tiny", input=["The cat", "The dog", "The cat"])
    by_float = client.embeddings.create(model="tiny", input="The cat", encoding_format="float")
    first, second, third = (row.embedding for row in by_base64.data)
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert first == third != second
    assert by_float.data[0].embedding == pytest.approx(first, abs=1e-6)


def test_system_prompt_and_content_parts_reach_the_template(client, speaker):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    plain = client.chat.completions.create(messages=messages, **ask)
    assert plain.choices[0].message.content == alone(speaker, messages, temperature=0, max_new_tokens=12).text
    assert client.chat.completions.create(messages=in_parts, **ask).choices[0] == plain.choices[0]


def test_the_asynchronous_client_with_many_requests_at_once(live, speaker):
    """Twelve on four slots: each gets the answer that it gets alone."""

    async def ask_all():
        client = openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)

        async def whole(number: int) -> str:
            said = await client.chat.completions.create(
                model="tiny", messages=messages(number), temperature=1.0, seed=number, max_tokens=10 + number
            )
            return said.choices[0].message.content

        async def streamed(number: int) -> str:
            events = await client.chat.completions.create(
                model="tiny", messages=messages(number), temperature=0, max_tokens=10 + number, stream=True
            )
            return "".join([event.choices[0].delta.content or "" async for event in events])

        return await asyncio.gather(*(whole(n) if n % 2 else streamed(n) for n in range(12)))

    def messages(number: int):
        return [{"role": "user", "content": "Hello " * (number + 1)}]

    expected = [
        alone(speaker, messages(n), temperature=float(n % 2), seed=n if n % 2 else 0, max_new_tokens=10 + n).text
        for n in range(12)
    ]
    assert asyncio.run(ask_all()) == expected


def test_every_slot_has_the_whole_context(live, speaker):
    """Four prompts that leave room for a few tokens each, at once on four slots."""

    async def ask_all():
        client = openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
        asked = {"model": "tiny", "temperature": 0, "max_tokens": 6}
        prompts = [[speaker.tokenizer.bos_id, *([40 + number] * 249)] for number in range(4)]
        return await asyncio.gather(*(client.completions.create(prompt=prompt, **asked) for prompt in prompts))

    for said in asyncio.run(ask_all()):
        assert said.usage.total_tokens == 256 or said.choices[0].finish_reason == "stop"


def test_an_answer_is_held_to_a_schema(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"is_cat": {"type": "boolean"}, "legs": {"enum": [2, 4]}},
        "required": ["is_cat", "legs"],
        "additionalProperties": False,
    }
    for seed in range(3):
        said = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            seed=seed,
            max_tokens=110,
            response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}},
        )
        if said.choices[0].finish_reason == "stop":
            document = json.loads(said.choices[0].message.content)
            assert set(document) == {"is_cat", "legs"}
            assert document["legs"] in (2, 4)
            break
    else:
        pytest.fail("no answer came to its end")


def test_a_schema_that_cannot_be_held_to_is_refused(client):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert error.value.param == "response_format"


def test_errors_become_the_clients_own_exceptions(client, live: Live):
    with pytest.raises(openai.NotFoundError, match="only tiny"):
        client.chat.completions.create(model="tina", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10_000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "cat " * 400}])
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "messages"
