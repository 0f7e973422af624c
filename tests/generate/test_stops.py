"""Text as it grows: whole characters, held-back stop strings, and the same text in the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_tokenizer
from zhibei.generate.stops import TextTail

TOKENIZER = tiny_tokenizer()


def decode_bytes(tokens: list[int]) -> str:
    """Every token is one byte."""
    return bytes(tokens).decode("utf-8", errors="replace")


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def run(tokens, stop_strings=(), decode=decode_bytes) -> tuple[list[str], TextTail]:
    tail = TextTail(decode, stop_strings)
    pieces = [tail.feed(token) for token in tokens]
    return [*pieces, tail.finish()], tail


def test_a_character_of_several_bytes_comes_whole():
    pieces, tail = run("a你😀b".encode())
    assert [piece for piece in pieces if piece] == ["a", "你", "😀", "b"]
    assert tail.text == "a你😀b"


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    pieces, _ = run(b"ab\xe4\xbd")
    assert pieces == ["a", "b", "", "", "\ufffd"]


def test_bytes_that_are_no_beginning_of_a_character_are_not_held_for_ever():
    pieces, tail = run(b"\x80" * 20)
    assert any(pieces[:-1])
    assert tail.text == "\ufffd" * 20


def test_a_run_of_bytes_spoiled_by_its_last_one_keeps_what_was_shown():
    """Tokenizers with byte fallback read a whole run of bytes as damaged until its last character is complete."""

    def decode_run(tokens: list[int]) -> str:
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(tokens)

    pieces, tail = run("你好".encode(), decode=decode_run)
    assert [piece for piece in pieces if piece] == ["你", "好"]
    pieces, tail = run("你好".encode()[:-1], decode=decode_run)
    assert tail.text == "你\ufffd\ufffd"


def test_a_stop_string_ends_the_text_and_is_not_part_of_it():
    pieces, tail = run(b"hello ### more", ["###"])
    assert "".join(pieces) == tail.text == "hello "
    assert tail.stopped


def test_the_beginning_of_a_stop_string_is_held_back_and_released_when_it_was_none():
    pieces, tail = run(b"a##b#", ["###"])
    assert pieces == ["a", "", "", "##b", "", "#"]
    assert not tail.stopped


def test_the_earliest_of_several_stop_strings_counts():
    _, tail = run(b"one two three", ["three", "two", "o t"])
    assert tail.text == "one "


def test_text_after_a_stop_string_is_ignored():
    tail = TextTail(decode_bytes, ["x"])
    assert [tail.feed(byte) for byte in b"abxcd"] == ["a", "b", "", "", ""]
    assert tail.finish() == ""


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_put_together_are_the_whole_text(text):
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    pieces, tail = run(tokens, decode=decode)
    assert "".join(pieces) == tail.text == decode(tokens)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(
    text=st.text(alphabet="ab#\n你", max_size=30), stops=st.lists(st.text("ab#\n", min_size=1, max_size=4), max_size=3)
)
@settings(max_examples=300, deadline=None)
def test_pieces_are_the_text_before_the_first_stop_string(text, stops):
    pieces, tail = run(text.encode(), stops)
    # The stop string that is complete first ends the answer; of those, the one that begins first.
    for end in range(len(text) + 1):
        begins = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if begins:
            assert tail.text == text[: min(begins)]
            break
    else:
        assert tail.text == text
    assert "".join(pieces) == tail.text


@pytest.mark.parametrize("stop", ["</s>", "###"])
def test_nothing_shown_is_ever_taken_back(stop):
    tail = TextTail(decode_bytes, [stop])
    shown = ""
    for byte in f"a {stop[:-1]} b {stop}".encode():
        shown += tail.feed(byte)
        assert tail.text == shown
        assert stop[0] not in shown[-1:]
