"""The history and its file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhibei.config.errors import UserError
from zhibei.serve.conversation import Conversation, load_conversation

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(system=TEXT, turns=st.lists(st.tuples(TEXT, TEXT), max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_saved_conversation_loads_to_the_same(tmp_path_factory, system, turns):
    path = tmp_path_factory.mktemp("chat") / "talk.json"
    said = Conversation(system, turns)
    said.save(path)
    assert load_conversation(path) == said


def test_the_file_is_a_row_of_messages_that_data_reads(tmp_path):
    from zhibei.data.readers import read_file
    from zhibei.data.records import Conversation as Row

    path = tmp_path / "talk.jsonl"
    said = Conversation("Be brief.", [("Hi", "Ho"), ("And?", "No.")])
    said.save(path)
    (row,) = list(read_file(str(path)))
    assert isinstance(row, Row)
    assert list(row.messages) == said.messages()


def test_saving_overwrites_nothing(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        Conversation().save(path)
    assert path.read_text() == "mine"


def test_saving_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        Conversation().save(tmp_path / "no" / "talk.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[1]", "no list `messages`"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "has no answer"),
        (json.dumps({"messages": [{"role": "assistant", "content": "a"}]}), "message 0 is from assistant"),
        (json.dumps({"messages": [{"role": "user"}]}), "message 0 has no role"),
        (json.dumps({"messages": [{"role": "tool", "content": "a"}]}), "message 0 has no role"),
        (json.dumps({"messages": ["a"]}), "message 0 has no role"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "talk.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_conversation(path)
    assert error.value.where == str(path)


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "talk.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="UTF-8"):
        load_conversation(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_conversation(tmp_path / "none.json")


def test_messages_come_in_order_and_undo_takes_the_last_turn():
    said = Conversation("S", [("a", "b"), ("c", "d")])
    assert [(m.role, m.content) for m in said.messages("e")] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    assert said.undo() == ("c", "d")
    assert said.undo() == ("a", "b")
    assert said.undo() is None
