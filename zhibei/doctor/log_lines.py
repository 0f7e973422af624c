"""The lines of a log of any size, as editors number them, without colours and progress-bar residue. Knows no error.

A log comes in pieces, so hundreds of megabytes need no memory. Lines that differ only in their digits are one shape;
all but the first of a shape are marked as repeats, so that a million lines of metrics cost what sixty cost.
"""

from __future__ import annotations

import codecs
import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zhibei.config.errors import UserError

PIECE_BYTES = 2**21
LONGEST_LINE = 8192
"""Longer lines are taken in parts: a pattern is never searched in megabytes."""
PART_OVERLAP = 512
REPEATS_READ = 64
"""So many lines of one shape are read in full; an error among more than that differs from them in its words."""
SHAPES_KEPT = 300_000
LOOK_AHEAD = 60
"""Lines kept back until what follows them is known; a traceback is rarely longer."""
LOOK_BACK = 80

ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
DIGITS = b"0123456789."
COLLECTED = re.compile(rb"exit|code|signal|status", re.IGNORECASE)
"""Where the number is the message, repeats are read too."""
RANK_PREFIX = re.compile(
    r"^(?:\[(?:rank|default)\d+\]:\s?|\(\w[\w.]* (?:rank=\d+ )?pid=\d+[^)]*\)\s?|\[\d+,\d+\]<std(?:err|out)>:\s?"
    r"|\[[\w.-]+:\d+:\d+\]\s|\d{1,4}: )"
)
"""torchrun, Ray, mpirun, srun -l: whose line it is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive lines. `start` is the first one not seen before; those ahead of it and after `stop` are context."""

    lines: list[bytes]
    numbers: list[int]
    is_repeat: list[bool]
    start: int
    stop: int


def open_log(path: Path) -> BinaryIO:
    """A log, unpacked if it is gzip. Raises UserError when it is missing, a folder, or not ours to read."""
    wanted = "a log or a saved traceback"
    if path.is_dir():
        logs = sorted(one.name for one in path.iterdir() if one.suffix in (".log", ".txt", ".out", ".err"))
        fix = f"zhibei explain {path / logs[0]}" if logs else "name the file with the messages in it"
        raise UserError(f"{path} is a folder", expected=wanted, fix=fix, where=str(path))
    try:
        file = path.open("rb")
        magic = file.read(2)
        file.seek(0)
        return gzip.open(path, "rb") if magic == b"\x1f\x8b" else file  # type: ignore[return-value]
    except FileNotFoundError:
        fix = "check the path, or pipe the messages:  command 2>&1 | zhibei explain -"
        raise UserError("there is no such file", expected=wanted, fix=fix, where=str(path)) from None
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "make it readable, or copy it elsewhere first"
        raise UserError(f"it cannot be read: {reason}", expected=wanted, fix=fix, where=str(path)) from None


def read_pieces(stream: BinaryIO, name: str) -> Iterator[Piece]:
    """The log in pieces with context on both sides. Raises UserError when reading fails midway."""
    lines: list[bytes] = []
    numbers: list[int] = []
    is_repeat: list[bool] = []
    shapes: dict[int, int] = {}
    start, line_number = 0, 1
    for text, is_last in _whole_lines(_decoded(_chunks(stream, name))):
        line_number = _append_lines(text, line_number, lines, numbers)
        _mark_repeats(lines, is_repeat, shapes)
        stop = len(lines) if is_last else max(start, len(lines) - LOOK_AHEAD)
        yield Piece(lines, numbers, is_repeat, start, stop)
        keep = max(0, stop - LOOK_BACK)
        lines, numbers, is_repeat, start = lines[keep:], numbers[keep:], is_repeat[keep:], stop - keep


def _chunks(stream: BinaryIO, name: str) -> Iterator[bytes]:
    while True:
        try:
            # A pipe gives what it has; a reader of a live log need not wait for two megabytes.
            chunk = stream.read(PIECE_BYTES)
        except (OSError, EOFError) as error:  # gzip raises EOFError for a torn file
            what = f"reading it failed: {error}"
            raise UserError(
                what, expected="a file that can be read to its end", fix="copy it again", where=name
            ) from None
        if not chunk:
            return
        yield chunk


def _decoded(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """UTF-8 whatever came: UTF-16 (what PowerShell's `>` writes) is turned, other bytes are left as they are."""
    decoder: codecs.IncrementalDecoder | None = None
    for index, chunk in enumerate(chunks):
        if index == 0 and (encoding := _wide_encoding(chunk)):
            decoder = codecs.getincrementaldecoder(encoding)("replace")
        if index == 0:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        yield decoder.decode(chunk).encode("utf-8", "replace") if decoder else chunk


def _wide_encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = head[:4096]
    if len(sample) >= 8 and sample[1::2].count(0) > 0.4 * len(sample[1::2]) and sample[::2].count(0) == 0:
        return "utf-16-le"
    return ""


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Chunks cut at line ends; True with the last one, which may be empty."""
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        end = max(text.rfind(b"\n"), text.rfind(b"\r", 0, -1)) + 1
        if end == 0 and len(text) > PIECE_BYTES:  # one endless line
            end = len(text)
        if end:
            yield text[:end], False
        rest = text[end:]
    yield rest, True


def _append_lines(text: bytes, line_number: int, lines: list[bytes], numbers: list[int]) -> int:
    """Split text into lines; what a carriage return overwrote counts as the same line. The number of the next line."""
    if b"\x1b" in text:
        text = ANSI.sub(b"", text)
    if b"\0" in text:
        text = text.replace(b"\0", b"")
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    parts = text.split(b"\n")
    next_number = line_number + len(parts) - 1
    if not parts[-1]:
        parts.pop()
    if b"\r" not in text and len(max(parts, key=len, default=b"")) <= LONGEST_LINE:
        lines += parts
        numbers += range(line_number, line_number + len(parts))
        return next_number
    for number, part in enumerate(parts, line_number):
        for shown in part.split(b"\r") if b"\r" in part else (part,):
            for offset in range(0, max(1, len(shown)), LONGEST_LINE - PART_OVERLAP):
                lines.append(shown[offset : offset + LONGEST_LINE])
                numbers.append(number)
    return next_number


def _mark_repeats(lines: list[bytes], is_repeat: list[bool], shapes: dict[int, int]) -> None:
    """Extend is_repeat to the lines that are new."""
    if len(shapes) > SHAPES_KEPT:
        shapes.clear()
    new = lines[len(is_repeat) :]
    for shape in b"\n".join(new).translate(None, DIGITS).split(b"\n") if new else ():
        key = hash(shape)
        count = shapes.get(key, 0)
        is_repeat.append(count == REPEATS_READ)
        if 0 <= count < REPEATS_READ:
            is_due = count + 1 == REPEATS_READ
            shapes[key] = -1 if is_due and COLLECTED.search(shape) else count + 1


def shown(line: bytes) -> str:
    """A line as text, one space between words, so that patterns need not know how it was padded."""
    return " ".join(line.decode("utf-8", "replace").split())


def owner_of(line: bytes) -> str:
    """The rank prefix of a line, "" without one."""
    match = RANK_PREFIX.match(line[:120].decode("utf-8", "replace"))
    return match.group().strip() if match else ""


def without_owner(text: str) -> str:
    return RANK_PREFIX.sub("", text, count=1)
