"""From a log or traceback, ours or another program's, to the pitfall behind it. Knows no single pitfall by its words.

The first root cause wins: an error names the cause; what follows from it in other ranks and launchers (a watchdog's
time-out, `returned non-zero exit status 1`) is a consequence; warnings count when nothing worse is there.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

from zhibei.doctor.error_patterns import ErrorPattern, PatternIndex, same_quotes
from zhibei.doctor.log_figures import record_of
from zhibei.doctor.log_lines import LOOK_AHEAD, Piece, open_log, owner_of, read_pieces, shown, without_owner
from zhibei.doctor.pitfall import Pitfall
from zhibei.doctor.resemblance import resembling
from zhibei.doctor.verdict import EXCEPTION, Evidence, Explanation, Force, Gathered, OwnMessage, judge

HITS_PER_PIECE = 1000
"""So many places of one literal are tried per piece of two megabytes."""
EVIDENCE_KEPT = 20
NAME_WEIGHT = 1000
RECORDS_READ = 5000
"""After so many metric records, those that differ from earlier ones only in digits are read one in sixteen."""

WARNING = re.compile(r"\bwarn(?:ing)?\b|Warning[:(]|^\[?W[\d ]|\bWARN\b", re.IGNORECASE)
TROUBLE = re.compile(
    r"error|fail|fatal|abort|assert|kill|exit|refus|cannot|can't|could not|couldn't|no route|exceed|time[d ]?-?out"
    r"|core dumped|no space|unable|invalid|not found|mismatch|NCCL WARN|unsupported|not supported|undefined symbol",
    re.IGNORECASE,
)
EXIT_CODE = re.compile(
    r"exit ?code|return code|signal \d+|\bSIG[A-Z]{3,5}\b|core dumped|^Killed|: Killed", re.IGNORECASE
)
NAMED_BY_US = re.compile(r"zhibei pitfalls ([a-z][a-z0-9-]+)|'pitfall': ?'([a-z][a-z0-9-]+)'")
HEADING = re.compile(r"^(STOP|WARNING|NOTE) ([a-z0-9-]+)")
"""How `zhibei check` heads a finding."""
FIGURES = re.compile(rb"[lL]oss(?:es|/\w+|[ _]scale)?[^a-zA-Z]{1,6}[-+\dnNi]|kl[\w ]*['\" ]*[:=]|margins?['\" ]*[:=]")
CHAIN = re.compile(r"another exception occurred:|direct cause of the following exception:")
FRAME = re.compile(r"^(?:│ )?File ['\"].*['\"], line \d+")
INFORMATION = re.compile(r"\b(?:INFO|DEBUG)\b")

MARKS = (
    b"error", b"exception", b"stopiteration", b"interrupt", b"timeout", b"to do:", b"core dumped", b"killed",
    b"pitfall",
)  # fmt: skip
"""What may announce an exception, a message of ours, or a resumed run."""


def explain_file(path: Path, catalogue: Mapping[str, Pitfall]) -> Explanation:
    """What went wrong according to a log. Raises UserError when the file cannot be read."""
    with open_log(path) as stream:
        return explain_stream(stream, str(path), catalogue)


def explain_stream(stream: BinaryIO, name: str, catalogue: Mapping[str, Pitfall]) -> Explanation:
    """The same for standard input or any open binary file, read once from where it stands."""
    index = PatternIndex({one.id: one.errors for one in catalogue.values()})
    found = Gathered(frozenset(catalogue))
    opening = b""
    for piece in read_pieces(stream, name):
        _read_figures(piece, found)
        _search(piece, index, found)
        found.num_lines = piece.numbers[-1] if piece.numbers else found.num_lines
        found.num_bytes += sum(map(len, piece.lines[piece.start : piece.stop])) + piece.stop - piece.start
        opening = opening or b"\n".join(piece.lines[:20])[:4000]
    explanation = judge(name, found, catalogue)
    if explanation.cause or explanation.own or found.records_seen:
        return explanation
    description = opening.decode("utf-8", "replace") if found.num_bytes < len(opening) + 20 else ""
    return replace(explanation, resembling=tuple(resembling(description, catalogue)))


def _read_figures(piece: Piece, found: Gathered) -> None:
    lines, is_repeat = piece.lines, piece.is_repeat
    for index in range(piece.start, piece.stop):
        line = lines[index]
        if (b"oss" in line or b"kl" in line or b"argins" in line) and FIGURES.search(line):
            if is_repeat[index] and found.records_seen > RECORDS_READ and index & 15:
                continue
            if record := record_of(piece.numbers[index], shown(line)):
                found.records_seen += 1
                found.figures.see(record)
        elif b"esum" in line and len(line) < 400:
            found.figures.resumed(piece.numbers[index])


def _search(piece: Piece, index: PatternIndex, found: Gathered) -> None:
    """Every pattern in every line that is not a repeat."""
    read = [number for number in range(piece.start, piece.stop) if not piece.is_repeat[number]]
    if not read:
        return
    blob = b"\n".join([piece.lines[number] for number in read]).lower()
    starts = _line_starts(piece, read)
    texts: dict[int, str] = {}
    tried: set[tuple[int, int]] = set()
    for literal, patterns in index.due_in(blob):
        for line in _places(blob, literal, starts, read):
            for pattern in patterns:
                if len(found.evidence.get(pattern.owner, ())) < EVIDENCE_KEPT and (line, id(pattern)) not in tried:
                    tried.add((line, id(pattern)))
                    _try_pattern(pattern, literal, piece, line, texts, found)
    for pattern in index.everywhere:
        for line in read:
            _try_pattern(pattern, b"", piece, line, texts, found)
    marked = sorted({line for mark in MARKS for line in _places(blob, mark, starts, read)})
    for line in marked:
        _note_error(piece, line, texts, found)


def _line_starts(piece: Piece, read: list[int]) -> list[int]:
    starts, offset = [], 0
    for number in read:
        starts.append(offset)
        offset += len(piece.lines[number]) + 1
    return starts


def _places(blob: bytes, literal: bytes, starts: list[int], read: list[int]) -> Iterator[int]:
    """Lines in which the literal stands."""
    place = blob.find(literal)
    for _ in range(HITS_PER_PIECE):
        if place < 0:
            return
        order = bisect_right(starts, place) - 1
        yield read[order]
        if order + 1 >= len(starts):
            return
        place = blob.find(literal, starts[order + 1])


def _text(piece: Piece, line: int, texts: dict[int, str]) -> str:
    """A line as patterns see it."""
    if line not in texts:
        texts[line] = same_quotes(_original(piece, line))
    return texts[line]


def _original(piece: Piece, line: int) -> str:
    return without_owner(shown(piece.lines[line]))


def _try_pattern(
    pattern: ErrorPattern, literal: bytes, piece: Piece, line: int, texts: dict[int, str], found: Gathered
) -> None:
    text = _text(piece, line, texts)
    first = last = line
    match = pattern.regex.search(text)
    if match is None and pattern.spans_lines:
        members = _window(piece, line)
        joined = "\n".join(_text(piece, one, texts) for one in members)
        match = pattern.regex.search(joined)
        if match is not None:
            first = members[joined.count("\n", 0, match.start())]
            last = members[joined.count("\n", 0, max(match.start(), match.end() - 1))]
    elif match is None and text[:1] in "│|":
        members = [one for one in range(line, min(line + 4, len(piece.lines)))]
        joined = " ".join(_text(piece, one, texts).strip("│| ") for one in members)
        match = pattern.regex.search(joined)
    if match is None:
        return
    shown_at = last if EXCEPTION.search(_text(piece, last, texts)) else first
    original = _original(piece, shown_at)
    weight = len(literal) + (20 if first != last else 0) + sum(map(str.isalpha, pattern.regex.pattern)) / 1000
    evidence = Evidence(piece.numbers[shown_at], original[:600], force_of(original), weight)
    kept = found.evidence.setdefault(pattern.owner, [])
    same = next((number for number, one in enumerate(kept) if one.line == evidence.line), None)
    if same is None:
        kept.append(evidence)
    elif evidence.weight > kept[same].weight:
        kept[same] = evidence


def _window(piece: Piece, line: int) -> list[int]:
    """The lines around one that the same rank wrote."""
    owner = owner_of(piece.lines[line])
    around = range(max(0, line - LOOK_AHEAD), min(len(piece.lines), line + LOOK_AHEAD))
    return [one for one in around if owner_of(piece.lines[one]) == owner]


def force_of(text: str) -> Force:
    """How much a line says by itself: an error, the exit code of a process, a warning, or neither."""
    exception = EXCEPTION.search(text)
    if exception and not exception.group(1).endswith("Warning"):
        return "error"
    if FRAME.match(text):
        return "frame"
    if "NCCL WARN" in text:
        return "error"
    if WARNING.search(text):
        return "warning"
    if EXIT_CODE.search(text):
        return "exit"
    if INFORMATION.search(text):
        return "plain"
    return "error" if TROUBLE.search(text) else "plain"


def _note_error(piece: Piece, line: int, texts: dict[int, str], found: Gathered) -> None:
    """Remember exceptions, crashes and messages of ours, so that what nobody knows is not passed over."""
    text = _text(piece, line, texts)
    if text.startswith("to do:") and line >= 2:
        expected = _text(piece, line - 1, texts)
        if expected.startswith("expected:"):
            what, wanted, fix = _text(piece, line - 2, texts), expected[9:].strip(), text[6:].strip()
            found.own.append(OwnMessage(piece.numbers[line - 2], what, wanted, fix))
    if CHAIN.search(text):
        found.chains.append(piece.numbers[line])
    for said in NAMED_BY_US.finditer(text):
        if (name := said.group(1) or said.group(2)) in found.names:
            _note_name(piece, line, name, texts, found)
    kind: Literal["error", "exit"] = "error" if EXCEPTION.search(text) else "exit"
    crashed = re.search(r"core dumped|segmentation fault|^killed\b|: killed\b", text, re.IGNORECASE)
    if (kind == "error" or crashed) and not WARNING.search(text) and len(found.errors) < 200:
        found.errors.append(Evidence(piece.numbers[line], text[:600], kind))


def _note_name(piece: Piece, line: int, name: str, texts: dict[int, str], found: Gathered) -> None:
    """A finding of ours names its pitfall; its heading says how bad it is."""
    is_error = True
    for before in range(line, max(-1, line - 30), -1):
        heading = HEADING.match(_text(piece, before, texts))
        if heading and heading.group(2) == name:
            line, is_error = before, heading.group(1) == "STOP"
            break
    text = _original(piece, line)[:600]
    evidence = Evidence(piece.numbers[line], text, "error" if is_error else "warning", NAME_WEIGHT)
    found.evidence.setdefault(name, []).insert(0, evidence)
