"""What a tokenizer.model file says: pieces, their kinds, and the ids of its special tokens. Needs no sentencepiece.

The file is a protocol buffer (sentencepiece_model.proto): field 1 of the whole are pieces (1 text, 3 kind), field 2 is
the trainer's specification, whose fields 40 to 43 are the ids of unk, bos, eos and pad, by default 0, 1, 2 and -1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ID_FIELDS = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}


@dataclass(frozen=True, slots=True)
class SentencePieceFile:
    """`pieces[id]` is (text, kind); `special_ids` holds those of unk, bos, eos, pad that are set."""

    pieces: tuple[tuple[str, int], ...]
    special_ids: Mapping[str, int]


def read_sentencepiece(path: Path) -> SentencePieceFile | None:
    """The content of a tokenizer.model; None where the file is not one (tiktoken's merges have the same name)."""
    try:
        data = path.read_bytes()
        pieces: list[tuple[str, int]] = []
        ids = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                ids |= {ID_FIELDS[key]: _signed(one) for key, one in _fields(value) if key in ID_FIELDS}
    except (OSError, ValueError, IndexError):
        return None
    if not pieces:
        return None
    return SentencePieceFile(tuple(pieces), {name: key for name, key in ids.items() if 0 <= key < len(pieces)})


def _piece(data: bytes) -> tuple[str, int]:
    text, kind = "", NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, kind


def _signed(value: int | bytes) -> int:
    """Negative numbers are written as 64-bit complements."""
    if isinstance(value, bytes):
        raise ValueError("an id is a number")
    return value - 2**64 if value >= 2**63 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message; ValueError where the bytes are no message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError("no field has the number 0")
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, at = _varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(f"wire type {wire} at byte {at}")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def vocabulary_difference(file: SentencePieceFile, texts: Mapping[int, str]) -> str:
    """Whether the pieces are those of another vocabulary: an example where more than 1 in 100 differ, else "".

    `texts` maps ids to tokens as the fast tokenizer has them. Fine-tunes that give unused pieces a new meaning pass.
    """
    normal = [(number, text) for number, (text, kind) in enumerate(file.pieces) if kind == NORMAL]
    wrong = [(number, text) for number, text in normal if texts.get(number) != text]
    if len(wrong) <= len(normal) / 100:
        return ""
    number, text = wrong[0]
    return (
        f"{len(wrong):,} of {len(normal):,} pieces differ, e.g. id {number} is {text!r} in tokenizer.model and "
        f"{texts.get(number)!r} in tokenizer.json"
    )
