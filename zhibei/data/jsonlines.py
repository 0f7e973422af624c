"""JSON and JSONL files as rows with exact line numbers. Knows no field names and no formats.

The file's content decides how it is read, not its suffix: a list saved as .jsonl and lines saved as .json both work.
JSONL is streamed; a JSON list is held in memory as a whole.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zhibei.config.errors import UserError
from zhibei.data.records import BrokenRecord, Fault, Origin

HOLDERS = ("data", "rows", "instances", "train", "examples", "records", "samples", "items", "questions")
"""Keys under which an object usually holds the list of its records, likeliest first."""

WHITESPACE = re.compile(r"[ \t\n\r]*")
SPEAKERS = {"from", "role"}
BROKEN_LIST = object()
"""Stands for a list that begins but cannot be read to its end; its records are looked at one by one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as the file holds it. `index` counts from 0, `line` from 1 (None where files have no lines)."""

    index: int
    line: int | None
    value: Any


@dataclass(frozen=True)
class Rows:
    """The rows of a file and how it holds them, e.g. `a JSON list under "rows"`."""

    container: str
    rows: Iterator[Row | BrokenRecord]


def excerpt(value: Any, limit: int = 60) -> str:
    """A value as an error message shows it: on one line, at most `limit` characters of it."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Unfit(ValueError):
    """JSON that Python reads but that is not what was meant."""

    def __init__(self, what: str, expected: str, fix: str) -> None:
        super().__init__(what)
        self.expected, self.fix = expected, fix


def _no_constant(name: str) -> Any:
    raise _Unfit(f"{name} is not a JSON value", "a number, text or null", "write null or leave the field out")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Unfit(f"the key {excerpt(twice)!r} stands twice in one object", "each key once", "remove one of the two")
    return found


DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_each_key_once)
LENIENT = json.JSONDecoder()


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked when its name ends in .gz."""
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise UserError(
            f"the file cannot be read ({error.strerror or error})",
            expected="a readable file",
            fix="check its permissions",
            where=str(path),
        ) from None


def byte_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file without its byte order mark; a damaged .gz is the user's to repair."""
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file):
                yield check_mark(line, path) if number == 0 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"the compressed file cannot be unpacked ({error})",
            expected="a complete .gz file",
            fix="copy or download the file again; `gzip -t` checks it",
            where=str(path),
        ) from None


def check_mark(head: bytes, path: Path) -> bytes:
    """Strips a UTF-8 byte order mark; refuses UTF-16, which every editor can save differently."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            "the file is UTF-16",
            expected="UTF-8",
            fix=f"iconv -f UTF-16 -t UTF-8 {path} > new-file",
            where=str(path),
            pitfall="dataset-not-utf8",
        )
    return head.removeprefix(b"\xef\xbb\xbf")


def decode(line: bytes, *, offset: int) -> str:
    """UTF-8 to text; raises Fault with the byte's place in the file (`offset` is where `line` starts)."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        place, bad = error.start, line[error.start : error.start + 4]
    other = ""
    for encoding in ("gb18030", "cp1252"):
        try:
            line.decode(encoding)
        except UnicodeDecodeError:
            continue
        other = f" (as {encoding.upper()} the line is readable)"
        break
    raise Fault(
        "",
        f"byte {offset + place} ({bad[:1].hex()}) is not UTF-8{other}",
        expected="UTF-8",
        fix="convert the file, e.g. iconv -f GB18030 -t UTF-8; or on_error: drop",
        pitfall="dataset-not-utf8",
    )


def json_fault(error: ValueError | RecursionError, text: str) -> Fault:
    """What is wrong with a piece of invalid JSON, and how to put it right."""
    if not isinstance(error, json.JSONDecodeError):
        return Fault("", str(error), expected="a JSON number, string or null", fix="write null or leave the field out")
    near = excerpt(text[max(0, error.pos - 25) : error.pos + 25])
    said = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
    what = f"invalid JSON: {said} at column {error.colno} (near {near})"
    fix = "write the record with json.dumps"
    if text.strip() in ("{", "["):
        what, fix = "a record over several lines", "write each on one line, e.g. jq -c . in.jsonl > out.jsonl"
        return Fault("", what, expected="one complete JSON value per line", fix=fix)
    if re.match(r"\s*[\[{]\s*'", text) or text[error.pos : error.pos + 1] == "'":
        what, fix = f"single quotes where JSON has double quotes (near {near})", "write it with json.dumps, not str()"
    elif "escape" in error.msg:
        fix = r"a backslash in JSON text is written \\ (valid escapes: \n \t \" \\ \/ \b \f \r \uXXXX)"
    elif "control character" in error.msg:
        fix = r"write line breaks and tabs inside of strings as \n and \t"
    elif "Extra data" in error.msg:
        fix = "one record per line"
    elif not text[error.pos :].strip() or error.msg.startswith("Unterminated"):
        what = f"the record ends in the middle ({what})"
        fix = "was the file cut off while it was written or copied? Get it again, or on_error: drop"
    return Fault("", what, expected="one complete JSON value", fix=fix)


def read_lines(path: Path, source: str) -> Iterator[Row | BrokenRecord]:
    """One record per line, streamed. Blank lines are no records."""
    offset = index = 0
    for line_number, line in enumerate(byte_lines(path), start=1):
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        origin = Origin(source, index, line_number)
        index += 1
        text = ""
        try:
            text = decode(line, offset=start).strip()
            yield Row(origin.index, line_number, DECODER.decode(text))
        except Fault as fault:
            yield fault.at(origin)
        except ValueError as error:
            yield json_fault(error, text).at(origin)
        except RecursionError:
            yield Fault("", "nested too deeply", expected="at most a few hundred levels", fix="flatten it").at(origin)


class _Document:
    """A whole JSON file in memory; knows the line of any character."""

    def __init__(self, path: Path, source: str) -> None:
        data = check_mark(b"".join(byte_lines(path)), path)
        self.source = source
        self.text = data.decode("utf-8", errors="surrogateescape")
        self.is_clean = self.text.isascii() or not re.search("[\udc80-\udcff]", self.text)
        self._line, self._counted = 1, 0

    def line_at(self, position: int) -> int:
        """Line number of a character; cheap when asked in rising order."""
        if position < self._counted:
            self._line, self._counted = 1, 0
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def skip(self, position: int) -> int:
        return WHITESPACE.match(self.text, position).end()  # type: ignore[union-attr]

    def check_end(self, position: int) -> None:
        """Raises UserError when something follows the list or object, which would be left out in silence."""
        position = self.skip(position)
        if position < len(self.text):
            raise UserError(
                f"something follows the end of the JSON value: {excerpt(self.text[position : position + 60])}",
                expected="one list, or one record per line",
                fix=f"make one list of it, e.g. jq -s . {self.source} > new.json",
                where=f"{self.source} (line {self.line_at(position)})",
            )

    def elements(self, position: int, *, is_all: bool = False) -> Iterator[Row | BrokenRecord]:
        """The elements of the list whose `[` is at `position`; `is_all`: nothing may follow the list."""
        position = self.skip(position + 1)
        line_start = self.text.rfind("\n", 0, position)
        indent = self.text[line_start + 1 : position]
        index = 0
        if self.text[position : position + 1] == "]":
            return None
        while True:
            origin = Origin(self.source, index, self.line_at(position))
            try:
                found, end = self._decode(position, origin)
                position_after = self.skip(end)
                if self.text[position_after : position_after + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']' after the record", self.text, position_after)
            except json.JSONDecodeError as error:
                fault = json_fault(error, self.text)
                what = f"{fault.what}, line {self.line_at(error.pos)}"
                yield Fault("", what, expected=fault.expected, fix=fault.fix).at(origin)
                position = self._next_start(error, position, indent, origin)
                if position < 0:
                    return None
            else:
                yield found
                if self.text[position_after] == "]":
                    return self.check_end(position_after + 1) if is_all else None
                position = self.skip(position_after + 1)
            index += 1

    def _decode(self, start: int, origin: Origin) -> tuple[Row | BrokenRecord, int]:
        """The record that begins at a character, and where it ends. Raises JSONDecodeError for invalid JSON."""
        try:
            value, end = DECODER.raw_decode(self.text, start)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            return json_fault(error, "").at(origin), LENIENT.raw_decode(self.text, start)[1]
        except RecursionError:
            raise UserError(
                "nested too deeply", expected="at most a few hundred levels", fix="flatten it", where=str(origin)
            ) from None
        if not self.is_clean:
            piece = self.text[start:end].encode("utf-8", errors="surrogateescape")
            try:
                decode(piece, offset=len(self.text[:start].encode("utf-8", errors="surrogateescape")))
            except Fault as fault:
                return fault.at(origin), end
        return Row(origin.index, origin.line, value), end

    def _next_start(self, error: json.JSONDecodeError, start: int, indent: str, origin: Origin) -> int:
        """Where the next record begins after a broken one: a line that starts like the first record did.

        Raw line breaks cannot occur inside of JSON strings, so in a file with one record (or one brace) per line
        such a line is a record. Returns -1 at the end of the file.
        """
        from_here = max(error.pos, start + 1)
        if not indent.strip():
            found = re.compile(r"\n" + re.escape(indent) + r"(?=[\[{])").search(self.text, from_here)
            if found:
                return found.end()
        if not re.search(r"[\[{]", self.text[from_here:]):
            return -1
        raise UserError(
            f"invalid JSON, and the record after it cannot be found: {error}",
            expected="a list with each record on lines of its own",
            fix="repair the file at that place, or write it as JSONL (one record per line)",
            where=str(origin),
        )


def _members(document: _Document) -> dict[str, tuple[int, Any]]:
    """Top-level fields of an object: where each value starts, and the value."""
    found: dict[str, tuple[int, Any]] = {}
    position = document.skip(document.skip(0) + 1)
    while document.text[position : position + 1] == '"':
        key, position = DECODER.raw_decode(document.text, position)
        position = document.skip(document.skip(position) + 1)
        start = position
        try:
            value, position = DECODER.raw_decode(document.text, position)
        except ValueError:
            if document.text[start : start + 1] != "[":
                raise
            found[key] = (start, BROKEN_LIST)
            return found
        found[key] = (start, value)
        position = document.skip(position)
        if document.text[position : position + 1] != ",":
            break
        position = document.skip(position + 1)
    if document.text[position : position + 1] != "}":
        raise json.JSONDecodeError("Expecting ',' or '}'", document.text, position)
    document.check_end(position + 1)
    return found


def _holds_records(value: Any) -> bool:
    return value is BROKEN_LIST or (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, dict) for item in value[:5])
        and not SPEAKERS & set(value[0])
    )


def _is_column(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict)


def _unwrapped(rows: Iterator[Row | BrokenRecord]) -> Iterator[Row | BrokenRecord]:
    """The hub's viewer wraps each record as {"row_idx": 0, "row": {...}, "truncated_cells": []}."""
    for row in rows:
        if isinstance(row, Row) and isinstance(row.value, dict) and isinstance(row.value.get("row"), dict):
            yield Row(row.index, row.line, row.value["row"])
        else:
            yield row


def read_object(document: _Document, path: Path, source: str) -> Rows:
    """A top-level object: the list it holds under one of its keys, or a single record."""
    try:
        members = _members(document)
    except (ValueError, RecursionError) as error:
        place = document.line_at(error.pos) if isinstance(error, json.JSONDecodeError) else 1
        raise json_fault(error, document.text).at(Origin(source, 0, place)).as_error() from None
    lists = {key: start for key, (start, value) in members.items() if _holds_records(value)}
    lists = lists or {key: start for key, (start, value) in members.items() if value == [] and key in HOLDERS}
    for key in (*HOLDERS, *lists):
        if key in lists:
            return Rows(f'a JSON list under "{key}"', _unwrapped(document.elements(lists[key])))
    values = [value for _, value in members.values()]
    if len(values) > 1 and all(_is_column(value) for value in values) and len({len(value) for value in values}) == 1:
        raise UserError(
            f"the file holds columns ({', '.join(members)}), not records",
            expected="a list of records, or one record per line",
            fix='write it record-wise, e.g. pandas: to_json(path, orient="records", lines=True)',
            where=source,
        )
    whole = {key: value for key, (_, value) in members.items()}
    return Rows("a single JSON object", iter([Row(0, document.line_at(document.skip(0)), whole)]))


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, dict) and SPEAKERS & set(t) for t in value)


def read_json(path: Path, source: str) -> Rows:
    """Rows of a JSON or JSONL file, whichever the content is."""
    is_lines_name = ".jsonl" in path.suffixes or ".ndjson" in path.suffixes
    lines = (line.strip() for line in byte_lines(path))
    first = next((line for line in lines if line), b"")
    if not first:
        raise UserError(
            "the file is empty", expected="at least one record", fix="give a file that has records", where=source
        )
    has_more = any(lines)
    try:
        value = DECODER.decode(first.decode("utf-8"))
        is_complete = True
    except (ValueError, RecursionError):
        value, is_complete = None, False
    as_lines = Rows("JSON lines", read_lines(path, source))
    if is_complete and (has_more or (is_lines_name and (isinstance(value, dict) or _is_conversation(value)))):
        return as_lines
    is_pretty_object = first.startswith(b"{") and (first == b"{" or first.endswith((b",", b"[", b"{")))
    if first.startswith(b"[") or is_complete or is_pretty_object or (first.startswith(b"{") and not has_more):
        document = _Document(path, source)
        start = document.skip(0)
        if document.text[start] == "[":
            return Rows("a JSON list", document.elements(start, is_all=True))
        if document.text[start] == "{" and (is_complete or not is_lines_name):
            return read_object(document, path, source)
    return as_lines
