"""Every rule has a row that trips it and a sound one that does not."""

from __future__ import annotations

import pytest

from zhibei.data.clean import RULES, Exchange, findings, reason
from zhibei.data.records import Conversation, Origin, PlainText
from zhibei.text.messages import Message

LONG = "The first reason is that people need it every day, and they have no other way to get it where they live. " * 3

CASES: dict[str, tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]] = {
    "no_input_phrase": (
        [
            ("Say it.", "<no input>", "x"),
            ("Say it.", "None", "x"),
            ("Say it.", "N/A", "x"),
            ("Say it.", "<noinput>", "x"),
        ],
        [("Say it.", "", "x"), ("Say it.", "No input is needed for this machine to run", "x")],
    ),
    "merged_instructions": (
        [("Name a fruit.", "", "Apple\n\n12. Instruction: Name a dish.\n12. Output: Soup")],
        [("Name the steps.", "", "1. Read the instruction.\n2. Follow it.")],
    ),
    "link_in_question": (
        [("Summarize https://example.com/a", "", "x"), ("Summarize it.", "www.example.com", "x")],
        [("What is a URL?", "", "An address.")],
    ),
    "made_up_link": (
        [("Name a source.", "", "See https://example.com/paper")],
        [("What is https://example.com/a?", "", "https://example.com/a is a page.")],
    ),
    "assistant_disclaimer": (
        [("Feelings?", "", "As an AI language model, I have none."), ("你好", "", "作为一个人工智能，我没有感情。")],
        [("Who said so?", "", "As a lawyer, I know the language of models.")],
    ),
    "names_another_model": (
        [("Who are you?", "", "I am ChatGPT, made by OpenAI.")],
        [("What is ChatGPT?", "", "ChatGPT is a chatbot.")],
    ),
    "placeholder_answer": (
        [("Play it.", "", "<nooutput>"), ("Say it.", "", "N/A"), ("Say it.", "", "None.")],
        [("How many?", "", "None of them came."), ("How many?", "", "5")],
    ),
    "empty_code": (
        [("Write a loop.", "", "Here:\n```python\n```\nDone.")],
        [("Write a loop.", "", "```python\nfor i in x: pass\n```\n```python\ny\n```")],
    ),
    "asks_for_picture": (
        [
            ("Draw a cat.", "", "x"),
            ("Generate an image of a dog.", "", "x"),
            ("What is it?", "![cat](http://x.y/z.png)", "x"),
        ],
        [("How do artists draw attention?", "", "x"), ("Describe a cat.", "", "x")],
    ),
    "broken_numbering": (
        [("List.", "", "Here:\n1. a\n1. b\n")],
        [("List.", "", "1. a\n2. b\n\nAnd:\n1. c\n2. d"), ("List.", "", "1. a")],
    ),
    "control_characters": ([("a", "", "b\x0bc"), ("a", "", "b\u200b")], [("a\tb", "", "c\r\nd")]),
    "replacement_characters": ([("a", "", "caf\ufffd")], [("a", "", "café")]),
    "mojibake": ([("a", "", "donâ€™t"), ("a", "", "cafÃ©")], [("a", "", "don’t, café, Ã, âge")]),
    "html_remnants": (
        [("Name it.", "", "<div>It</div>"), ("Name it.", "", "A &lt; B"), ("Name it.", "", "pythonCopy code\nx")],
        [
            ("Write HTML.", "", "<div>It</div>"),
            ("Name it.", "", "Use `<div>`.\n```\n<p>\n```"),
            ("Name it.", "", "1 < 2 & 3 > 2"),
        ],
    ),
    "escaped_characters": (
        [("Name them.", "", "One\\nTwo"), ('Does this make sense?\\n"It is."', "", "Yes.")],
        [
            ("Write a Python function.", "", "print('a\\nb')"),
            ("Name them.", "", "Use `\\n`."),
            ("Derive.", "", "$\\nu$"),
        ],
    ),
    "digit_flood": ([("a", "", "1.3333333333")], [("a", "", "1.33333333, 1234567890")]),
    "answer_repeats_question": (
        [("Sort the words.", "zebra, apple", "zebra, apple"), ("Say hello there.", "", "Say hello there.")],
        [("Sort the words.", "zebra, apple", "apple, zebra"), ("yes", "", "yes")],
    ),
    "cut_off_answer": (
        [
            ("Why?", "", LONG + "The second reason is that there are many more of them and"),
            ("Code?", "", LONG + "\n```python\nx = 1"),
        ],
        [
            ("Why?", "", LONG + "That is all."),
            ("Why?", "", LONG + "\n- a\n- b"),
            ("Tweet.", "", LONG + "So much fun we all had there today my friends #fun"),
        ],
    ),
    "repeated_lines": (
        [("Go.", "", "I do not know. " * 6)],
        [("Go.", "", "One is here. Two is here. Three is here. Four is here. Five is here.")],
    ),
    "role_markers": (
        [("Hi.", "", "Hello.\n### Human: More?"), ("Hi.", "", "Hello.</s>"), ("Human: hi\nAssistant: yes", "", "x")],
        [("Hi.", "", "A human: we all are."), ("Hi.", "", "<s and s>")],
    ),
    "service_message": (
        [
            ("Hi.", "", "Too many requests in 1 hour. Try again later."),
            ("Hi.", "", "Something went wrong. If this issue persists"),
        ],
        [("Hi.", "", "A server limits requests per hour.")],
    ),
    "wrong_arithmetic": (
        [("What is 3 + 4?", "", "It is 8."), ("Calculate 6*7", "", "43"), ("How many?", "", "<<3*4=13>>13")],
        [("What is 3 + 4?", "", "3 + 4 is 7."), ("Divide: 10 / 4", "", "2.5"), ("How many?", "", "<<10/3=3.33>>3.33")],
    ),
}


def test_every_rule_has_its_cases_and_a_reason() -> None:
    assert set(CASES) == set(RULES)
    assert all(len(reason(name)) > 20 for name in RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_bad_row_trips_the_rule_and_a_sound_one_does_not(name: str) -> None:
    bad, sound = CASES[name]
    for row in bad:
        assert RULES[name](Exchange(*row)), row
    for row in sound:
        assert not RULES[name](Exchange(*row)), row


def test_sound_text_trips_nothing() -> None:
    turns = (Message("user", "What is a cat?"), Message("assistant", "A small animal that people keep."))
    assert findings(Conversation(turns, Origin("x", 0))) == []
    assert findings(PlainText(LONG, Origin("x", 0))) == []


def test_every_turn_is_looked_at() -> None:
    turns = (
        Message("user", "Hi."),
        Message("assistant", "Hello."),
        Message("user", "Go."),
        Message("assistant", "N/A"),
    )
    assert findings(Conversation(turns, Origin("x", 0))) == ["placeholder_answer"]
