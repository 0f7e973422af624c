"""Data files in which one thing is wrong, in the forms that people bring. Knows only what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bad_inputs.place import Place, alpaca_rows, chat_rows
from tests.bad_inputs.scenario import Build, Scenario

RECORD_17 = r"rows\.json\S*, record 17 \(line \d+\), field '{}'"


def field_of_17(field: str, value: Any) -> Build:
    """Record 17 with another value in one field."""
    return lambda place: place.rows[17].update({field: value})  # type: ignore[index]


def field_of_all(field: str, value: Any) -> Build:
    return lambda place: [row.update({field: value}) for row in place.rows or []]


def without(field: str) -> Build:
    return lambda place: place.rows[17].pop(field)  # type: ignore[index]


def as_file(name: str, content: bytes | str) -> Build:
    """The rows come from a file with this very content."""

    def build(place: Place) -> None:
        place.rows = None
        place.set("data.sources", [name])
        place.folder.mkdir(parents=True, exist_ok=True)
        path = place.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))

    return build


def lines(rows: list[Any], *, ensure_ascii: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)


def with_line(number: int, text: str) -> str:
    """Sound JSON lines, of which one (counted from 1) reads as given."""
    all_lines = lines(alpaca_rows()).splitlines()
    all_lines[number - 1] = text
    return "\n".join(all_lines) + "\n"


def conversation(*turns: tuple[str, Any]) -> Build:
    """Conversations, of which record 17 has these turns."""

    def build(place: Place) -> None:
        place.rows = chat_rows()
        place.rows[17] = {"messages": [{"role": role, "content": content} for role, content in turns]}

    return build


def _duplicates(place: Place) -> None:
    place.rows = [*alpaca_rows(), *alpaca_rows()[:25]]


def _evaluation_overlap(place: Place) -> None:
    place.folder.mkdir(parents=True, exist_ok=True)
    (place.folder / "exam.json").write_text(json.dumps(alpaca_rows()[5:13]), encoding="utf-8")
    place.set("data.validation", "exam.json")


def _few_rows(place: Place) -> None:
    place.rows = alpaca_rows(10)
    place.set("sft.global_batch", 64)


def _too_long(place: Place) -> None:
    for row in place.rows or []:
        row["output"] = row["output"] * 60


def _prompt_fills_window(place: Place) -> None:
    place.set("data.too_long", "cut")
    for row in place.rows or []:
        row["instruction"] = row["instruction"] * 60


def _mixed(place: Place) -> None:
    place.rows = [*alpaca_rows(50), *chat_rows(10)]


def _dialogue_in_instruction(place: Place) -> None:
    for number, row in enumerate(place.rows or []):
        row["instruction"] = f"USER: Add {number} and 2.\nASSISTANT: {number + 2}.\nUSER: And 1 more?\nASSISTANT:"


DATA_CASES = [
    Scenario(
        "d1_missing_file",
        "A data file that is not there.",
        lambda place: place.set("data.sources", ["row.json"]),
        value=r"row\.json",
        where=r"row\.json|data\.sources",
        remedy=r"rows\.json|check the path",
    ),
    Scenario(
        "d2_empty_file",
        "An empty data file.",
        as_file("rows.json", ""),
        value="empty|no record",
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "d3_broken_line",
        "A line that is no JSON.",
        as_file("rows.jsonl", with_line(18, '{"instruction": "Add 1 and 2.", "input": "", "output": "3')),
        value=r"not closed|unterminated|ends|broken|text that",
        where=r"rows\.jsonl.*line 18",
        remedy="to do:.*",
    ),
    Scenario(
        "d4_wrong_encoding",
        "Chinese text in GBK.",
        as_file(
            "rows.jsonl", lines([{**row, "output": row["output"] + "好的"} for row in alpaca_rows()]).encode("gbk")
        ),
        value=r"0x[0-9a-f]{2}|gbk|gb18030|utf-?8",
        where=r"rows\.jsonl.*line 1\b",
        remedy="to do:.*(utf-?8|iconv)",
    ),
    Scenario(
        "d5_missing_answer",
        "A record without an answer.",
        without("output"),
        value="missing",
        where=RECORD_17.format("output"),
        remedy="on_error: drop",
    ),
    Scenario(
        "d6_empty_answer",
        "A record with an empty answer.",
        field_of_17("output", "   "),
        value="empty",
        where=RECORD_17.format("output"),
        remedy="on_error: drop",
    ),
    Scenario(
        "d7_wrong_fields",
        "Fields that no format has.",
        lambda place: setattr(place, "rows", [{"frage": "Eins?", "antwort": r["output"]} for r in alpaca_rows()]),
        value="frage.*antwort",
        where=r"rows\.json",
        remedy="columns",
    ),
    Scenario(
        "d8_wrong_role",
        "A role that does not exist.",
        conversation(("user", "Hello."), ("asistant", "Good day.")),
        value="asistant",
        where=r"record 17 .*field 'messages",
        remedy="assistant",
    ),
    Scenario(
        "d9_wrong_order",
        "A conversation in which the assistant begins.",
        conversation(("assistant", "Hello."), ("user", "Good day."), ("user", "Are you there?")),
        value="assistant",
        where=r"record 17 .*field 'messages",
        remedy="to do:.*",
        may=("stopped", "handled"),
    ),
    Scenario(
        "d10_null_answer",
        "null for an answer.",
        field_of_17("output", None),
        value="null",
        where=RECORD_17.format("output"),
        remedy="on_error: drop",
    ),
    Scenario(
        "d11_duplicates",
        "25 of 85 records are there twice.",
        _duplicates,
        value=(r"\b25\b", "twice|duplicate|repeat|same"),
        where=r"rows\.json\S*(#|, record )\d+",
        remedy="to do:.*(dedup|remove|accept)",
    ),
    Scenario(
        "d12_number_answer",
        "A number for an answer.",
        field_of_17("output", 42),
        value=r"number 42|\b42\b",
        where=RECORD_17.format("output"),
        remedy="text",
    ),
    Scenario(
        "d13_all_too_long",
        "Every row is longer than the window.",
        _too_long,
        value=r"\b256\b",
        where=r"max_tokens|run\.yaml",
        remedy="to do:.*max_tokens",
    ),
    Scenario(
        "d14_eval_overlap",
        "The evaluation file holds 8 of the training rows.",
        _evaluation_overlap,
        value=r"\b8\b",
        where=(r"exam\.json", r"rows\.json"),
        remedy="to do:.*",
        may=("stopped", "handled"),
        proof=lambda place: overlap_was_dropped(place, 8),
    ),
    Scenario(
        "d15_fewer_than_batch",
        "Ten rows for a batch of 64.",
        _few_rows,
        value=(r"\b64\b", r"\b(8|10)\b"),
        where=r"run\.yaml:\d+|sft\.global_batch",
        remedy="to do:.*global_batch",
    ),
    Scenario(
        "d16_prompt_fills_window",
        "Prompts so long that no token of an answer is left.",
        _prompt_fills_window,
        value=r"answer|supervis|learn",
        where=r"max_tokens|rows\.json",
        remedy="to do:.*max_tokens",
    ),
    Scenario(
        "d17_special_tokens",
        "Answers that spell the end-of-text token.",
        field_of_all("output", "The end.</s> And on."),
        value="</s>",
        where=r"rows\.json\S*(#|, record )\d+",
        remedy="special_tokens_in_text",
    ),
    Scenario(
        "d18_mixed_formats",
        "Ten conversations in a file of instructions.",
        _mixed,
        value="messages|missing|format",
        where=r"rows\.json\S*, record 50",
        remedy="to do:.*",
    ),
    Scenario(
        "d19_dialogue_in_instruction",
        "Whole dialogues in the field instruction.",
        _dialogue_in_instruction,
        value="USER:|speaker|dialogue|role",
        where=r"rows\.json\S*(#|, record )\d+.*instruction|instruction.*rows\.json\S*(#|, record )\d+",
        remedy="to do:.*",
    ),
    Scenario(
        "d20_nan_answer",
        "NaN for an answer, as a table leaves it behind.",
        field_of_17("output", float("nan")),
        value="nan",
        where=r"rows\.json.*record 17",
        remedy="to do:.*",
    ),
    Scenario(
        "d21_prompts_only",
        "A file of instructions without a single answer.",
        lambda place: setattr(place, "rows", [{"instruction": r["instruction"]} for r in alpaca_rows()]),
        value="output|answer",
        where=r"rows\.json",
        remedy="to do:.*",
    ),
    Scenario(
        "d22_empty_turns",
        "A conversation without turns.",
        lambda place: setattr(place, "rows", [*chat_rows()[:17], {"messages": []}, *chat_rows()[18:]]),
        value="empty|no turns",
        where=r"rows\.json.*record 17.*field 'messages'",
        remedy="on_error: drop",
    ),
]


def overlap_was_dropped(place: Place, count: int) -> bool:
    """The ledger of the run lists so many training rows that are left out for the evaluation's sake."""
    path: Path = place.folder / "runs" / "tried" / "ledger.jsonl"
    if not path.is_file():
        return False
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sum(entry.get("reason") == "in_validation" for entry in entries) == count
