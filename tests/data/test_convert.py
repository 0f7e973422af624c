"""Conversion loses nothing: random records go through every format and come back equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhibei.config.errors import UserError
from zhibei.data.convert import convert, same, to_rows
from zhibei.data.formats import FORMATS
from zhibei.data.readers import open_file, read_file
from zhibei.data.records import Conversation, Judged, Origin, Preference, Prompt, Record
from zhibei.data.writers import WRITERS
from zhibei.text.messages import Message

words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
extras = st.dictionaries(st.sampled_from(["id", "title", "score"]), st.integers() | words, max_size=2)
HERE = Origin("x", 0)


@st.composite
def conversations(draw: Callable[..., Any], *, plain: bool = False) -> Conversation:
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        context = "" if plain else draw(st.just("") | words)
        messages.append(Message("user", draw(words), context=context))
        messages.append(Message("assistant", draw(words), learn=plain or draw(st.booleans())))
    return Conversation(tuple(messages), HERE, tools="" if plain else draw(st.just("") | words), extra=draw(extras))


def back_and_forth(record: Record, *formats: str) -> Record:
    for name in formats:
        (row,) = to_rows(record, name)
        (record,) = FORMATS[name].read(json.loads(json.dumps(row)), HERE)
    return record


@pytest.mark.parametrize("first", ["alpaca", "sharegpt", "openai", "prompt_completion"])
@pytest.mark.parametrize("second", ["alpaca", "sharegpt", "openai", "prompt_completion"])
def test_conversations_come_back_equal(first: str, second: str) -> None:
    @given(conversations())
    def check(record: Conversation) -> None:
        assert same(back_and_forth(record, first, second, first)) == same(record)

    check()


@given(conversations(plain=True), words, words)
def test_pairs_come_back_equal(record: Conversation, good: str, bad: str) -> None:
    if good == bad:
        return
    prompt = record.messages[:-1]
    pair = Preference(prompt, (Message("assistant", good),), (Message("assistant", bad),), HERE, margin=0.5)
    assert same(back_and_forth(pair, "preference")) == same(pair)
    rows = to_rows(pair, "kto")
    judged = [FORMATS["kto"].read(row, HERE)[0] for row in rows]
    assert [(j.prompt, j.answer[0].content, j.is_good) for j in judged if isinstance(j, Judged)] == [
        (prompt, good, True),
        (prompt, bad, False),
    ]
    assert same(back_and_forth(judged[0], "kto")) == same(judged[0])


def test_dialogues_and_pairs_are_one() -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    (record,) = FORMATS["hh_rlhf"].read(row, HERE)
    assert to_rows(back_and_forth(record, "preference"), "hh_rlhf") == [row]
    assert to_rows(record, "preference") == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}],
        [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": "b"},
            {"from": "observation", "value": "c"},
            {"from": "gpt", "value": "d"},
        ],
        [
            {"from": "human", "value": "a", "markdown": True},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"},
        ],
        [{"from": "system", "value": ""}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}],
    ],
)
def test_sharegpt_rows_are_written_as_they_were(turns: list[dict[str, Any]]) -> None:
    row = {"id": "x", "conversations": turns}
    (record,) = FORMATS["sharegpt"].read(row, HERE)
    assert to_rows(back_and_forth(record, "openai", "prompt_completion"), "sharegpt") == [row]


def test_openai_rows_are_written_as_they_were() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
            {"role": "assistant", "content": "5", "reasoning_content": "hm"},
        ],
        "tools": "[]",
    }
    (record,) = FORMATS["openai"].read(row, HERE)
    assert to_rows(back_and_forth(record, "sharegpt", "prompt_completion"), "openai") == [row]


def test_the_others_see_the_input_in_the_text_and_we_find_it_again() -> None:
    (record,) = FORMATS["alpaca"].read({"instruction": "Add.", "input": "2, 3", "output": "5"}, HERE)
    (row,) = to_rows(record, "sharegpt")
    assert row["conversations"][0] == {"from": "human", "value": "Add.\n2, 3", "input": "2, 3"}
    assert same(back_and_forth(record, "sharegpt")) == same(record)


def test_an_edited_text_with_a_stale_original_is_refused(tmp_path: Path) -> None:
    raw = {"content": [{"type": "reasoning", "value": "x"}, {"type": "text", "value": "b"}]}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "edited", "raw": raw}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": turns}))
    (record,) = read_file(path)
    assert "differs from its field 'raw'" in record.what  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("messages", "extra", "to", "says"),
    [
        ((Message("user", "a"), Message("assistant", "b")), {"output": 1}, "alpaca", "'output'"),
        (
            (Message("user", "a"), Message("assistant", "b"), Message("tool", "c"), Message("assistant", "d")),
            {},
            "alpaca",
            "a turn of a tool",
        ),
        (
            (Message("system", ""), Message("user", "a"), Message("assistant", "b")),
            {},
            "alpaca",
            "messages would change",
        ),
        ((Message("user", "a"), Message("assistant", "b")), {"when": b"x"}, "openai", "JSON cannot hold"),
        (
            (Message("user", "a"), Message("assistant", "b")),
            {},
            "kto",
            "a conversation record cannot be written as kto",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(messages: Any, extra: dict[str, Any], to: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        to_rows(Conversation(messages, Origin("file.json", 3), extra=extra), to)
    assert says in str(caught.value)
    assert "file.json, record 3" in caught.value.where


def test_prompts_come_back_equal() -> None:
    record = Prompt((Message("system", "s"), Message("user", "a")), HERE, reference="5", extra={"id": 1})
    assert same(back_and_forth(record, "prompts")) == same(record)
    with pytest.raises(UserError, match="more than one instruction"):
        to_rows(record, "instruction_wild")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"instruction": f"é{i}", "input": "", "output": "x"} for i in range(3)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ["out.json", "out.jsonl", "out.jsonl.gz"])
def test_files_hold_all_rows_and_nothing_else_is_left(source: Path, name: str) -> None:
    target = source.with_name(name)
    assert convert(open_file(source), target, to="openai").num_rows == 3
    before, after = list(read_file(source)), list(read_file(target))
    assert [r.messages for r in after] == [r.messages for r in before]  # type: ignore[union-attr]
    assert sorted(path.name for path in source.parent.iterdir()) == sorted(["in.jsonl", name])


def test_nothing_that_exists_is_touched_by_a_failure(source: Path) -> None:
    target = source.with_name("out.jsonl")
    target.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        convert(open_file(source), target, to="openai")
    source.write_text(source.read_text() + "\n{broken")
    with pytest.raises(UserError, match=r"line 4"):
        convert(open_file(source), target, to="openai", force=True)
    assert target.read_text() == "precious"
    done = convert(open_file(source), target, to="openai", force=True, drop=True)
    assert (done.num_rows, [record.origin.line for record in done.left_out]) == (3, [4])
    assert len(target.read_text().splitlines()) == 3
    assert sorted(path.name for path in source.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("name", "to", "says"),
    [
        ("out.csv", "openai", "cannot write .csv"),
        ("out.json", "opanai", "cannot write the format"),
        ("no/out.json", "openai", "does not exist"),
    ],
)
def test_targets_that_cannot_be(source: Path, name: str, to: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        convert(open_file(source), source.with_name("x").parent / name, to=to)


def test_every_writer_is_a_format() -> None:
    assert set(WRITERS) < set(FORMATS)
