"""One chunk of records to token ids, masks and facts for the audit. Knows no files, processes or cache.

Runs in worker processes: nothing here may import torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.chunks import split_text
from zhibei.data.mix import content_hash
from zhibei.data.records import STAGE_OF_KIND, Conversation, Origin, PlainText, Record
from zhibei.data.remarks import Remark, asked_of, joined, last_answer_of, said_hash, suspicions
from zhibei.text.messages import Message
from zhibei.text.supervision import Layout, Mode, border_merges, lay_out, learned_intervals, supervised_tokens
from zhibei.text.template import Rendered, Span, Template
from zhibei.text.tokenizer import Encoded, Tokenizer

# Prompt equality is checked on the first rows and on a share of the others: it costs a second rendering of each.
CHECKED_FIRST = 50
CHECKED_EVERY = 50

# Dimensions: N tokens, R rows, I ranges of characters.


@dataclass(frozen=True)
class Wording:
    """All that decides which tokens a record becomes and which of them are learned."""

    tokenizer: Tokenizer
    template: Template
    system: str | None
    max_tokens: int
    too_long: Literal["drop", "cut", "stop"]
    supervise: Mode
    special_tokens_in_text: Literal["drop", "stop", "keep"]
    on_error: Literal["stop", "drop"]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.tokenizer.special_strings)) or r"(?!)")

    @cached_property
    def special_first_characters(self) -> tuple[str, ...]:
        return tuple({token[0] for token in self.tokenizer.special_strings if token})

    def special_in(self, text: str) -> str:
        """The first special token that a text spells, or ""."""
        if not any(first in text for first in self.special_first_characters):
            return ""
        found = self.special_pattern.search(text)
        return found[0] if found else ""


FACTS = (
    "number",
    "source",
    "tokens",
    "tokens_before_cut",
    "supervised",
    "bos",
    "unk",
    "border_merges",
    "answers",
    "terminators",
    "terminators_supervised",
    "special",
    "continues",
)
"""`number`: the running number of the record. `continues`: a later chunk of a long text, which begins without BOS."""


@dataclass
class Chunk:
    """What became of some records, in their order. `facts` holds one int64 [R] per name in FACTS."""

    tokens: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    facts: dict[str, np.ndarray]
    row_ids: list[str]
    hashes: list[str]
    ledger: list[dict[str, Any]]
    num_read: int
    prompts: dict[str, int] = field(default_factory=dict)
    """How many prompts were compared with the row they belong to: `equal`, `merged`, `different`."""
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """Hashes of what each row says, of its question and its last answer alone ("" for plain text); see `remarks`."""
    suspicious: dict[str, Remark] = field(default_factory=dict)


@dataclass
class _Row:
    """A record that has become text."""

    number: int
    source: int
    origin: Origin
    text: str
    spans: tuple[Span, ...]
    digest: str
    is_plain: bool
    has_special: bool
    messages: tuple[Message, ...] = ()
    tools: str = ""

    @property
    def id(self) -> str:
        return row_id(self.origin)


def row_id(origin: Origin) -> str:
    """How a row is named in audits, ledgers and stops: `source#record`."""
    return f"{origin.source}#{origin.index}"


def ledger_entry(origin: Origin, *, action: str, reason: str, detail: str) -> dict[str, Any]:
    return {"row": row_id(origin), "where": str(origin), "action": action, "reason": reason, "detail": detail}


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The messages, with the run's system prompt in front where the conversation has none."""
    if system is None or (messages and messages[0].role == "system"):
        return tuple(messages)
    return (Message("system", system), *messages)


def render_record(record: Record, wording: Wording) -> tuple[Rendered, tuple[Message, ...]]:
    """The text a record becomes, and the messages it was rendered from (none for plain text)."""
    if isinstance(record, PlainText):
        tokenizer = wording.tokenizer
        bos = tokenizer.bos if tokenizer.adds_bos else ""
        text = bos + record.text + tokenizer.eos
        whole = Span(len(bos), len(text), "assistant", 0, "content")
        return Rendered(text, (whole,)), ()
    if isinstance(record, Conversation):
        messages = with_system(record.messages, wording.system)
        return wording.template.render(messages, tools=record.tools), messages
    what, stage = STAGE_OF_KIND[type(record).__name__]
    raise UserError(
        f"the records are {what}, and stage: sft imitates answers",
        expected="conversations, instructions with an output, or plain text",
        fix=f"set stage: {stage}, which they are made for, or name the fields with `columns`",
        where=str(record.origin),
        pitfall="records-of-another-stage",
    )


def encode_rows(numbered: Sequence[tuple[int, int, Record]], wording: Wording) -> Chunk:
    """`encode_records`, and what the rules of `clean` find in the records."""
    return replace(encode_records(numbered, wording), suspicious=suspicions(record for _, _, record in numbered))


def encode_records(numbered: Sequence[tuple[int, int, Record]], wording: Wording) -> Chunk:
    """`numbered` holds (running number, number of the source, record)."""
    ledger: list[dict[str, Any]] = []
    rows: list[_Row] = []
    checked: list[int] = []
    for number, source, record in numbered:
        row = _to_row(number, source, record, wording=wording, ledger=ledger)
        if row is None:
            continue
        if number < CHECKED_FIRST or number % CHECKED_EVERY == 0:
            checked.append(len(rows))
        rows.append(row)
    encoded = wording.tokenizer.encode_batch([row.text for row in rows])
    mode = wording.supervise
    intervals = [
        learned_intervals(row.spans, length=len(row.text), mode="turns" if row.is_plain else mode) for row in rows
    ]
    layout = lay_out(encoded.starts, encoded.ends, borders=encoded.borders, num_chars=[len(row.text) for row in rows])
    supervised = supervised_tokens(layout, intervals)
    facts = _facts(rows, encoded, layout=layout, supervised=supervised, wording=wording)
    facts["border_merges"] = border_merges(layout, intervals)
    prompts = _compare_prompts([rows[place] for place in checked], checked, encoded=encoded, wording=wording)
    chunk = _keep(rows, encoded, supervised=supervised, facts=facts, wording=wording)
    chunk.ledger[:0] = ledger
    chunk.num_read, chunk.prompts = len(numbered), prompts
    return chunk


def left_out_for(special: str, record: Record, *, wording: Wording, ledger: list[dict[str, Any]]) -> bool:
    """Whether a record goes into the ledger because its text spells a special token ("": none). Raises UserError."""
    if not special or wording.special_tokens_in_text == "keep":
        return False
    detail = f"the text spells the special token {special}, which the tokenizer would read as the real one"
    if wording.special_tokens_in_text == "stop":
        raise UserError(
            detail,
            expected="text without special tokens",
            fix="remove it from the text, or set data.special_tokens_in_text to drop or keep",
            where=str(record.origin),
        )
    ledger.append(ledger_entry(record.origin, action="dropped", reason="special_token", detail=detail))
    return True


def _to_row(number: int, source: int, record: Record, *, wording: Wording, ledger: list[dict[str, Any]]) -> _Row | None:
    try:
        rendered, messages = render_record(record, wording)
    except UserError as error:
        can_drop = isinstance(record, Conversation)
        if wording.on_error == "stop" or not can_drop:
            raise UserError(
                error.what,
                expected=error.expected,
                fix=error.fix + ("; data.on_error: drop leaves such rows out and lists them" if can_drop else ""),
                where=error.where or str(record.origin),
                pitfall=error.pitfall,
            ) from error
        ledger.append(ledger_entry(record.origin, action="dropped", reason="template", detail=error.what))
        return None
    texts = [record.text] if isinstance(record, PlainText) else [m.content + m.context for m in messages]
    special = next((found for text in texts if (found := wording.special_in(text))), "")
    if left_out_for(special, record, wording=wording, ledger=ledger):
        return None
    if record.extra.get("unanswered"):
        detail = "the last user turns had no answer and were cut off"
        ledger.append(ledger_entry(record.origin, action="changed", reason="unanswered", detail=detail))
    return _Row(
        number=number,
        source=source,
        origin=record.origin,
        text=rendered.text,
        spans=rendered.spans,
        digest=content_hash(record),
        is_plain=isinstance(record, PlainText),
        has_special=bool(special),
        messages=messages,
        tools=record.tools if isinstance(record, Conversation) else "",
    )


def _facts(
    rows: list[_Row], encoded: Encoded, *, layout: Layout, supervised: np.ndarray, wording: Wording
) -> dict[str, np.ndarray]:
    """Everything the audit counts per row, before rows are cut or dropped."""
    num_rows = len(rows)
    chosen = [_learned_answers(row.spans, wording.supervise) if not row.is_plain else set() for row in rows]
    ends = [
        [(span.start, span.end) for span in row.spans if span.part == "terminator" and span.turn in turns]
        for row, turns in zip(rows, chosen, strict=True)
    ]
    rows_I, starts_I, ends_I = layout.on_line(ends)
    last_I = layout.last_token_of(ends_I - 1)
    limit_I = encoded.borders[rows_I] + wording.max_tokens
    found_I = (last_I >= 0) & (last_I < limit_I) & (ends_I > starts_I)
    found_I &= supervised[np.maximum(last_I, 0)] if len(supervised) else False
    return {
        "number": np.array([row.number for row in rows], dtype=np.int64),
        "source": np.array([row.source for row in rows], dtype=np.int64),
        "answers": np.array([len(turns) for turns in chosen], dtype=np.int64),
        "terminators": np.bincount(rows_I, minlength=num_rows).astype(np.int64),
        "terminators_supervised": np.bincount(rows_I[found_I], minlength=num_rows).astype(np.int64),
        "special": np.array([row.has_special for row in rows], dtype=np.int64),
        "tokens_before_cut": np.diff(encoded.borders),
    }


def _learned_answers(spans: tuple[Span, ...], mode: Mode) -> set[int]:
    turns = {span.turn for span in spans if span.role == "assistant" and span.learn}
    if mode != "last_answer":
        return turns
    return turns & {max((span.turn for span in spans if span.role == "assistant"), default=-1)}


def _keep(
    rows: list[_Row], encoded: Encoded, *, supervised: np.ndarray, facts: dict[str, np.ndarray], wording: Wording
) -> Chunk:
    """Rows that fit and teach something; the others go into the ledger."""
    ledger: list[dict[str, Any]] = []
    pieces: list[tuple[int, int, int, str, str]] = []  # row, first token, last token, id, hash
    for place, row in enumerate(rows):
        start, end = int(encoded.borders[place]), int(encoded.borders[place + 1])
        if end - start > wording.max_tokens and row.is_plain:
            chunks = split_text(encoded.ids[start:end], row.id, limit=wording.max_tokens)
            pieces.extend((place, start + left, start + right, name, digest) for left, right, name, digest in chunks)
            continue
        if end - start > wording.max_tokens:
            entry = _too_long(row, num_tokens=end - start, wording=wording)
            ledger.append(entry)
            if entry["action"] == "dropped":
                continue
            end = start + wording.max_tokens
        pieces.append((place, start, end, row.id, row.digest))
    kept: list[tuple[int, int, int, str, str]] = []
    for piece in pieces:
        place, start, end = piece[:3]
        if supervised[start:end].any():
            kept.append(piece)
        else:
            detail = "no token of the row is learned"
            entry = ledger_entry(rows[place].origin, action="dropped", reason="nothing_learned", detail=detail)
            ledger.append(entry)
    places = np.array([piece[0] for piece in kept], dtype=np.int64)
    lengths = np.array([piece[2] - piece[1] for piece in kept], dtype=np.int64)
    takes = [slice(piece[1], piece[2]) for piece in kept]
    learned = [supervised[take] for take in takes]
    for mask in learned:
        mask[0] = False  # a chunk of a text begins without anything before it
    kept_facts = {name: column[places] for name, column in facts.items()}
    tokens = np.concatenate([encoded.ids[take] for take in takes] or [np.zeros(0, dtype=np.int32)])
    row_N = np.repeat(np.arange(len(kept)), lengths)
    for name, wanted in (("bos", wording.tokenizer.bos_id), ("unk", wording.tokenizer.unk_id)):
        hits_N = tokens == wanted if wanted is not None else np.zeros(len(tokens), dtype=bool)
        kept_facts[name] = np.bincount(row_N[hits_N], minlength=len(kept)).astype(np.int64)
    begins = encoded.borders[places] if len(places) else places
    kept_facts["continues"] = (np.array([piece[1] for piece in kept], dtype=np.int64) > begins).astype(np.int64)
    kept_facts["tokens"] = lengths
    kept_facts["supervised"] = np.array([int(mask.sum()) for mask in learned], dtype=np.int64)
    return Chunk(
        tokens=tokens,
        supervised=np.concatenate([*learned] or [np.zeros(0, dtype=bool)]),
        lengths=lengths,
        facts=kept_facts,
        row_ids=[piece[3] for piece in kept],
        hashes=[piece[4] for piece in kept],
        ledger=ledger,
        num_read=0,
        said=[piece[4] if rows[piece[0]].is_plain else said_hash(rows[piece[0]].messages) for piece in kept],
        asked=[_hash_of(asked_of, rows[piece[0]]) for piece in kept],
        answered=[_hash_of(last_answer_of, rows[piece[0]]) for piece in kept],
    )


def _hash_of(part: Callable[[Sequence[Message]], Sequence[Message]], row: _Row) -> str:
    return "" if row.is_plain else said_hash(part(row.messages))


def _too_long(row: _Row, *, num_tokens: int, wording: Wording) -> dict[str, Any]:
    detail = f"{num_tokens} tokens, data.max_tokens is {wording.max_tokens}"
    if wording.too_long == "stop":
        raise UserError(
            f"the row has {detail}",
            expected=f"at most {wording.max_tokens} tokens",
            fix=f"raise data.max_tokens, shorten the row, or set data.too_long to drop or cut (row {row.id})",
            where=str(row.origin),
        )
    action = {"drop": "dropped", "cut": "changed"}[wording.too_long]
    return ledger_entry(row.origin, action=action, reason="too_long", detail=detail)


def _compare_prompts(rows: list[_Row], places: list[int], *, encoded: Encoded, wording: Wording) -> dict[str, int]:
    """Are the ids before each learned answer the ids that chatting would send? They are, but for border merges."""
    counts = {"equal": 0, "merged": 0, "different": 0}
    for row, place in zip(rows, places, strict=True):
        start, end = int(encoded.borders[place]), int(encoded.borders[place + 1])
        for turn in sorted(_learned_answers(row.spans, wording.supervise)) if not row.is_plain else ():
            begin = min(span.start for span in row.spans if span.turn == turn)
            prompt = wording.template.render(row.messages[:turn], answer_next=True, tools=row.tools)
            ids = wording.tokenizer.encode(prompt.text)
            before = encoded.ids[start:end][encoded.ends[start:end] <= begin]
            holds_both = (encoded.starts[start:end] < begin) & (encoded.ends[start:end] > begin)
            is_equal = not holds_both.any() and ids == encoded.ids[start : start + len(ids)].tolist()
            is_equal = is_equal and len(ids) == len(before)
            counts["equal" if is_equal else "merged" if holds_both.any() else "different"] += 1
    return counts


def empty_chunk() -> Chunk:
    """Nothing read yet."""
    none = np.zeros(0, dtype=np.int64)
    return Chunk(none.astype(np.int32), none.astype(bool), none, dict.fromkeys(FACTS, none), [], [], [], 0)


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks in their order as one."""
    if not chunks:
        return empty_chunk()
    prompts = {name: sum(chunk.prompts.get(name, 0) for chunk in chunks) for name in ("equal", "merged", "different")}
    return replace(
        chunks[0],
        tokens=np.concatenate([chunk.tokens for chunk in chunks]),
        supervised=np.concatenate([chunk.supervised for chunk in chunks]),
        lengths=np.concatenate([chunk.lengths for chunk in chunks]),
        facts={name: np.concatenate([chunk.facts[name] for chunk in chunks]) for name in FACTS},
        row_ids=[one for chunk in chunks for one in chunk.row_ids],
        hashes=[one for chunk in chunks for one in chunk.hashes],
        ledger=[one for chunk in chunks for one in chunk.ledger],
        num_read=sum(chunk.num_read for chunk in chunks),
        prompts=prompts,
        said=[one for chunk in chunks for one in chunk.said],
        asked=[one for chunk in chunks for one in chunk.asked],
        answered=[one for chunk in chunks for one in chunk.answered],
        suspicious=joined(chunk.suspicious for chunk in chunks),
    )
