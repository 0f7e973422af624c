"""CSV, TSV, Parquet and plain text files as rows. Knows no field names and no formats."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.data.jsonlines import Row, Rows, byte_lines, decode, excerpt
from zhibei.data.records import BrokenRecord, Fault, Origin

MAX_CELL_CHARACTERS = 2**31 - 1
TEXT_PIECE_BYTES = 16 * 2**20
"""A text file beyond this becomes several records, cut at line ends, so that none needs much memory."""


def _delimiter(header: str, is_tsv: bool) -> str:
    if is_tsv or ("," not in header and "\t" in header):
        return "\t"
    return ";" if "," not in header and ";" in header else ","


class _Lines:
    """Decoded lines for csv.reader, remembering what was read and the first byte that is not UTF-8."""

    def __init__(self, path: Path) -> None:
        self.lines = byte_lines(path)
        self.count = self.offset = 0
        self.fault: Fault | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.count += 1
            start, self.offset = self.offset, self.offset + len(line)
            try:
                yield decode(line, offset=start)
            except Fault as fault:
                self.fault = fault
                yield line.decode("utf-8", errors="replace")


def _header(names: list[str], source: str) -> list[str]:
    names = [name.strip() for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        what = f"column {twice[0]!r} appears twice" if twice and twice[0] else "a column has no name"
        raise UserError(
            f"{what} in the header ({excerpt(', '.join(names))})",
            expected="a first line that names each column once",
            fix="repair the header line",
            where=f"{source} (line 1)",
        )
    return names


def _wrong_width(cells: list[str], names: list[str]) -> Fault:
    if len(cells) > len(names):
        what = f"{len(cells)} cells for {len(names)} columns; the first one too many holds {excerpt(cells[len(names)])}"
        fix = 'put cells that contain the delimiter in double quotes ("…"), quotes inside doubled ("")'
        return Fault(names[-1], what, expected=f"cells {', '.join(names)}", fix=fix)
    missing = names[len(cells)]
    what = f"{len(cells)} cells for {len(names)} columns; {missing!r} and what follows is missing"
    return Fault(missing, what, expected=f"cells {', '.join(names)}", fix="complete the line, or on_error: drop")


def read_csv(path: Path, source: str) -> Rows:
    """Rows of a CSV or TSV file with a header line; every cell is a string. Streamed."""
    head = next(iter(byte_lines(path)), b"")
    if not head.strip():
        raise UserError(
            "the file is empty", expected="a header line and rows", fix="give a file with rows", where=source
        )
    delimiter = _delimiter(head.decode("utf-8", errors="replace"), ".tsv" in path.suffixes)
    # The limit is the csv module's own global; its default of 131,072 characters is shorter than some answers.
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    name = {",": "CSV", "\t": "tab-separated values", ";": "semicolon-separated values"}[delimiter]
    return Rows(name, _csv_rows(path, source, delimiter))


def _csv_rows(path: Path, source: str, delimiter: str) -> Iterator[Row | BrokenRecord]:
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    index = 0
    while True:
        start = lines.count + 1
        origin = Origin(source, index, start)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = 'close the quotes of that record ("…"), and double quotes inside of cells ("")'
            yield Fault("", f"invalid CSV: {error}", expected="complete quoted cells", fix=fix).at(origin)
            index += 1
            continue
        fault, lines.fault = lines.fault, None
        if not names:
            if fault:
                raise fault.at(origin).as_error()
            names = _header(cells, source)
            continue
        if not cells:
            continue
        if fault is None and len(cells) != len(names):
            fault = _wrong_width(cells, names)
        yield fault.at(origin) if fault else Row(index, start, dict(zip(names, cells, strict=True)))
        index += 1


def read_parquet(path: Path, source: str) -> Rows:
    """Rows of a Parquet file, a thousand at a time."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "reading Parquet needs pyarrow", expected="pyarrow", fix="pip install 'zhibei[data]'", where=source
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(
            f"not a readable Parquet file ({excerpt(str(error))})",
            expected="a complete Parquet file",
            fix="download or write the file again",
            where=source,
        ) from None
    return Rows("Parquet", _parquet_rows(file, source))


def _parquet_rows(file: Any, source: str) -> Iterator[Row | BrokenRecord]:
    import pyarrow as arrow

    index = 0
    try:
        for batch in file.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                yield Row(index, None, value)
                index += 1
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the Parquet file is damaged after record {index - 1} ({excerpt(str(error))})",
            expected="a complete Parquet file",
            fix="download or write the file again",
            where=source,
        ) from None


def read_text(path: Path, source: str) -> Rows:
    """A text file is one record (several, cut at line ends, when it is very long)."""
    return Rows("a text file", _text_rows(path, source))


def _text_rows(path: Path, source: str) -> Iterator[Row | BrokenRecord]:
    piece: list[str] = []
    piece_bytes = offset = index = 0
    first_line = 1
    for number, line in enumerate(byte_lines(path), start=1):
        try:
            piece.append(decode(line, offset=offset))
        except Fault as fault:
            yield fault.at(Origin(source, index, number))
        offset += len(line)
        piece_bytes += len(line)
        if piece_bytes >= TEXT_PIECE_BYTES:
            yield Row(index, first_line, {"text": "".join(piece)})
            piece, piece_bytes, index, first_line = [], 0, index + 1, number + 1
    if piece:
        yield Row(index, first_line, {"text": "".join(piece)})
