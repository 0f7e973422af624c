"""One chunk of pairs or judged answers to token ids, by the same steps as rows of supervised training.

Each side of a record becomes a conversation of its own, of which only the compared answer is learned, so masks,
terminators and limits are those of `encode`. Runs in worker processes: nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.encode import Chunk, Wording, encode_records, join_chunks, ledger_entry, row_id
from zhibei.data.records import STAGE_OF_KIND, Conversation, Judged, Preference, Record
from zhibei.data.remarks import Remark, asked_of, count, joined, said_hash, suspicions
from zhibei.text.messages import Message

Numbered = tuple[int, int, Record]
SIDES = {"pairs": ("chosen", "rejected"), "judged": ("answer",)}
KINDS: dict[type, str] = {Preference: "pairs", Judged: "judged"}


@dataclass
class AnswerChunk:
    """What became of some records. Row r of every side, of `asked` and of the columns belongs to one record.

    `remarks` count what was met in rows that were kept or dropped, with their first places.
    """

    kind: str
    sides: dict[str, Chunk]
    columns: dict[str, np.ndarray]
    asked: list[str]
    ledger: list[dict[str, Any]]
    num_read: int
    remarks: dict[str, Remark] = field(default_factory=dict)
    suspicious: dict[str, Remark] = field(default_factory=dict)


def encode_answers(numbered: Sequence[Numbered], wording: Wording) -> AnswerChunk:
    """Pairs or judged answers as tokens. A record is kept when every side of it is; what was cut or dropped is in the
    ledger once. UserError for records of another kind, and as `encode_records`."""
    kind = kind_of([record for _, _, record in numbered])
    parts = {name: encode_records(_sides(numbered, name), wording) for name in SIDES[kind]}
    common = sorted(set.intersection(*(set(chunk.facts["number"].tolist()) for chunk in parts.values())))
    ledger = _ledger(numbered, parts, kept=set(common))
    sides = {name: _only(chunk, common) for name, chunk in parts.items()}
    records = {number: record for number, _, record in numbered}
    chunk = AnswerChunk(
        kind=kind,
        sides=sides,
        columns=_columns([records[number] for number in common], list(sides.values())),
        asked=[said_hash(asked_of(prompt_of(records[number]))) for number in common],
        ledger=ledger,
        num_read=len(numbered),
        suspicious=suspicions(_preferred(records.values())),
    )
    if kind == "pairs":
        chunk.remarks = _remarks_of_pairs([records[number] for number in common], sides, wording=wording)
        chunk = _without_equal_pairs(chunk, [records[number] for number in common])
    else:
        chunk.remarks = _remarks_of_sides([records[number] for number in common], sides, wording=wording)
    return chunk


def kind_of(records: Sequence[Record]) -> str:
    """pairs or judged. Raises UserError for records that compare no answers, and for two kinds."""
    first = records[0]
    for record in records:
        if type(record) not in KINDS:
            what, fitting = STAGE_OF_KIND[type(record).__name__]
            raise UserError(
                f"the records are {what}, and this run compares answers",
                expected="pairs (chosen, rejected), or single answers with a label",
                fix=f"set stage: {fitting}, which they are made for, or name the fields with `columns`",
                where=str(record.origin),
                pitfall="records-of-another-stage",
            )
        if type(record) is not type(first):
            raise UserError(
                f"{STAGE_OF_KIND[type(record).__name__][0]} among {STAGE_OF_KIND[type(first).__name__][0]}",
                expected="one kind of record in all sources",
                fix="put them into two runs",
                where=str(record.origin),
                pitfall="records-of-another-stage",
            )
    return KINDS[type(first)]


def prompt_of(record: Record) -> tuple[Message, ...]:
    """What is asked, without the answers that are compared."""
    assert isinstance(record, (Preference, Judged))
    return record.prompt


def _preferred(records: Iterable[Record]) -> Iterator[Record]:
    """What the model is to learn from: the rejected answers are there because they are bad."""
    for record in records:
        if isinstance(record, Preference):
            yield _side(record, "chosen")
        elif isinstance(record, Judged) and record.is_good:
            yield _side(record, "answer")


def _sides(numbered: Sequence[Numbered], name: str) -> list[Numbered]:
    return [(number, source, _side(record, name)) for number, source, record in numbered]


def _side(record: Record, name: str) -> Conversation:
    """One side as a conversation in which the answers of the prompt are not learned."""
    assert isinstance(record, (Preference, Judged))
    prompt = tuple(replace(message, learn=False) for message in record.prompt)
    answer: tuple[Message, ...] = getattr(record, name)
    return Conversation(prompt + answer, record.origin)


def _ledger(numbered: Sequence[Numbered], parts: dict[str, Chunk], *, kept: set[int]) -> list[dict[str, Any]]:
    """One entry per dropped record, from the first side that lost it, and one per cut side of a kept record."""
    ids = {number: row_id(record.origin) for number, _, record in numbered}
    kept_ids = {ids[number] for number in kept}
    ledger, dropped = [], set()
    for name, chunk in parts.items():
        for entry in chunk.ledger:
            entry = entry | {"detail": f"{name}: {entry['detail']}" if len(parts) > 1 else entry["detail"]}
            if entry["reason"] == "nothing_learned":
                entry |= {"reason": "prompt_fills_window", "detail": f"{name}: the prompt leaves no room for an answer"}
            if entry["action"] != "dropped":
                ledger.extend([entry] if entry["row"] in kept_ids else [])
            elif entry["row"] not in dropped:
                dropped.add(entry["row"])
                ledger.append(entry)
    return ledger


def _only(chunk: Chunk, numbers: Sequence[int]) -> Chunk:
    """The rows with these running numbers."""
    wanted = np.isin(chunk.facts["number"], np.array(numbers, dtype=np.int64))
    return chosen_rows(chunk, wanted)


def chosen_rows(chunk: Chunk, wanted: np.ndarray) -> Chunk:
    """The rows that `wanted` (bool [R]) names, in their order; counts of what was read stay."""
    wanted_N = np.repeat(wanted, chunk.lengths)

    def some(values: list[str]) -> list[str]:
        return [value for value, is_wanted in zip(values, wanted, strict=True) if is_wanted]

    return replace(
        chunk,
        tokens=chunk.tokens[wanted_N],
        supervised=chunk.supervised[wanted_N],
        lengths=chunk.lengths[wanted],
        facts={name: column[wanted] for name, column in chunk.facts.items()},
        row_ids=some(chunk.row_ids),
        hashes=some(chunk.hashes),
        said=some(chunk.said),
        asked=some(chunk.asked),
        answered=some(chunk.answered),
    )


def _columns(records: Sequence[Record], sides: Sequence[Chunk]) -> dict[str, np.ndarray]:
    begins = [_first_supervised(chunk) for chunk in sides]
    columns = {"prompt_tokens": np.minimum.reduce(begins) if begins else np.zeros(0, dtype=np.int64)}
    margins = [record.margin for record in records if isinstance(record, Preference)]
    if len(sides) == 2:
        columns["margin"] = np.array([np.nan if margin is None else margin for margin in margins], dtype=np.float64)
    else:
        columns["is_good"] = np.array([record.is_good for record in records if isinstance(record, Judged)], dtype=bool)
    return columns


def _first_supervised(chunk: Chunk) -> np.ndarray:
    """int64 [R]: place in its row of each row's first supervised token."""
    borders = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int64)
    places = np.flatnonzero(chunk.supervised)
    first = places[np.searchsorted(places, borders[:-1])] if len(places) else borders[:-1]
    return first - borders[:-1]


def rows_in(chunk: Chunk) -> list[np.ndarray]:
    """The token ids of each row."""
    return np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1]) if len(chunk.lengths) else []


def places_of(records: Sequence[Record], hits: Sequence[bool] | np.ndarray, field: str = "") -> Remark:
    of = f", field '{field}'" if field else ""
    return count(f"{record.origin}{of}" for record, hit in zip(records, hits, strict=True) if hit)


def _remarks_of_sides(records: Sequence[Record], sides: dict[str, Chunk], *, wording: Wording) -> dict[str, Remark]:
    """BOS and terminators of each side, as the model will see them."""
    ends = wording.tokenizer.encode(wording.template.terminator) if wording.template.terminator.strip() else []
    found: list[dict[str, Remark]] = []
    for name, chunk in sides.items():
        rows = rows_in(chunk)
        tails = [row[-2 * len(ends) :].tolist() if ends else [] for row in rows]
        found.append(
            {
                "extra_bos": places_of(records, extra_bos(chunk, wording.tokenizer.bos_id), name),
                "extra_terminator": places_of(records, [bool(ends) and tail == ends * 2 for tail in tails], name),
                "missing_terminator": places_of(
                    records, chunk.facts["terminators_supervised"] < chunk.facts["answers"], name
                ),
            }
        )
    return joined(found)


def extra_bos(chunk: Chunk, bos: int | None) -> np.ndarray:
    """bool [R]: a BOS inside of the answer, or two at the beginning. Some templates write one before each question,
    so their number alone is no fault."""
    if bos is None:
        return np.zeros(len(chunk.lengths), dtype=bool)
    row_N = np.repeat(np.arange(len(chunk.lengths)), chunk.lengths)
    is_inside = np.bincount(row_N[(chunk.tokens == bos) & chunk.supervised], minlength=len(chunk.lengths)) > 0
    return is_inside | np.array([row[:2].tolist() == [bos, bos] for row in rows_in(chunk)], dtype=bool)


def _remarks_of_pairs(records: Sequence[Record], sides: dict[str, Chunk], *, wording: Wording) -> dict[str, Remark]:
    pairs = [record for record in records if isinstance(record, Preference)]
    plain = [(_squeezed(pair.chosen), _squeezed(pair.rejected)) for pair in pairs]
    return _remarks_of_sides(records, sides, wording=wording) | {
        "whitespace_only": places_of(records, [a == b for a, b in plain]),
        "negative_margin": places_of(records, [(pair.margin or 0.0) < 0 for pair in pairs], "margin"),
    }


def _squeezed(messages: Sequence[Message]) -> list[str]:
    return [" ".join(message.content.split()) for message in messages]


def _without_equal_pairs(chunk: AnswerChunk, records: Sequence[Record]) -> AnswerChunk:
    """Pairs whose two rows are the same tokens (the difference was cut off, or the tokenizer does not see it) teach
    nothing: their loss is ln 2 and their gradient zero."""
    rows = [rows_in(chunk.sides[name]) for name in ("chosen", "rejected")]
    differs = np.array([not np.array_equal(a, b) for a, b in zip(*rows, strict=True)], dtype=bool)
    if differs.all():
        return chunk
    detail = "both answers are the same tokens up to data.max_tokens"
    dropped = [
        ledger_entry(record.origin, action="dropped", reason="identical_after_cut", detail=detail)
        for record, is_pair in zip(records, differs, strict=True)
        if not is_pair
    ]
    gone = {entry["row"] for entry in dropped}
    return replace(
        chunk,
        sides={name: chosen_rows(side, differs) for name, side in chunk.sides.items()},
        columns={name: column[differs] for name, column in chunk.columns.items()},
        asked=[asked for asked, is_pair in zip(chunk.asked, differs, strict=True) if is_pair],
        ledger=[entry for entry in chunk.ledger if entry["row"] not in gone] + dropped,
        remarks=chunk.remarks | {"identical_after_cut": count(entry["where"] for entry in dropped)},
    )


def join_answers(chunks: Sequence[AnswerChunk]) -> AnswerChunk:
    """Chunks in their order as one. Raises UserError when they are of two kinds."""
    kinds = {chunk.kind for chunk in chunks}
    if len(kinds) > 1:
        raise UserError(
            f"the sources hold two kinds of records: {' and '.join(sorted(kinds))}",
            expected="one kind of record in all sources",
            fix="put them into two runs",
            where="data.sources",
            pitfall="records-of-another-stage",
        )
    return replace(
        chunks[0],
        sides={name: join_chunks([chunk.sides[name] for chunk in chunks]) for name in chunks[0].sides},
        columns={name: np.concatenate([chunk.columns[name] for chunk in chunks]) for name in chunks[0].columns},
        asked=[one for chunk in chunks for one in chunk.asked],
        ledger=[one for chunk in chunks for one in chunk.ledger],
        num_read=sum(chunk.num_read for chunk in chunks),
        remarks=joined(chunk.remarks for chunk in chunks),
        suspicious=joined(chunk.suspicious for chunk in chunks),
    )
