"""Readers: every container and format by hand-made files, and every way such a file can be broken."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, Source
from zhibei.data.formats import FORMATS
from zhibei.data.jsonlines import Row, read_json
from zhibei.data.readers import open_file, read_file, read_sources
from zhibei.data.records import BrokenRecord, Conversation, Judged, PlainText, Preference, Prompt, Record
from zhibei.text.messages import Message

ALPACA = {"instruction": "Add.", "input": "2, 3", "output": "5"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write_file


def only(path: Path, **options: object) -> Record:
    records = list(read_file(path, **options))  # type: ignore[arg-type]
    assert len(records) == 1
    assert not isinstance(records[0], BrokenRecord), records[0]
    return records[0]


def broken(path: Path, **options: object) -> list[BrokenRecord]:
    return [record for record in read_file(path, **options) if isinstance(record, BrokenRecord)]  # type: ignore[arg-type]


def one_row(write: Write, row: object, **options: object) -> Record | BrokenRecord:
    records = list(read_file(write("row.jsonl", json.dumps(row) + "\n"), **options))  # type: ignore[arg-type]
    assert len(records) == 1
    return records[0]


# ---- containers


@pytest.mark.parametrize(
    ("name", "content", "container"),
    [
        ("list.json", json.dumps([ALPACA, ALPACA]), "a JSON list"),
        ("pretty.json", json.dumps([ALPACA, ALPACA], indent=4), "a JSON list"),
        ("lines.jsonl", json.dumps(ALPACA) + "\n" + json.dumps(ALPACA), "JSON lines"),
        ("lines_as.json", json.dumps(ALPACA) + "\n" + json.dumps(ALPACA) + "\n", "JSON lines"),
        ("list_as.jsonl", json.dumps([ALPACA, ALPACA], indent=1), "a JSON list"),
        ("one_line_list_as.jsonl", json.dumps([ALPACA, ALPACA]), "a JSON list"),
        ("bom.jsonl", "\ufeff" + json.dumps(ALPACA) + "\n" + json.dumps(ALPACA), "JSON lines"),
        ("crlf.jsonl", json.dumps(ALPACA) + "\r\n\r\n" + json.dumps(ALPACA) + "\r\n", "JSON lines"),
        ("held.json", json.dumps({"version": 1, "data": [ALPACA, ALPACA]}), 'a JSON list under "data"'),
        ("other.json", json.dumps({"note": "x", "my_rows": [ALPACA, ALPACA]}, indent=2), 'a JSON list under "my_rows"'),
        (
            "rows.json",
            json.dumps({"rows": [{"row_idx": 0, "row": ALPACA}, {"row": ALPACA}]}),
            'a JSON list under "rows"',
        ),
        ("table.csv", 'instruction,input,output\nAdd.,"2, 3",5\nAdd.,"2, 3",5\n', "CSV"),
        ("table.tsv", "instruction\tinput\toutput\nAdd.\t2, 3\t5\nAdd.\t2, 3\t5\n", "tab-separated values"),
        ("semicolon.csv", "instruction;input;output\nAdd.;2, 3;5\nAdd.;2, 3;5\n", "semicolon-separated values"),
    ],
)
def test_content_decides_how_a_file_is_read(write: Write, name: str, content: str, container: str) -> None:
    file = open_file(write(name, content))
    expected = (Message("user", "Add.", context="2, 3"), Message("assistant", "5"))
    assert (file.container, file.format) == (container, "alpaca")
    assert [record.messages for record in file.records] == [expected, expected]  # type: ignore[union-attr]


def test_gz_and_parquet_hold_the_same_records(write: Write, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [ALPACA, {**ALPACA, "output": "fünf"}]
    packed = write("rows.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    chat = [{"messages": [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]}]
    parquet.write_table(arrow.Table.from_pylist(chat), tmp_path / "chat.parquet")
    first = [r.messages for r in read_file(packed)]  # type: ignore[union-attr]
    assert first == [r.messages for r in read_file(tmp_path / "rows.parquet")]  # type: ignore[union-attr]
    assert only(tmp_path / "chat.parquet").messages == (Message("user", "a"), Message("assistant", "b"))  # type: ignore[union-attr]
    cut = write("cut.parquet", (tmp_path / "rows.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="Parquet"):
        list(read_file(cut))
    with pytest.raises(UserError, match="cannot be unpacked"):
        list(read_file(write("cut.jsonl.gz", packed.read_bytes()[:-12])))


def test_a_text_file_is_one_record(write: Write) -> None:
    record = only(write("story.txt", "\ufeffOnce.\r\n\nUpon a time."))
    assert isinstance(record, PlainText)
    assert record.text == "Once.\r\n\nUpon a time."


def test_jsonl_is_streamed(write: Write) -> None:
    line = json.dumps(ALPACA) + "\n"
    path = write("long.jsonl", line * 300 + "{broken\n" * 5)
    records = read_file(path)
    assert isinstance(next(records), Conversation)
    path.write_text("")
    assert sum(1 for _ in records) < 300, "what was not asked for was not read"


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
rows = st.lists(
    st.dictionaries(text, text | st.integers() | st.lists(text, max_size=2), min_size=1), min_size=2, max_size=8
)


@given(rows, st.sampled_from([None, 1, 4]), st.booleans())
def test_every_row_and_its_line_come_back(tmp_path_factory, rows, indent, ascii_only) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(content.encode("utf-8"))
    found = list(read_json(path, "rows").rows)
    assert [row.value for row in found if isinstance(row, Row)] == rows
    lines = content.split("\n")
    starts = [1] * len(rows)
    if indent:
        starts = [number for number, line in enumerate(lines, 1) if line.startswith(" " * indent + "{")]
    assert [row.line for row in found] == starts  # type: ignore[union-attr]
    as_lines = path.with_suffix(".jsonl")
    as_lines.write_bytes("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode("utf-8"))
    again = list(read_json(as_lines, "rows").rows)
    assert [(row.value, row.line) for row in again] == [(row, i) for i, row in enumerate(rows, 1)]  # type: ignore[union-attr]


# ---- broken files: each with its place, and the records around it intact

GOOD = json.dumps(ALPACA)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b'{"instruction": "Add.", "output": "5', "ends in the middle"),
        (b'{"instruction": "Add.", "output": "5"', "ends in the middle"),
        (b'{"instruction": "a\\b\\d", "output": "5"}', r"\\ (valid escapes"),
        (b"{'instruction': 'Add.', 'output': '5'}", "single quotes"),
        (b'{"instruction": "Add.", "output": NaN}', "NaN is not a JSON value"),
        (b'{"instruction": "Add.", "output": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"instruction": "Add.", "output": "5", "output": "6"}', "the key 'output' stands twice"),
        (b'{"instruction": "Add.", "output": "5"} {"a": 1}', "one record per line"),
        (b'{"instruction": "Add.", "output": "a\tb"}', r"inside of strings as \n and \t"),
        (b'{"instruction": "Add.", "output": "caf\xe9"}', "is not UTF-8"),
        (b'{"instruction": "Add.", "output": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"instruction": "Add.", "output": 5}', "number 5"),
        (b'{"instruction": "Add.", "output": null}', "null"),
        (b'{"instruction": "Add.", "output": ["5"]}', "list"),
        (b'{"instruction": "Add.", "output": "  "}', "empty answer"),
        (b'{"instruction": "", "output": "5"}', "empty text"),
        (b'{"instruction": "Add.", "input": "2, 3"}', "missing"),
        (b'{"instruction": "Add.", "input": "2, 3", "ouput": "5"}', "looks like 'output'"),
        (b'{"instruction": "Add.", "inptu": "2, 3", "output": "5"}', "looks like 'input'"),
        (b'["Add.", "5"]', "where a record is needed"),
        (b"42", "where a record is needed"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(write: Write, bad: bytes, says: str) -> None:
    path = write("rows.jsonl", GOOD.encode() + b"\n\n" + bad + b"\n" + GOOD.encode() + b"\n")
    records = list(read_file(path))
    assert [type(record) for record in records] == [Conversation, BrokenRecord, Conversation]
    error = records[1].as_error()  # type: ignore[union-attr]
    assert says in str(error)
    assert "rows.jsonl, record 1 (line 3)" in error.where
    assert len(error.fix) > 5
    assert len(error.expected) > 3


def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file(write: Write) -> None:
    content = (GOOD + "\n").encode() * 2 + '{"instruction": "好"}\n'.encode("gb18030")
    (record,) = broken(write("rows.jsonl", content))
    place = content.index("好".encode("gb18030"))
    assert f"byte {place} " in record.what
    assert "GB18030" in record.what
    listed = json.dumps([ALPACA, {**ALPACA, "output": "é!"}, ALPACA], indent=1, ensure_ascii=False).encode("latin-1")
    (record,) = broken(write("rows.json", listed))
    assert f"byte {listed.index(0xE9)} " in record.what
    assert record.origin.index == 1


@pytest.mark.parametrize(
    "bad", ['{"instruction": "x" "output": "y"}', '{"instruction": "a\\d", "output": "y"}', "{'a': 1}"]
)
@pytest.mark.parametrize("indent", ["", "  "])
def test_one_broken_element_of_a_list_costs_one_record(write: Write, bad: str, indent: str) -> None:
    elements = [GOOD, bad, GOOD]
    records = list(read_file(write("rows.json", "[\n" + ",\n".join(indent + e for e in elements) + "\n]\n")))
    assert [type(record) for record in records] == [Conversation, BrokenRecord, Conversation]
    assert (records[1].origin.index, records[1].origin.line) == (1, 3)


def test_a_list_that_ends_in_the_middle_keeps_its_sound_records(write: Write) -> None:
    content = json.dumps([ALPACA] * 5, indent=2)
    records = list(read_file(write("rows.json", content[:-20])))
    assert [type(record) for record in records] == [Conversation] * 4 + [BrokenRecord]
    assert "ends in the middle" in records[-1].what  # type: ignore[union-attr]
    assert records[-1].origin.line == 22


@pytest.mark.parametrize("bad", ['{"output": NaN}', '{"a": [Infinity], "a": 2}', '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("template", ["[{0}, {1}, {0}]", "[\n{0},\n{1},\n{0}\n]", '{{"data": [{0}, {1}, {0}]}}'])
def test_values_that_are_not_json_cost_one_record_even_on_one_line(write: Write, bad: str, template: str) -> None:
    records = list(read_file(write("rows.json", template.format(GOOD, bad))))
    assert [type(record) for record in records] == [Conversation, BrokenRecord, Conversation]


def test_a_broken_list_on_one_line_cannot_be_gone_on_with(write: Write) -> None:
    with pytest.raises(UserError, match="the record after it cannot be found"):
        list(read_file(write("rows.json", f'[{GOOD}, {{"a" 1}}, {GOOD}]')))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.json", "", "the file is empty"),
        ("blank.jsonl", "\n \n", "the file is empty"),
        ("none.json", "[]", "no records"),
        ("none_held.json", '{"data": []}', "no records"),
        ("header.csv", "instruction,output\n", "no records"),
        ("empty.csv", "", "the file is empty"),
        ("empty.txt", "", "no records"),
        ("columns.json", '{"instruction": ["a", "b"], "output": ["c", "d"]}', "holds columns"),
        ("wide.jsonl", '{"a": 1}\n', "no format has the fields a"),
        ("strings.json", '["a", "b"]', "not objects with fields"),
        ("utf16.json", GOOD.encode("utf-16"), "UTF-16"),
        ("twice.csv", "instruction,output,output\na,b,c\n", "column 'output' appears twice"),
        ("file.docx", "x", "unknown file type"),
        ("object.json", '{"instruction": "a", "output": }', "invalid JSON"),
        ("bad.parquet", "PAR1", "not a readable Parquet file"),
        (
            "two_objects.json",
            '{\n"instruction": "a",\n"output": "b"\n}\n{\n"instruction": "c",\n"output": "d"\n}',
            "follows the end",
        ),
        ("two_lists.json", "[\n" + GOOD + "\n]\n[" + GOOD + "]", "follows the end"),
        ("open_object.json", '{\n"instruction": "a",\n"output": "b"\n', "ends in the middle"),
        ("pretty.jsonl", '{\n"instruction": "a",\n"output": "b"\n}', "a record over several lines"),
        ("all_bad.jsonl", "{\n{\n", "no other of the first 2 records can be read"),
    ],
)
def test_a_file_that_is_no_use_says_why(write: Write, name: str, content: str | bytes, says: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError) as caught:
        list(read_file(write(name, content)))
    assert says in str(caught.value)
    assert name in caught.value.where


def test_csv_lines_with_too_many_or_too_few_cells(write: Write) -> None:
    content = 'instruction,output\n"one\ntwo",ok\na,b,c\nd\n"x ""y""",z\n'
    records = list(read_file(write("rows.csv", content)))
    assert [type(record) for record in records] == [Conversation, BrokenRecord, BrokenRecord, Conversation]
    assert [record.origin.line for record in records] == [2, 4, 5, 6]
    assert "3 cells for 2 columns" in records[1].what  # type: ignore[union-attr]
    assert "'output'" in records[2].what  # type: ignore[union-attr]
    assert records[3].messages[0].content == 'x "y"'  # type: ignore[union-attr]
    (unclosed,) = broken(write("quote.csv", 'instruction,output\na,b\n"c,d\ne,f\n'))
    assert unclosed.origin.line == 3


# ---- which format

EXAMPLES = {
    "alpaca": Conversation,
    "self_instruct": Conversation,
    "sharegpt": Conversation,
    "openai": Conversation,
    "prompt_completion": Conversation,
    "text": PlainText,
    "hh_rlhf": Preference,
    "preference": Preference,
    "kto": Judged,
    "instruction_wild": Prompt,
    "prompts": Prompt,
}


def test_every_format_recognises_its_own_example_and_no_other_does(write: Write) -> None:
    assert set(EXAMPLES) == set(FORMATS)
    for name, kind in EXAMPLES.items():
        file = open_file(write(f"{name}.jsonl", FORMATS[name].example + "\n"))
        assert file.format == name
        assert [type(record) for record in file.records] == [kind]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "a", "response": "b", "context": "c", "category": "d"}, "alpaca"),
        ({"query": "a", "response": "b"}, "prompt_completion"),
        ({"question": "a", "answer": "b"}, "prompt_completion"),
        ({"items": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "title": "c"}, "sharegpt"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "sharegpt"),
        ({"messages": [{"from": "user", "content": "a"}, {"from": "assistant", "content": "b"}]}, "openai"),
        (
            {
                "context": [{"from": "user", "content": "a"}],
                "chosen": [{"from": "assistant", "content": "b"}],
                "rejected": [{"from": "assistant", "content": "c"}],
            },
            "preference",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            "preference",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True}, "kto"),
        ({"question_id": 1, "category": "c", "turns": ["a", "b"]}, "prompts"),
    ],
)
def test_spellings_of_formats(write: Write, row: object, format: str) -> None:
    file = open_file(write("row.jsonl", json.dumps(row) + "\n"))
    assert file.format == format
    assert not isinstance(next(file.records), BrokenRecord)


def test_ambiguous_and_unknown_fields_name_the_candidates(write: Write) -> None:
    both = {**ALPACA, "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(UserError, match="several formats: alpaca, openai"):
        open_file(write("both.jsonl", json.dumps(both)))
    with pytest.raises(UserError, match=r"alpaca with 'outptu' for 'output': columns: \{output: outptu\}"):
        open_file(write("typo.jsonl", json.dumps({"instruction": "a", "input": "", "outptu": "c"})))
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        open_file(write("rows.jsonl", GOOD), format="alpacca")


def test_columns_rename_and_lose_nothing(write: Write) -> None:
    path = write("rows.jsonl", json.dumps({"q": "a", "output": "old", "gpt4": "new"}))
    record = only(path, columns={"instruction": "q", "output": "gpt4"})
    assert isinstance(record, Conversation)
    assert record.messages[-1].content == "new"
    assert record.extra == {"file_output": "old"}
    with pytest.raises(UserError, match="did you mean 'gpt4'"):
        open_file(path, columns={"instruction": "q", "output": "gtp4"})
    with pytest.raises(UserError, match="no field of the format alpaca"):
        open_file(path, columns={"instruction": "q", "answer": "gpt4"}, format="alpaca")


# ---- conversations


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"conversations": [{"from": name, "value": value} for name, value in turns]}


@pytest.mark.parametrize(
    ("row", "says", "field"),
    [
        (chat(("human", "a"), ("human", "b"), ("gpt", "c")), "user speaks after user", "conversations[1]"),
        (chat(("gpt", "a"), ("human", "b"), ("gpt", "c")), "assistant speaks at the beginning", "conversations[0]"),
        (chat(("human", "a"), ("system", "b"), ("gpt", "c")), "system speaks after user", "conversations[1]"),
        (chat(("human", "a"), ("gtp", "b")), "unknown speaker 'gtp'", "conversations[1].from"),
        (chat(("human", "a"), ("gpt", "")), "empty text", "conversations[1].value"),
        (chat(("human", "a")), "no answer to learn from", "conversations"),
        ({"conversations": []}, "no turns", "conversations"),
        ({"conversations": None}, "null where a list", "conversations"),
        ({"conversations": "hello"}, "hello where a list", "conversations"),
        ({"conversations": ["hello"]}, "where a turn is needed", "conversations[0]"),
        ({"conversations": [{"from": "human"}]}, "missing", "conversations[0].value"),
        ({"conversations": [{"value": "a"}]}, "no speaker", "conversations[0].from"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "image_url",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
            "weight 0.5",
            "messages[1].weight",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 5}]},
            "number 5",
            "messages[1].content",
        ),
        (
            {"system": "s", **chat(("system", "t"), ("human", "a"), ("gpt", "b"))},
            "a system prompt in the field and",
            "system",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal to 'chosen'", "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer", "rejected"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty answer", "chosen"),
        ({"prompt": "a", "completion": "b", "label": "perhaps"}, "'perhaps'", "label"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: "},
            "empty answer",
            "rejected",
        ),
        ({"instruction": "a", "instances": [{"input": "", "output": ""}]}, "empty answer", "instances[0].output"),
    ],
)
def test_what_is_wrong_with_a_record(write: Write, row: object, says: str, field: str) -> None:
    record = one_row(write, row)
    assert isinstance(record, BrokenRecord)
    assert says in record.what
    assert record.field == field
    assert f"record 0 (line 1), field '{field}'" in record.where


def test_a_missing_side_of_a_pair_is_found_when_other_rows_have_it(write: Write) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write("pairs.jsonl", "\n".join(json.dumps(r) for r in (good, {"prompt": "a", "chosen": "b"}, good)))
    (record,) = broken(path)
    assert (record.field, record.origin.line) == ("rejected", 2)


def test_speakers_weights_tools_and_parts(write: Write) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    row = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "+3?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "5", "tool_call_id": "x"},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "5"}]},
        ],
    }
    record = one_row(write, row)
    assert isinstance(record, Conversation)
    assert record.messages == (
        Message("system", "be brief"),
        Message("user", "2+3?"),
        Message("assistant", '{"name": "add", "arguments": {"a": 2}}', learn=False),
        Message("tool", "5"),
        Message("assistant", "<think>\nhm\n</think>\n\n5"),
    )
    assert record.tools == '[{"name": "add"}]'
    assert record.extra["turn_fields"][3] == {"tool_call_id": "x"}


def test_the_older_spelling_of_a_call(write: Write) -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    record = one_row(write, {"messages": [{"role": "user", "content": "a"}, turn]})
    assert isinstance(record, Conversation)
    assert record.messages[1].content == '{"name": "f", "arguments": {}}'


def test_a_question_at_the_end_is_cut_off_and_kept(write: Write) -> None:
    record = one_row(write, chat(("human", "a"), ("gpt", "b"), ("human", "c")))
    assert isinstance(record, Conversation)
    assert record.messages == (Message("user", "a"), Message("assistant", "b"))
    assert record.extra["unanswered"] == [{"role": "user", "content": "c"}]


def test_history_and_system_of_alpaca(write: Write) -> None:
    record = one_row(write, {**ALPACA, "system": "s", "history": [["a", "b"]]})
    assert isinstance(record, Conversation)
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add."),
        ("assistant", "5"),
    ]


def test_common_beginning_of_a_dialogue_is_the_prompt(write: Write) -> None:
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    record = one_row(write, {"chosen": head + "yes\n\nHuman: x", "rejected": head + "no\n\nHuman: y"})
    assert isinstance(record, BrokenRecord), "ends with a question"
    record = one_row(write, {"chosen": head + "yes", "rejected": head + "no"})
    assert isinstance(record, Preference)
    assert [m.content for m in record.prompt] == ["a", "b", "c"]
    assert (record.chosen, record.rejected) == ((Message("assistant", "yes"),), (Message("assistant", "no"),))


def test_references_of_checkable_answers(write: Write) -> None:
    row = {"question": "2+3?", "answer": "2+3 = <<2+3=5>>5\n#### 5"}
    learned, asked = one_row(write, row), one_row(write, row, format="prompts")
    assert isinstance(learned, Conversation)
    assert isinstance(asked, Prompt)
    assert (learned.extra["reference"], asked.reference) == ("5", "5")


def test_cells_of_a_table_may_hold_turns_as_json(write: Write) -> None:
    turns = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).replace('"', '""')
    record = only(write("chat.csv", f'messages\n"{turns}"\n'))
    assert isinstance(record, Conversation)
    assert len(record.messages) == 2


# ---- sources


def section(*sources: Source | str, **options: object) -> DataSection:
    return DataSection(sources=list(sources), **options)  # type: ignore[arg-type]


def test_stop_names_the_first_broken_record_and_counts_the_others(write: Write) -> None:
    path = write("rows.jsonl", "\n".join([GOOD, "{", GOOD, "{", "{", GOOD]))
    with pytest.raises(UserError) as caught:
        list(read_sources(section(str(path))))
    assert "line 2" in caught.value.where
    assert "and 2 more broken records" in caught.value.what
    found = list(read_sources(section(str(path), on_error="drop")))
    assert [type(record) for _, record in found].count(BrokenRecord) == 3
    assert len(found) == 6


def test_folders_globs_numbers_limits_and_notices(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.json", "deep/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({**ALPACA, "output": name}))
    (tmp_path / ".hidden.json").write_text("{")
    (tmp_path / "picture.png").write_text("x")
    heard: list[str] = []
    found = list(read_sources(section(str(tmp_path), str(tmp_path / "*.json*")), notice=heard.append))
    answers = [(number, record.messages[-1].content) for number, record in found]  # type: ignore[union-attr]
    assert answers == [(0, "a.json"), (0, "b.jsonl"), (0, "deep/c.jsonl"), (1, "a.json"), (1, "b.jsonl")]
    assert heard[0].endswith("a.json: a single JSON object, format alpaca")
    limited = list(read_sources(section(Source(path=str(tmp_path), limit=2))))
    assert len(limited) == 2


def test_missing_paths_say_which_were_looked_for(tmp_path: Path, write: Write) -> None:
    write("alpaca.json", "[]")
    with pytest.raises(UserError, match=r"did you mean .*alpaca\.json"):
        list(read_sources(section(str(tmp_path / "alpacca.json"))))
    with pytest.raises(UserError, match="no file matches"):
        list(read_sources(section(str(tmp_path / "*.csv"))))
    with pytest.raises(UserError, match="does not exist"):
        list(read_sources(section("/nowhere/at/all.json")))
    with pytest.raises(UserError, match="no effect on local files"):
        list(read_sources(section(Source(path=str(tmp_path / "alpaca.json"), split="test"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data file in the folder"):
        list(read_sources(section(str(tmp_path / "empty"))))


DIALOGUE = "\n\nHuman: 2+3?\n\nAssistant: 5\n\nHuman: And one more?\n\nAssistant:"
ASKED = (("user", "2+3?"), ("assistant", "5"), ("user", "And one more?"))


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": DIALOGUE, "response": " 6", "chosen": " 6", "rejected": " 7"}, ("6", "7")),  # Dahoas/rm-static
        ({"prompt": DIALOGUE, "completion": " 6", "label": True}, ("6",)),
        ({"prompt": DIALOGUE, "response": " 6"}, ("6",)),
        ({"prompt": DIALOGUE}, ()),
    ],
)
def test_a_prompt_that_is_a_whole_dialogue_becomes_its_turns(
    row: dict[str, Any], answers: tuple[str, ...], write: Write
) -> None:
    (record,) = read_file(write("rows.jsonl", json.dumps(row) + "\n"))
    if isinstance(record, Preference):
        prompt, said = record.prompt, (record.chosen, record.rejected)
    elif isinstance(record, Judged):
        prompt, said = record.prompt, (record.answer,)
    else:
        assert isinstance(record, (Conversation, Prompt))
        prompt, said = record.messages[:3], tuple((message,) for message in record.messages[3:])
    assert tuple((message.role, message.content) for message in prompt) == ASKED
    assert tuple(message.content for (message,) in said) == answers


def test_a_question_that_only_quotes_a_speaker_stays_one_turn(write: Write) -> None:
    text = "What does this say?\n\nHuman: hello\n\nAssistant:"
    (record,) = read_file(write("rows.jsonl", json.dumps({"prompt": text, "chosen": " a", "rejected": "b"}) + "\n"))
    assert isinstance(record, Preference)
    assert [message.content for message in (*record.prompt, *record.chosen)] == [text, " a"]
