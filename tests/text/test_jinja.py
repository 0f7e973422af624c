"""The tokenizer's own chat template: rendered as transformers does, and every answer found in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings

from tests.text.conversations import conversations
from zhibei.config.errors import UserError
from zhibei.text.families import TEMPLATES
from zhibei.text.jinja import JinjaTemplate, require_syntax
from zhibei.text.messages import Message
from zhibei.text.native import bind
from zhibei.text.supervision import learned_intervals

# Control tokens of the families in the fixtures, as their tokenizers would list them.
MARKS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|end|>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|END_RESPONSE|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<|eom_id|>",
)
# gpt-oss writes today's date.
DATE = re.compile(r"Current date: \d{4}-\d\d-\d\d")


def as_messages(chat: list[dict[str, str]]) -> list[Message]:
    return [Message(one["role"], one["content"]) for one in chat]  # pyright: ignore[reportArgumentType]


def vars_of(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def characters(ranges: Iterable[Sequence[int]]) -> set[int]:
    return {place for start, end in ranges for place in range(start, end)}


def golden(shared: Callable[..., Path]) -> tuple[dict, dict[str, list[dict[str, str]]], Path]:
    folder = shared("data")
    found = json.loads((folder / "derived" / "chat_template_golden.json").read_text(encoding="utf-8"))
    return found, found["conversations"], folder


def template_of(folder: Path, file: str) -> JinjaTemplate:
    return JinjaTemplate(
        source=(folder / file).read_text(encoding="utf-8"),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        marks=MARKS,
        variables={"date_string": "26 Jul 2024"},
    )


def test_every_golden_render_is_identical(shared: Callable[..., Path]) -> None:
    found, chats, folder = golden(shared)
    num_texts = num_errors = num_spans = 0
    for entry in found["templates"]:
        template = template_of(folder, entry["file"])
        for name, expected in entry["renders"].items():
            chat, _, asks = name.partition("+")
            messages = as_messages(chats[chat])
            where = f"{entry['file']} {name}"
            if "error" in expected:
                with pytest.raises(UserError) as caught:
                    template.render(messages, answer_next=bool(asks))
                assert expected["error"] in str(caught.value), where
                num_errors += 1
                continue
            text, _ = template._run([vars_of(one) for one in messages], answer_next=bool(asks))
            assert DATE.sub("", text) == DATE.sub("", expected["text"]), where
            num_texts += 1
            if "assistant_char_spans" in expected:
                spans = template.render(messages, answer_next=bool(asks)).spans
                assert characters((span.start, span.end) for span in spans) == characters(
                    expected["assistant_char_spans"]
                ), where
                num_spans += 1
    assert (num_texts, num_errors, num_spans) > (300, 20, 50)


CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
ASK, REPLY = Message("user", "q"), Message("assistant", "answer")


def own(source: str, **variables: object) -> JinjaTemplate:
    return JinjaTemplate(source=source, special_tokens={"eos_token": "</s>"}, marks=MARKS, variables=variables)


def said(template: JinjaTemplate, messages: Sequence[Message], role: str = "assistant") -> list[str]:
    rendered = template.render(messages)
    return [rendered.text[span.start : span.end] for span in rendered.spans if span.role == role]


def test_spans_without_marks_are_the_words_and_their_terminator() -> None:
    assert said(own(CHATML), [ASK, REPLY, ASK, Message("assistant", "q")]) == [
        "answer",
        "<|im_end|>",
        "q",
        "<|im_end|>",
    ]
    assert said(own(CHATML), [ASK, REPLY], role="user") == ["q"]
    assert own(CHATML).terminator == "<|im_end|>"


@pytest.mark.parametrize("content", [" a ", "a\n", "\n\ta", "a b", "é😀", "<|im_start|>assistant\n"])
def test_white_space_at_the_edges_stays_in_the_span_unless_the_template_trims(content: str) -> None:
    assert said(own(CHATML), [ASK, Message("assistant", content)]) == [content, "<|im_end|>"]
    trimmed = own(CHATML.replace("message.content", "message.content | trim"))
    assert said(trimmed, [ASK, Message("assistant", content)]) == [content.strip(), "<|im_end|>"]


def test_white_space_between_prompt_and_answer_is_learned() -> None:
    """The prompt ends with 'B:', so the model itself must write the space."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'A: ' + m.content + '\\n' }}{% else %}"
        "{{ 'B: ' + m.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}B:{% endif %}"
    )
    assert said(own(source), [ASK, REPLY]) == [" answer", "</s>"]


def test_a_template_that_cuts_thoughts_from_earlier_turns() -> None:
    source = CHATML.replace(
        "message.content +",
        "(message.content if loop.last else message.content.split('</think>')[-1].lstrip('\\n')) +",
    )
    thought = Message("assistant", "<think>\nhm\n</think>\n\nyes")
    assert said(own(source), [ASK, thought, ASK, thought]) == [
        "yes",
        "<|im_end|>",
        "<think>\nhm\n</think>\n\nyes",
        "<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (CHATML.replace("'<|im_end|>\\n'", "'\\n'"), "never learn to stop"),
        (CHATML.replace("message.content", "message.content[:1]"), "changes the text"),
        (CHATML.replace("message.content", "message.content + message.content"), "written 2 times"),
        ("{{ raise_exception('no such thing') }}", "no such thing"),
        ("{{ messages[5].content.x }}", "UndefinedError"),
    ],
)
def test_what_cannot_be_proved_is_refused(source: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        own(source).render([ASK, Message("assistant", "Ab")])


def test_a_message_between_sentinels_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="private-use"):
        own(CHATML).render([ASK, Message("assistant", "a\ue0001\ue001b")])


def test_marks_without_their_terminator_are_extended_to_it() -> None:
    source = CHATML.replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}",
        "{{- '<|im_start|>' + message.role + '\\n' -}}{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{- message.content -}}{%- endgeneration -%}{%- else -%}{{- message.content -}}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}",
    )
    assert source != CHATML
    assert said(own(source), [ASK, REPLY, ASK, REPLY]) == ["answer", "<|im_end|>"] * 2


def test_learn_false_reaches_the_spans() -> None:
    spans = own(CHATML).render([ASK, Message("assistant", "a", learn=False), ASK, REPLY]).spans
    assert [span.learn for span in spans if span.role == "assistant"] == [False, False, True, True]


def test_tools_reach_the_template() -> None:
    source = "{% if tools %}{{ tools[0].name + ';' }}{% endif %}" + CHATML
    assert own(source).render([ASK], answer_next=True, tools='[{"name": "clock"}]').text.startswith("clock;")
    with pytest.raises(UserError, match="not JSON"):
        own(source).render([ASK], tools="[{")


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=20, deadline=None)
def test_a_family_saved_as_chat_template_keeps_its_learned_characters(name: str, messages: list[Message]) -> None:
    """What a trained folder carries is found again by the road that knows only the chat template."""
    native = bind(TEMPLATES[name], bos="<s>", eos="</s>")
    saved = JinjaTemplate(native.as_jinja(), {"bos_token": "<s>", "eos_token": "</s>"}, marks=("<s>", "</s>", *MARKS))
    if any(message.context for message in messages):
        messages = [Message(one.role, one.content, learn=one.learn) for one in messages]
    left, right = native.render(messages), saved.render(messages)
    assert left.text == right.text
    for mode in ("answers", "last_answer"):
        ranges = [learned_intervals(one.spans, length=len(one.text), mode=mode) for one in (left, right)]
        assert ranges[0] == ranges[1]
    assert saved.terminator == native.terminator


def test_a_template_that_does_not_parse_is_refused_with_its_line() -> None:
    require_syntax("{% for m in messages %}\n{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", where="x")
    with pytest.raises(UserError, match=r"x: it does not parse: line 2"):
        require_syntax("{% for m in messages %}\n{{ m.content }", where="x")
