"""The mask: equal to a slow reference, complete, and the same tokens in training as in chatting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.conversations import conversations
from tests.text.small_tokenizers import ALL, SMALL, tokenizer_called
from zhibei.config.errors import UserError
from zhibei.text.families import TEMPLATES, find_template
from zhibei.text.messages import Message
from zhibei.text.supervision import MODES, Layout, border_merges, lay_out, learned_intervals, supervised_tokens
from zhibei.text.template import Rendered, Template
from zhibei.text.tokenizer import Encoded, Tokenizer

LOSSY = ("stories260K", "stories3M")  # their normalisers drop and merge spaces


def masked(
    tokenizer: Tokenizer, rows: list[Rendered], mode: str = "answers"
) -> tuple[Encoded, Layout, np.ndarray, np.ndarray]:
    encoded = tokenizer.encode_batch([row.text for row in rows])
    intervals = [learned_intervals(row.spans, length=len(row.text), mode=mode) for row in rows]  # pyright: ignore
    layout = lay_out(encoded.starts, encoded.ends, borders=encoded.borders, num_chars=[len(row.text) for row in rows])
    return encoded, layout, supervised_tokens(layout, intervals), border_merges(layout, intervals)


def slow_mask(tokenizer: Tokenizer, row: Rendered, mode: str) -> list[bool]:
    """Character by character, from the tokenizers library's own offsets."""
    last = max((span.turn for span in row.spans if span.role == "assistant"), default=-1)
    wanted = {
        "answers": lambda span: span.role == "assistant" and span.learn,
        "last_answer": lambda span: span.turn == last and span.learn,
        "turns": lambda span: span.learn,
    }
    learned = [mode == "everything"] * len(row.text)
    for span in row.spans:
        for place in range(span.start, span.end):
            learned[place] = span.learn if mode == "everything" else wanted[mode](span) or learned[place]
    offsets = tokenizer.backend.encode(row.text, add_special_tokens=False).offsets
    mask = [
        any(learned[place] for place in range(start, max(end, start + 1)) if place < len(learned))
        for start, end in offsets
    ]
    return [False, *mask[1:]] if mask else []


def template_or_skip(family: str, tokenizer: Tokenizer) -> Template:
    try:
        return find_template(family, tokenizer)
    except UserError:
        pytest.skip(f"{tokenizer.source} has no tokens of {family}")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_mask_equals_a_slow_reference(name: str, mode: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_called(name)
    family = data.draw(st.sampled_from(["alpaca", "vicuna_v1.1", "chatml", "llama2", "vicuna_v0"]))
    template = find_template(family, tokenizer)
    rows = [template.render(messages) for messages in data.draw(st.lists(conversations(), min_size=1, max_size=3))]
    encoded, _, mask, _ = masked(tokenizer, rows, mode)
    for place, row in enumerate(rows):
        part = slice(encoded.borders[place], encoded.borders[place + 1])
        assert encoded.ids[part].tolist() == tokenizer.encode(row.text)
        assert mask[part].tolist() == slow_mask(tokenizer, row, mode)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("family", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=8, deadline=None)
def test_training_and_chatting_send_the_same_ids(name: str, family: str, messages: list[Message]) -> None:
    """Before every answer, the row's ids are the prompt's ids; where they are not, a border merge is counted."""
    tokenizer = tokenizer_called(name)
    template = template_or_skip(family, tokenizer)
    row = template.render(messages)
    encoded, layout, _, _ = masked(tokenizer, [row])
    for turn in (turn for turn, message in enumerate(messages) if message.role == "assistant"):
        prompt = template.render(messages[:turn], answer_next=True).text
        begin = min(span.start for span in row.spans if span.turn == turn)
        assert row.text[:begin] == prompt
        ids = tokenizer.encode(prompt)
        is_same = encoded.ids[: len(ids)].tolist() == ids and int((encoded.ends <= begin).sum()) == len(ids)
        is_merged = bool(layout.straddled(np.array([begin]))[0])
        # GPT-2's pattern leaves the last of several spaces or newlines to the word that follows, if one follows.
        is_gpt2_space = name == "byte_level" and prompt[-2:].isspace()
        assert is_same or is_merged or name in LOSSY or is_gpt2_space


@pytest.mark.parametrize("family", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=15, deadline=None)
def test_supervised_tokens_decode_to_answers_and_terminators(family: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_called("byte_level")
    row = find_template(family, tokenizer).render(messages)
    encoded, _, mask, merges = masked(tokenizer, [row])
    said = "".join(row.text[s.start : s.end] for s in row.spans if s.role == "assistant" and s.learn)
    decoded = tokenizer.decode(encoded.ids[mask].tolist())
    if merges[0] == 0:
        assert decoded == said
    else:
        assert len(decoded) > len(said)


@pytest.mark.parametrize("name", ["sentencepiece_like", "llama2", "llama3"])
@given(messages=conversations())
@settings(max_examples=25, deadline=None)
def test_no_learned_character_is_lost_and_no_prompt_token_is_learned(name: str, messages: list[Message]) -> None:
    tokenizer = tokenizer_called(name)
    row = find_template("vicuna_v1.1", tokenizer).render(messages)
    encoded, _, mask, _ = masked(tokenizer, [row])
    learned = {place for s in row.spans if s.role == "assistant" and s.learn for place in range(s.start, s.end)}
    covered = set()
    for start, end, is_learned in zip(encoded.starts, encoded.ends, mask, strict=True):
        if is_learned:
            covered |= set(range(start, end))
        else:
            assert not learned & set(range(start, end))
    assert learned <= covered


@pytest.mark.parametrize("name", SMALL)
def test_every_terminator_of_a_learned_answer_is_learned(name: str) -> None:
    tokenizer = tokenizer_called(name)
    messages = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d", learn=False),
    ]
    encoded, _, mask, _ = masked(tokenizer, [find_template("chatml", tokenizer).render(messages)])
    ends = encoded.ids == tokenizer.id_of("<|im_end|>")
    assert mask[ends].tolist() == [False, True, False, False]


def test_modes_choose_what_they_say() -> None:
    tokenizer = tokenizer_called("byte_level")
    template = find_template("vicuna_v1.1", tokenizer)
    messages = [
        Message("system", "S"),
        Message("user", "U"),
        Message("assistant", "A"),
        Message("user", "V"),
        Message("assistant", "B"),
    ]
    row = template.render(messages)
    expected = {
        "answers": " A</s> B</s>",
        "last_answer": " B</s>",
        "turns": "SU A</s>V B</s>",
        "everything": " USER: U ASSISTANT: A</s>USER: V ASSISTANT: B</s>",  # 'S' is first: nothing comes before it
    }
    for mode, said in expected.items():
        encoded, _, mask, _ = masked(tokenizer, [row], mode)
        decoded = tokenizer.decode(encoded.ids[mask].tolist())
        assert decoded == (said if mode != "turns" else said[1:])


def test_what_must_not_be_learned_is_left_out_of_everything() -> None:
    tokenizer = tokenizer_called("byte_level")
    messages = [
        Message("user", "U"),
        Message("assistant", "A", learn=False),
        Message("user", "V"),
        Message("assistant", "B"),
    ]
    encoded, _, mask, _ = masked(tokenizer, [find_template("vicuna_v1.1", tokenizer).render(messages)], "everything")
    decoded = tokenizer.decode(encoded.ids[mask].tolist())
    assert decoded.endswith("USER: U ASSISTANT:USER: V ASSISTANT: B</s>")


def test_a_token_across_the_border_is_learned_and_counted() -> None:
    """Offsets by hand: [ab][cd][ef], the answer begins at d."""
    layout = lay_out(np.array([0, 2, 4]), np.array([2, 4, 6]), borders=np.array([0, 3]), num_chars=[6])
    assert supervised_tokens(layout, [[(3, 6)]]).tolist() == [False, True, True]
    assert border_merges(layout, [[(3, 6)]]).tolist() == [1]
    assert border_merges(layout, [[(2, 6)]]).tolist() == [0]
    assert border_merges(layout, [[(3, 5)]]).tolist() == [2]


def test_rows_do_not_reach_into_one_another() -> None:
    layout = lay_out(
        np.array([0, 1, 0, 1]), np.array([1, 2, 1, 2]), borders=np.array([0, 2, 2, 4]), num_chars=[2, 0, 2]
    )
    assert supervised_tokens(layout, [[(0, 2)], [], []]).tolist() == [False, True, False, False]
    assert supervised_tokens(layout, [[], [], [(1, 2)]]).tolist() == [False, False, False, True]
    assert border_merges(layout, [[(0, 2)], [], [(0, 2)]]).tolist() == [0, 0, 0]


def test_an_empty_token_belongs_to_the_character_that_follows() -> None:
    layout = lay_out(np.array([0, 1, 1]), np.array([1, 1, 2]), borders=np.array([0, 3]), num_chars=[2])
    assert supervised_tokens(layout, [[(1, 2)]]).tolist() == [False, True, True]
    assert layout.last_token_of(np.array([0, 1])).tolist() == [0, 2]
