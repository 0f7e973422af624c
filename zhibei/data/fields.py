"""The single fields of a row: there or not, text or not, empty or not. Knows no formats and no files."""

from __future__ import annotations

import json
from typing import Any

from zhibei.data.jsonlines import excerpt
from zhibei.data.records import Fault


def type_name(value: Any) -> str:
    """A value's type as JSON calls it."""
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, (int, float)):
        return "number"
    names = {"NoneType": "null", "str": "text", "dict": "object", "list": "list"}
    return names.get(type(value).__name__, type(value).__name__)


def checked_text(value: Any, field: str, *, may_be_empty: bool = False) -> str:
    """A field that must be text; raises Fault for null, other types, emptiness and lone surrogates."""
    if not isinstance(value, str):
        what = "null" if value is None else f"{type_name(value)} {excerpt(value)}"
        raise Fault(
            field, f"{what} where text is needed", expected="text in quotes", fix="write it as text, or on_error: drop"
        )
    if not may_be_empty and not value.strip():
        raise Fault(field, "empty text", expected="some text", fix="fill it, remove the record, or on_error: drop")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            what = f"half of a surrogate pair ({half}) at character {error.start}"
            raise Fault(field, what, expected="valid Unicode") from None
    return value


def needs(row: Any, field: str) -> Any:
    """The value of a field that must be there."""
    if field not in row:
        raise Fault(
            field,
            f"missing; the record has {', '.join(row) or 'no fields'}",
            expected=f"a field '{field}'",
            fix="complete the record, on_error: drop, or rename with columns: {" + field + ": <name in the file>}",
        )
    return row[field]


def present_name(row: dict[str, Any], names: tuple[str, ...], usual: str) -> str:
    """The first of several spellings that the row has; raises Fault naming the usual one when it has none."""
    name = next((name for name in names if name in row), usual)
    needs(row, name)
    return name


def optional_text(row: dict[str, Any], field: str) -> str:
    """Text that may be missing, null or empty."""
    value = row.get(field)
    return "" if value is None else checked_text(value, field, may_be_empty=True)


def answer_text(row: dict[str, Any], field: str) -> str:
    """An answer to learn: there, text, and not empty."""
    value = needs(row, field)
    if isinstance(value, str) and not value.strip():
        raise Fault(
            field,
            "empty answer",
            expected="the text to learn",
            fix="fill it, remove the record, on_error: drop, or format: prompts to use its question only",
            pitfall="empty-answers",
        )
    return checked_text(value, field)


def first_present(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of several spellings that the row has, else the usual one."""
    return next((name for name in names if name in row), names[0])


def as_list(value: Any, field: str) -> list[Any]:
    """A list, also one that a CSV or Parquet cell holds as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Fault(
                field, f"invalid JSON in the cell: {error}", expected="a JSON list", fix="write it with json.dumps"
            ) from None
    if not isinstance(value, list):
        what = "null" if value is None else excerpt(value)
        raise Fault(field, f"{what} where a list of turns is needed", expected="a list of turns")
    if not value:
        raise Fault(
            field,
            "no turns (an empty list)",
            expected="at least one question and one answer",
            fix="remove the record, or on_error: drop",
        )
    return value


def rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    """The fields a reader did not use; kept for conversion."""
    return {name: value for name, value in row.items() if name not in used and value is not None}


def tools_text(row: dict[str, Any]) -> str:
    """The tools a conversation may call, as JSON text whatever the file held."""
    value = row.get("tools")
    if value is None or value == "" or value == []:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
