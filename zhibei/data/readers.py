"""Files as records: which reader a file needs, and the mixture of a run. Knows no tokens and no template.

`read_file` yields broken records among the good ones; `read_sources` acts on them as `data.on_error` says.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, Source
from zhibei.data.formats import FORMATS, Format
from zhibei.data.jsonlines import Row, Rows, excerpt, read_json
from zhibei.data.mix import copies
from zhibei.data.records import BrokenRecord, Fault, Origin, Record
from zhibei.data.sources import files_of
from zhibei.data.tables import read_csv, read_parquet, read_text

CONTAINERS: dict[str, Callable[[Path, str], Rows]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
}
"""Reader by suffix; .gz after it is unpacked (not Parquet, which is compressed inside)."""

SAMPLE_ROWS = 50
"""Rows looked at to recognise a format."""
COUNTED_AFTER_STOP = 20_000
"""After the first broken record, so many more rows are read to say how many others there are."""


@dataclass(frozen=True)
class OpenFile:
    """A file that was recognised: how it holds its rows, in which format, and its records."""

    source: str
    container: str
    format: str
    records: Iterator[Record | BrokenRecord]

    def __str__(self) -> str:
        return f"{self.source}: {self.container}, format {self.format}"


def suffix_of(path: Path) -> str:
    """The suffix that names the container, below .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_rows(path: Path, source: str) -> Rows:
    """The raw rows of one file, before any format."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(what, expected="a data file", fix="check the path", where=source)
    reader = CONTAINERS.get(suffix_of(path))
    if reader is None:
        known = ", ".join(CONTAINERS)
        raise UserError(
            f"unknown file type {path.suffix!r}",
            expected=f"one of {known} (.gz too)",
            fix="convert it (spreadsheets: save as CSV), or rename it if it is one of these under another name",
            where=source,
        )
    return reader(path, source)


def renamed(row: Any, columns: dict[str, str]) -> Any:
    """A row with its fields under our names. A field that is pushed aside stays as `file_<name>`."""
    if not isinstance(row, dict):
        return row
    row = dict(row)
    for ours, theirs in columns.items():
        if theirs in row:
            if ours in row and ours not in columns.values():
                row["file_" + ours] = row.pop(ours)
            row[ours] = row.pop(theirs)
    return row


def check_columns(sample: list[Any], columns: dict[str, str], source: str) -> None:
    """Raises UserError when a column that is to be renamed is in none of the first rows."""
    present = {name for row in sample if isinstance(row, dict) for name in row}
    for ours, theirs in columns.items():
        if sample and theirs not in present:
            near = difflib.get_close_matches(theirs, present, n=1)
            raise UserError(
                f"columns: {{{ours}: {theirs}}} names a field that is not in the file",
                expected=f"one of {', '.join(sorted(present))}",
                fix=f"did you mean {near[0]!r}?" if near else "correct the name",
                where=source,
            )


def recognise(sample: list[Any], source: str) -> Format:
    """The one format whose fields most of the rows have; UserError when none has, or several."""
    if not sample:
        raise UserError(
            "no record in the file can be read",
            expected="at least one sound record among the first",
            fix="name the format (format: …) and on_error: drop to see what is wrong with each",
            where=source,
        )
    hits = {name: sum(format.recognise(row) for row in sample) for name, format in FORMATS.items()}
    most = max(hits.values())
    best = [name for name, count in hits.items() if count == most]
    if most * 2 <= len(sample):
        raise unrecognised(sample, source)
    if len(best) > 1:
        raise UserError(
            f"the fields fit several formats: {', '.join(best)}",
            expected="fields of one format",
            fix=f"say which with format: {best[0]} (or {' or '.join(best[1:])})",
            where=source,
        )
    return FORMATS[best[0]]


def unrecognised(sample: list[Any], source: str) -> UserError:
    """No format fits: name the nearest one and the field that stands in its way."""
    shapes = Counter(tuple(row) if isinstance(row, dict) else (type(row).__name__,) for row in sample)
    fields = shapes.most_common(1)[0][0]
    if not isinstance(sample[0], dict) and not any(isinstance(row, dict) for row in sample):
        return UserError(
            f"records are {fields[0]} values ({excerpt(sample[0])}), not objects with fields",
            expected="objects with the fields of a format (zhibei data formats)",
            fix="write each record as an object",
            where=source,
        )
    fix = "name the fields with columns: {ours: theirs}, or give format: (zhibei data formats lists them)"
    for format in FORMATS.values():
        absent = [group.split("|") for group in format.needed if not set(group.split("|")) & set(fields)]
        if len(absent) == 1 and len(format.needed) > 1:
            near = [
                (name, close[0])
                for name in absent[0]
                if (close := difflib.get_close_matches(name, [f for f in fields if f not in format.fields], 1, 0.6))
            ]
            if near:
                ours, theirs = near[0]
                fix = f"this looks like {format.name} with {theirs!r} for {ours!r}: columns: {{{ours}: {theirs}}}"
                break
            fix = f"nearest is {format.name}, which needs {' or '.join(absent[0])} too: columns: {{{absent[0][0]}: …}}"
    return UserError(
        f"no format has the fields {excerpt(', '.join(fields), 200)}",
        expected="the fields of a format (zhibei data formats)",
        fix=fix,
        where=source,
    )


class _Reader:
    """Rows to records of one format; remembers which sets of fields it has seen."""

    def __init__(self, format: Format, columns: dict[str, str], source: str) -> None:
        self.format, self.columns, self.source = format, columns, source
        self.misspelt: dict[tuple[str, ...], Fault | None] = {}

    def __call__(self, rows: Iterator[Row | BrokenRecord]) -> Iterator[Record | BrokenRecord]:
        for row in rows:
            if isinstance(row, BrokenRecord):
                yield row
                continue
            origin = Origin(self.source, row.index, row.line)
            try:
                records = self._read(row.value, origin)
            except Fault as fault:
                yield fault.at(origin)
            else:
                yield from records

    def _read(self, value: Any, origin: Origin) -> list[Record]:
        if not isinstance(value, dict) and not (self.format.name == "sharegpt" and isinstance(value, list)):
            raise Fault("", f"{excerpt(value)} where a record is needed", expected=f"e.g. {self.format.example}")
        if isinstance(value, dict):
            value = renamed(value, self.columns) if self.columns else value
            fault = self._spelling(tuple(value))
            if fault:
                raise fault
        return self.format.read(value, origin)

    def _spelling(self, names: tuple[str, ...]) -> Fault | None:
        """A field that is nearly one of the format's, which the row lacks, would be ignored in silence."""
        if names in self.misspelt:
            return self.misspelt[names]
        found = None
        lacking = [
            f
            for group in (*self.format.needed, *self.format.optional)
            if not set(group.split("|")) & set(names)
            for f in group.split("|")
        ]
        for name in names:
            near = difflib.get_close_matches(name, lacking, n=1, cutoff=0.8) if name not in self.format.fields else []
            if near:
                found = Fault(
                    name,
                    f"unknown field, which looks like {near[0]!r}",
                    expected=f"fields of {self.format.name}: {', '.join(sorted(self.format.fields))}",
                    fix=f"columns: {{{near[0]}: {name}}}, or rename the field in the file",
                )
                break
        self.misspelt[names] = found
        return found


def open_file(
    path: str | Path, format: str = "auto", columns: dict[str, str] | None = None, *, label: str = ""
) -> OpenFile:
    """Recognises one file and gives its records, broken ones among them; nothing is read ahead but a sample.

    `label` is how messages name the file, when not by its path.

    Raises UserError when the file as a whole cannot be used: missing, empty, unknown format, wrong columns.
    """
    path, columns = Path(path), columns or {}
    source = label or str(path)
    if format != "auto" and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "zhibei data formats describes them"
        raise UserError(f"unknown format {format!r}", expected=", ".join(("auto", *FORMATS)), fix=hint, where=source)
    held = read_rows(path, source)
    head = list(itertools.islice(held.rows, SAMPLE_ROWS))
    if not head:
        raise UserError(
            "no records in the file", expected="at least one record", fix="give a file that has rows", where=source
        )
    sample = [row.value for row in head if isinstance(row, Row)]
    check_columns(sample, columns, source)
    if not sample and format == "auto":
        broken = [row for row in head if isinstance(row, BrokenRecord)]
        raise broken[0].as_error(f" (and no other of the first {len(head)} records can be read)")
    chosen = FORMATS[format] if format != "auto" else recognise([renamed(row, columns) for row in sample], source)
    unknown = [ours for ours in columns if ours not in chosen.fields]
    if unknown:
        raise UserError(
            f"columns: {unknown[0]!r} is no field of the format {chosen.name}",
            expected=f"one of {', '.join(sorted(chosen.fields))}",
            fix="rename to one of those, or give another format",
            where=source,
        )
    records = _Reader(chosen, columns, source)(itertools.chain(head, held.rows))
    return OpenFile(source, held.container, chosen.name, records)


def read_file(
    path: str | Path, format: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Record | BrokenRecord]:
    """The records of one file in order; a broken one is yielded where it stands, as BrokenRecord."""
    return open_file(path, format, columns).records


def as_source(source: Source | str) -> Source:
    return Source(path=source) if isinstance(source, str) else source


def read_source(source: Source, notice: Callable[[str], None] | None = None) -> Iterator[Record | BrokenRecord]:
    """All records of one source in order, each once: its files by name, its first `limit` records."""
    left = source.limit
    for path, label in files_of(source, notice):
        file = open_file(path, source.format, source.columns, label=label)
        if notice:
            notice(str(file))
        for record in file.records if left is None else itertools.islice(file.records, left):
            yield record
            left = None if left is None else left - 1
        if left == 0:
            return


def _stop(broken: BrokenRecord, following: Iterator[Record | BrokenRecord]) -> UserError:
    after = list(itertools.islice(following, COUNTED_AFTER_STOP))
    others = sum(isinstance(record, BrokenRecord) for record in after)
    some = "at least " if len(after) == COUNTED_AFTER_STOP else ""
    more = f" (and {some}{others} more broken records; on_error: drop leaves them out and lists them)" if others else ""
    return broken.as_error(more)


def read_sources(
    data: DataSection, *, notice: Callable[[str], None] | None = None
) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """The mixture of a run: (number of the source, record), source by source, each row as often as its weight says.

    With `on_error: stop` the first broken record raises UserError, which also says how many more there are; with
    `drop` broken records are yielded (once) for the ledger. A conversation's last user turns without an answer are
    cut off and kept under `extra["unanswered"]`, which belongs into the ledger as well. `notice` is told once per file
    which container and format were recognised. A weight below 1 leaves rows out by content hash: the user's wish, so
    they are not ledger entries. `validation` is not looked at: see `zhibei.data.mix.split_heldout`; a file given
    there is read with `read_sources(data.model_copy(update={"sources": [data.validation]}))`.
    """
    for number, source in enumerate(as_source(source) for source in data.sources):
        records = read_source(source, notice)
        is_empty = True
        for record in records:
            is_empty = False
            if isinstance(record, BrokenRecord):
                if data.on_error == "stop":
                    raise _stop(record, records)
                yield number, record
                continue
            for _ in range(1 if source.weight == 1 else copies(record, source.weight)):
                yield number, record
        if is_empty:
            raise UserError("no records", expected="at least one", fix="check the path", where=source.path)


def records_beyond_limits(data: DataSection) -> int:
    """How many records the files hold that a `limit` leaves out."""
    beyond = 0
    for source in map(as_source, data.sources):
        if source.limit is not None:
            held = sum(sum(1 for _ in read_rows(path, label).rows) for path, label in files_of(source))
            beyond += max(0, held - source.limit)
    return beyond
