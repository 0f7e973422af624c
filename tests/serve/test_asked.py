"""Bodies of requests: every field is read or refused by name, and nothing is ignored."""

from __future__ import annotations

import pytest

from zhibei.serve.asked import NEUTRAL, read_body, read_chat, read_completion, read_embedding
from zhibei.serve.refusals import Refusal

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "m", "messages": HELLO}


def refused(read, body) -> Refusal:
    with pytest.raises(Refusal) as error:
        read(body)
    assert error.value.status == 400
    assert error.value.message
    return error.value


def test_defaults_are_those_of_openai():
    asked = read_chat(CHAT)
    assert (asked.temperature, asked.top_p, asked.n, asked.max_tokens, asked.seed) == (1.0, 1.0, 1, None, None)
    assert read_completion({"model": "m", "prompt": "Hello"}).max_tokens == 16


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"model": "a", "model": "b"}',
        b'{"seed": ' + b"9" * 6000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(raw):
    refused(read_body, raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        pytest.param("temperature", 10**400, id="temperature-huge"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", -1),
        ("n", 65),
        ("n", "2"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("max_completion_tokens", -5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", 5),
        ("stop", "\ud800"),
        ("stream", "yes"),
        ("stream", 1),
        ("logprobs", 3),
        ("user", 5),
        ("user", "x" * 257),
        ("response_format", "json"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "text", "more": 1}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}),
        ("model", 5),
        ("messages", []),
        ("messages", "Hello"),
        ("messages", [5]),
        ("messages", [{}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": []}]),
        ("messages", [{"role": "user", "content": "\udcff"}]),
        ("messages", [{"role": "king", "content": "Hello"}]),
        ("messages", [{"role": ["user"], "content": "Hello"}]),
        ("messages", [{"role": "tool", "content": "5", "tool_call_id": "1"}]),
        ("messages", [{"role": "user", "content": "Hello", "name": "Ann"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("messages", [{"role": "user", "content": ["Hello"]}]),
        ("messages", [*HELLO, {"role": "assistant", "content": "Hi"}]),
        ("messages", [*HELLO, {"role": "system", "content": "Be brief"}, *HELLO]),
        ("messages", [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *HELLO]),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(field, value):
    assert (refused(read_chat, {**CHAT, field: value}).param or "").startswith(field)


@pytest.mark.parametrize("field", ["temprature", "functions_", "best_of", "reasoning_effort", "x" * 5000, ""])
def test_a_field_that_is_not_known_is_refused(field):
    refusal = refused(read_chat, {**CHAT, field: 1})
    assert refusal.code == "unsupported_parameter"
    assert len(refusal.message) < 300


def test_a_slip_of_the_pen_is_named():
    assert "temperature" in refused(read_chat, {**CHAT, "temprature": 1}).message


@pytest.mark.parametrize("field", NEUTRAL)
def test_what_openai_knows_and_this_server_does_not_is_taken_only_where_it_changes_nothing(field):
    neutral, _ = NEUTRAL[field]
    for value in (None, *neutral):
        read_chat({**CHAT, field: value})
    refusal = refused(read_chat, {**CHAT, field: {"some": "thing"}})
    assert (refusal.param, refusal.code) == (field, "unsupported_parameter")


def test_options_that_need_another_are_refused_without_it():
    assert refused(read_chat, {**CHAT, "top_logprobs": 2}).param == "top_logprobs"
    assert refused(read_chat, {**CHAT, "stream_options": {"include_usage": True}}).param == "stream_options"
    assert refused(read_chat, {**CHAT, "max_tokens": 5, "max_completion_tokens": 5}).param == "max_tokens"
    assert refused(read_chat, {**CHAT, "temperature": 0, "top_k": 5}).param == "top_k"
    assert refused(read_completion, {"model": "m", "prompt": "a", "best_of": 3}).param == "best_of"


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_what_is_missing_is_named(missing):
    body = {name: value for name, value in CHAT.items() if name != missing}
    assert refused(read_chat, body).param == missing
    assert refused(read_chat, {**body, missing: None}).param == missing


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [1, "a"], [-1], [1.5], [True], {"a": 1}, [[1], [-1]], ["a"] * 300]
)
def test_prompts_that_are_none_are_refused(prompt):
    assert (refused(read_completion, {"model": "m", "prompt": prompt}).param or "").startswith("prompt")
    assert (refused(read_embedding, {"model": "m", "input": prompt}).param or "").startswith("input")


def test_prompts_come_in_four_forms():
    for prompt, expected in (("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ([1, 2],)), ([[1], [2]], ([1], [2]))):
        assert read_completion({"model": "m", "prompt": prompt}).prompts == expected
