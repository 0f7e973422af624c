"""A file in one format as a file in another, without loss: every row is read back and compared. Knows no tokens."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from zhibei.config.errors import UserError
from zhibei.data.formats import FORMATS
from zhibei.data.readers import OpenFile, suffix_of
from zhibei.data.records import BrokenRecord, Fault, Origin, Preference, Record
from zhibei.data.writers import WRITERS

WRITABLE = (".json", ".jsonl", ".ndjson")


@dataclass
class Conversion:
    """What was written, and the broken records that were left out (only with on_error: drop)."""

    from_format: str
    to_format: str
    num_rows: int = 0
    left_out: list[BrokenRecord] = field(default_factory=list)


def convert(file: OpenFile, target: Path, *, to: str, drop: bool = False, force: bool = False) -> Conversion:
    """Writes the records of a file into `target` in the format `to`.

    Raises UserError, and leaves `target` as it was, when it exists already (without `force`), when a record is broken
    (without `drop`), or when a row cannot be held without loss.
    """
    _check_target(target, to, force)
    done = Conversion(file.format, to)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            with _open_text(temporary, target) as out:
                _write(out, _rows(file, done, drop), is_list=suffix_of(target) == ".json")
            if not done.num_rows:
                raise UserError(
                    "no record could be converted",
                    expected="at least one",
                    fix="look at the broken records",
                    where=file.source,
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the file ({error.strerror or error})",
            expected="a writable place",
            fix="check folder, permissions and free space",
            where=str(target),
        ) from None
    return done


def _check_target(target: Path, to: str, force: bool) -> None:
    if to not in WRITERS:
        raise UserError(
            f"cannot write the format {to!r}", expected=f"one of {', '.join(WRITERS)}", fix="choose one with --to"
        )
    if suffix_of(target) not in WRITABLE:
        raise UserError(
            f"cannot write {target.suffix or 'a file without a suffix'}",
            expected=f"a name ending in {', '.join(WRITABLE)} (.gz too)",
            fix="choose another name",
            where=str(target),
        )
    if target.exists() and (not force or target.is_dir()):
        raise UserError(
            "exists already",
            expected="a new name",
            fix="choose another name, or replace it with --force",
            where=str(target),
        )
    if not target.parent.is_dir():
        raise UserError(
            f"the folder {target.parent} does not exist",
            expected="an existing folder",
            fix=f"mkdir -p {target.parent}",
            where=str(target),
        )


def _open_text(temporary: Path, target: Path) -> IO[str]:
    if target.suffix == ".gz":
        return cast(IO[str], gzip.open(temporary, "xt", encoding="utf-8"))
    return temporary.open("x", encoding="utf-8", newline="\n")


def _write(out: IO[str], rows: Iterator[dict[str, Any]], *, is_list: bool) -> None:
    if not is_list:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    out.write("[")
    for number, row in enumerate(rows):
        text = json.dumps(row, ensure_ascii=False, indent=2).replace("\n", "\n  ")
        out.write(("," if number else "") + "\n  " + text)
    out.write("\n]\n")


def _rows(file: OpenFile, done: Conversion, drop: bool) -> Iterator[dict[str, Any]]:
    for record in file.records:
        if isinstance(record, BrokenRecord):
            if not drop:
                others = sum(isinstance(other, BrokenRecord) for other in file.records)
                raise record.as_error(
                    f" (and {others} more broken records; --drop leaves them out and lists them)" if others else ""
                )
            done.left_out.append(record)
            continue
        for row in to_rows(record, done.to_format):
            done.num_rows += 1
            yield row


def to_rows(record: Record, to: str) -> list[dict[str, Any]]:
    """The record as rows of a format, checked by reading them back. Raises UserError naming what cannot be held."""
    try:
        rows = WRITERS[to](record)
        json.dumps(rows, allow_nan=False)
        back = [copy for row in rows for copy in FORMATS[to].read(json.loads(json.dumps(row)), record.origin)]
    except Fault as fault:
        raise fault.at(record.origin).as_error() from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"a field that JSON cannot hold ({error})",
            expected="text, numbers, lists and objects",
            fix="remove the field, or write it as text",
            where=str(record.origin),
        ) from None
    if not (isinstance(record, Preference) and to == "kto") and not _equal(record, back):
        raise UserError(
            f"read back from {to}, the record would be another one: {_difference(record, back)}",
            expected=f"a record that {to} can hold",
            fix="choose another format (openai holds the most)",
            where=str(record.origin),
        )
    return rows


NOWHERE = Origin("", 0)


def same(record: Record) -> Record:
    """The record without its place and in plain JSON values, for comparison."""
    return replace(record, origin=NOWHERE, extra=json.loads(json.dumps(record.extra)))


def _equal(before: Record, after: list[Record]) -> bool:
    """A reference that a reader found in the answer's text (#### 42) is no field, and may appear on the way."""
    if len(after) != 1:
        return False
    first, second = same(before), same(after[0])
    if "reference" not in first.extra:
        second.extra.pop("reference", None)
    return first == second


def _difference(record: Record, back: list[Record]) -> str:
    if len(back) != 1 or type(back[0]) is not type(record):
        return f"{len(back)} records of another kind"
    before, after = same(record), same(back[0])
    names = [name for name in record.__dataclass_fields__ if getattr(before, name) != getattr(after, name)]
    return f"{', '.join(names)} would change"
