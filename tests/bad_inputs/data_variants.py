"""More data files in which one thing is wrong: other containers, other formats, other fields. Knows no verdict."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

from tests.bad_inputs.data_cases import as_file, conversation, field_of_17, lines, overlap_was_dropped
from tests.bad_inputs.place import Place, alpaca_rows, chat_rows
from tests.bad_inputs.scenario import Build, Scenario

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69\nsize 12345\n"
PLACE = r"rows\.\w+\S*(#|, record )\d+"


def table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def changed(change: Callable[[list[dict[str, Any]]], object]) -> Build:
    return lambda place: change(place.rows)  # type: ignore[arg-type]


def sharegpt(*turns: tuple[str, str]) -> Build:
    """ShareGPT conversations, of which record 17 has these turns."""

    def build(place: Place) -> None:
        place.rows = [
            {"conversations": [{"from": "human", "value": r["instruction"]}, {"from": "gpt", "value": r["output"]}]}
            for r in alpaca_rows()
        ]
        place.rows[17] = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}

    return build


def _every_third_nan(rows: list[dict[str, Any]]) -> None:
    for row in rows[::3]:
        row["output"] = "nan"


def _empty_cell() -> str:
    rows = alpaca_rows()
    rows[17]["output"] = ""
    return table(rows)


def _spaced_duplicates(rows: list[dict[str, Any]]) -> None:
    rows.extend([{**row, "output": row["output"] + "  "} for row in rows[:25]])


def _exam(place: Place, rows: list[dict[str, Any]]) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "exam.jsonl").write_text(lines(rows), encoding="utf-8")
    place.set("data.validation", "exam.jsonl")


def _overlap_spaced(place: Place) -> None:
    _exam(place, [{**row, "output": row["output"] + " \n"} for row in alpaca_rows()[5:13]])


def _overlap_of_prompts(place: Place) -> None:
    _exam(place, [{**row, "output": "I will not say."} for row in alpaca_rows()[5:13]])


def _empty_folder(place: Place) -> None:
    (place.folder / "texts").mkdir(parents=True)
    place.rows = None
    place.set("data.sources", ["texts"])


def _cut_answers(place: Place) -> None:
    place.set("data.too_long", "cut")
    for row in place.rows or []:
        row["output"] = " ".join([row["output"]] * 60)


def _dialogues(human: str, machine: str, *, every: int = 1) -> Build:
    def build(place: Place) -> None:
        for number, row in list(enumerate(place.rows or []))[::every]:
            row["instruction"] = f"{human} Add {number} and 2.\n{machine} {number + 2}.\n{human} And 1 more?\n{machine}"

    return build


def _twice_in_sources(place: Place) -> None:
    place.set("data.sources", ["rows.json", "./rows.json"])


def _parquet(place: Place, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.rows = None
    place.folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), place.folder / "rows.parquet")
    place.set("data.sources", ["rows.parquet"])


def _null_in_parquet(place: Place) -> None:
    rows = alpaca_rows()
    rows[17]["output"] = None
    _parquet(place, rows)


DATA_VARIANTS = [
    Scenario(
        "v_d_gz_cut_short",
        "A packed file whose download was cut short.",
        as_file("rows.jsonl.gz", gzip.compress(lines(alpaca_rows()).encode())[:-300]),
        value="gz|packed|compressed|ends",
        where=r"rows\.jsonl\.gz",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_csv_empty_cell",
        "An empty cell in a table.",
        as_file("rows.csv", _empty_cell()),
        value="empty",
        where=(r"rows\.csv.*record 17", "'output'"),
        remedy="on_error: drop",
    ),
    Scenario(
        "v_d_parquet_null",
        "A null in a Parquet column.",
        _null_in_parquet,
        value="null|missing",
        where=(r"rows\.parquet.*record 17", "'output'"),
        remedy="on_error: drop",
    ),
    Scenario(
        "v_d_not_parquet",
        "JSON lines under the name of a Parquet file.",
        as_file("rows.parquet", lines(alpaca_rows())),
        value="parquet",
        where=r"rows\.parquet",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_utf16",
        "A file in UTF-16, as Windows tools save it.",
        as_file("rows.jsonl", lines(alpaca_rows()).encode("utf-16")),
        value="utf-?16|0x|utf-?8",
        where=r"rows\.jsonl",
        remedy="to do:.*utf-?8",
    ),
    Scenario(
        "v_d_html",
        "A web page where data were to be downloaded.",
        as_file("rows.json", "<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"),
        value="<!DOCTYPE|html",
        where=r"rows\.json.*(line 1|record 0)|rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_lfs_pointer",
        "The pointer of git-lfs instead of the file.",
        as_file("rows.json", LFS_POINTER),
        value="git.?lfs|version https",
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_sharegpt_unknown_speaker",
        "A speaker that is neither human nor gpt.",
        sharegpt(("human", "Hello."), ("bartender", "Good day.")),
        value="bartender",
        where=r"record 17 .*field 'conversations",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_two_answers_in_a_row",
        "Two answers without a question between them.",
        conversation(("user", "Hello."), ("assistant", "Good day."), ("assistant", "Anyone?")),
        value="assistant",
        where=r"record 17 .*field 'messages",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_content_null",
        "null for the content of a turn.",
        conversation(("user", "Hello."), ("assistant", None)),
        value="null",
        where=r"record 17 .*field 'messages\[1\]\.content'",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_list_answer",
        "A list for an answer.",
        field_of_17("output", ["3", "4"]),
        value="list",
        where=r"record 17 \(line \d+\), field 'output'",
        remedy="text",
    ),
    Scenario(
        "v_d_bool_instruction",
        "true for an instruction.",
        field_of_17("instruction", True),
        value="true",
        where=r"record 17 \(line \d+\), field 'instruction'",
        remedy="text",
    ),
    Scenario(
        "v_d_lone_surrogate",
        "Half of an emoji.",
        as_file("rows.json", json.dumps([*alpaca_rows()[:17], {**alpaca_rows()[17], "output": "Yes \ud83d"}])),
        value="surrogate|d83d",
        where=r"record 17.*field 'output'",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_nan_words",
        "A third of the answers is the word nan, as a table writes it.",
        changed(_every_third_nan),
        value=(r"\b20\b", "nan|placeholder|N/A"),
        where=PLACE,
        remedy="to do:.*",
        may=("stopped", "warned"),
    ),
    Scenario(
        "v_d_duplicates_spaced",
        "25 of 85 records are there twice, but for spaces at their ends.",
        changed(_spaced_duplicates),
        value=(r"\b25\b", "twice|duplicate|repeat|same"),
        where=PLACE,
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_source_twice",
        "The same file is named twice.",
        _twice_in_sources,
        value=(r"\b60\b|rows\.json", "twice|duplicate|repeat|same"),
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_overlap_spaced",
        "Evaluation rows that differ from training rows by spaces.",
        _overlap_spaced,
        value=r"\b8\b",
        where=(r"exam\.jsonl|validation",),
        remedy="to do:.*",
        may=("stopped", "handled"),
        proof=lambda place: overlap_was_dropped(place, 8),
    ),
    Scenario(
        "v_d_overlap_of_prompts",
        "The evaluation asks what training answers, with other answers.",
        _overlap_of_prompts,
        value=r"\b8\b",
        where=r"exam\.jsonl|rows\.json",
        remedy="to do:.*",
        may=("stopped", "warned"),
    ),
    Scenario(
        "v_d_validation_is_training",
        "The evaluation file is the training file.",
        lambda place: place.set("data.validation", "rows.json"),
        value=r"\b60\b|no row",
        where=r"rows\.json|data\.validation",
        remedy="to do:.*validation",
    ),
    Scenario(
        "v_d_empty_folder",
        "A folder without any data file.",
        _empty_folder,
        value="no .*file|empty|nothing",
        where="texts",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_glob_matches_nothing",
        "A pattern that matches no file.",
        lambda place: place.set("data.sources", ["part-*.jsonl"]),
        value=r"part-\*\.jsonl",
        where=r"part-\*\.jsonl|data\.sources",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_spreadsheet",
        "A spreadsheet.",
        as_file("rows.xlsx", b"PK\x03\x04 and so on"),
        value="xlsx",
        where=r"rows\.xlsx",
        remedy=r"to do:.*(csv|json|convert|save)",
    ),
    Scenario(
        "v_d_answers_all_cut",
        "Every answer is cut, so none learns to end.",
        _cut_answers,
        value="cut|terminator|end",
        where=r"max_tokens|rows\.json|too_long",
        remedy="to do:.*max_tokens",
    ),
    Scenario(
        "v_d_dialogue_human",
        "Human and Assistant in the instruction of every second row.",
        _dialogues("### Human:", "### Assistant:", every=2),
        value="Human|speaker|dialogue|role",
        where=PLACE,
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_dialogue_chinese",
        "Dialogues with Chinese names of the speakers in the instruction.",
        _dialogues("用户：", "助手："),
        value="用户|助手|speaker|dialogue|role",
        where=PLACE,
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_no_assistant",
        "Conversations without one answer.",
        lambda place: setattr(place, "rows", [{"messages": row["messages"][:1]} for row in chat_rows()]),
        value="assistant|answer",
        where=r"rows\.json.*(record 0|field 'messages)",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_columns_absent",
        "A column that is to be renamed and is not there.",
        lambda place: place.set("data.sources", [{"path": "rows.json", "columns": {"output": "reply"}}]),
        value="reply",
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "v_d_chinese_name",
        "A broken record in a file with a Chinese name.",
        as_file("数据.jsonl", lines([*alpaca_rows()[:17], {"instruction": "加一", "input": "", "output": ""}])),
        value="empty",
        where=r"数据\.jsonl, record 17 \(line 18\), field 'output'",
        remedy="on_error: drop",
    ),
    Scenario(
        "v_d_windows_lines_broken",
        "A broken line in a file with Windows line ends.",
        as_file("rows.jsonl", lines(alpaca_rows()[:17]).replace("\n", "\r\n") + '{"instruction": "x",\r\n'),
        value="closed|ends|broken|unterminated|expected",
        where=r"rows\.jsonl.*line 18",
        remedy="to do:.*",
    ),
]
