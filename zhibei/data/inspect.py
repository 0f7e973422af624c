"""What a data file holds, as plain JSON values: fields, lengths, languages, duplicates, suspicious rows.

Knows readers and rules; how it is shown is the business of the command line.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.data.clean import exchanges, findings, reason
from zhibei.data.dedup import MAX_ROWS, near_duplicates
from zhibei.data.fields import type_name
from zhibei.data.jsonlines import Row, excerpt
from zhibei.data.languages import detector
from zhibei.data.mix import content_hash, text_hash
from zhibei.data.readers import open_file, read_rows
from zhibei.data.records import BrokenRecord, Conversation, Judged, PlainText, Preference, Prompt, Record
from zhibei.text.messages import Message

NUM_EXAMPLES = 3
MAX_BROKEN_LISTED = 50
PERCENTILES = (1, 25, 50, 75, 90, 95, 99)
CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True)
class Said:
    """Hashes of what a file says: of whole records, and of single questions."""

    file: str
    records: frozenset[str]
    questions: frozenset[str]


def inspect_file(
    path: Path,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    count_tokens: CountTokens | None = None,
    label: str = "",
    earlier: list[Said] | None = None,
) -> dict[str, Any]:
    """Everything `zhibei data inspect` says about one file, and what it shares with the files in `earlier` (to which
    it is added).

    Texts and hashes of all records are held in memory; near duplicates are looked for in the first 200,000.
    Raises UserError when the file as a whole cannot be read.
    """
    file = open_file(path, format, columns, label=label)
    records: list[Record] = []
    broken: list[BrokenRecord] = []
    for record in file.records:
        (broken if isinstance(record, BrokenRecord) else records).append(record)  # type: ignore[arg-type]
    texts = [whole_text(record) for record in records]
    hashes = [content_hash(record) for record in records]
    is_first = first_of_equals(hashes)
    fields, speakers = raw_facts(path)
    said = Said(file.source, frozenset(hashes), frozenset(question_hashes(records)))
    shared = [overlap(said, before) for before in earlier or []]
    if earlier is not None:
        earlier.append(said)
    return {
        "file": file.source,
        "container": file.container,
        "format": file.format,
        "bytes": path.stat().st_size,
        "records": len(records),
        "broken": {"count": len(broken), "examples": [broken_entry(record) for record in broken[:MAX_BROKEN_LISTED]]},
        "kinds": dict(Counter(type(record).__name__ for record in records)),
        "fields": fields,
        "speakers": speakers,
        "turns": turn_counts(records),
        "lengths": lengths(records, texts, count_tokens),
        "languages": languages(texts),
        "duplicates": duplicates(records, texts, hashes, is_first),
        "shared_with": [each for each in shared if each["records"] or each["questions"]],
        "repeated_answers": repeated_answers(records),
        "suspicious": suspicious(records),
        "without_answer": sum(isinstance(record, Conversation) and "unanswered" in record.extra for record in records),
    }


def question_hashes(records: Sequence[Record]) -> list[str]:
    """A hash for each question (with its input) that is longer than a greeting."""
    pairs = (pair for record in records for pair in exchanges(record))
    return [text_hash(f"{pair.question}\n{pair.context}") for pair in pairs if len(pair.question + pair.context) > 20]


def overlap(said: Said, before: Said) -> dict[str, Any]:
    """Distinct records and questions that two files share: what leaks when one of them is for validation."""
    return {
        "file": before.file,
        "records": len(said.records & before.records),
        "questions": len(said.questions & before.questions),
    }


def broken_entry(record: BrokenRecord) -> dict[str, Any]:
    """A broken record as the ledger and `--json` show it."""
    return {
        "where": record.where,
        "index": record.origin.index,
        "line": record.origin.line,
        "field": record.field,
        "what": record.what,
        "expected": record.expected,
        "fix": record.fix,
    }


def raw_facts(path: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Each field of the rows as the file has it (types, share of rows that have it, share that is not empty, an
    example), and how often each speaker's name stands in its lists of turns."""
    types: dict[str, Counter[str]] = defaultdict(Counter)
    filled: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    example: dict[str, str] = {}
    num_rows = 0
    for row in read_rows(path, str(path)).rows:
        if not isinstance(row, Row):
            continue
        num_rows += 1
        values = row.value.items() if isinstance(row.value, dict) else [("(a list)", row.value)]
        for name, value in values:
            types[name][type_name(value)] += 1
            if isinstance(value, list):
                speakers.update(_speakers(value))
            if value is not None and value != "" and value != []:
                filled[name] += 1
                if name not in example:
                    example[name] = excerpt(value, 50)
    fields = [
        {
            "name": name,
            "types": dict(counts),
            "present": sum(counts.values()) / num_rows,
            "filled": filled[name] / num_rows,
            "example": example.get(name, ""),
        }
        for name, counts in types.items()
    ]
    return fields, dict(speakers.most_common())


def _speakers(turns: list[Any]) -> list[str]:
    return [
        str(turn.get("from", turn.get("role")))
        for turn in turns
        if isinstance(turn, dict) and {"from", "role"} & set(turn)
    ]


def all_messages(record: Record) -> tuple[Message, ...]:
    if isinstance(record, PlainText):
        return (Message("assistant", record.text),)
    if isinstance(record, Preference):
        return record.prompt + record.chosen + record.rejected
    if isinstance(record, Judged):
        return record.prompt + record.answer
    return record.messages


def whole_text(record: Record) -> str:
    """All a record says, one message per line."""
    return "\n".join(f"{message.content} {message.context}".strip() for message in all_messages(record))


def answers_of(record: Record) -> list[str]:
    if isinstance(record, (PlainText, Prompt)):
        return []
    return [message.content for message in all_messages(record) if message.role == "assistant"]


def first_of_equals(hashes: Sequence[str]) -> list[int]:
    """For each row the first row with the same hash (itself, if it is the first)."""
    first: dict[str, int] = {}
    return [first.setdefault(digest, row) for row, digest in enumerate(hashes)]


def turn_counts(records: Sequence[Record]) -> dict[str, int]:
    """How many records have how many user turns."""
    counts = Counter(sum(message.role == "user" for message in all_messages(record)) for record in records)
    return {str(turns): count for turns, count in sorted(counts.items())}


def distribution(values: Sequence[int]) -> dict[str, Any]:
    """Percentiles, and counts in steps of half a doubling (for the plot)."""
    array = np.asarray(values, dtype=np.int64)
    if not len(array):
        return {"count": 0}
    top = int(np.ceil(2 * np.log2(max(int(array.max()), 1) + 1))) + 1
    edges = np.unique(np.floor(2 ** (np.arange(0, top + 1) / 2)).astype(np.int64))
    edges = np.concatenate([[0], edges])
    counts, _ = np.histogram(array, bins=np.append(edges, edges[-1] * 2 + 2))
    bins = [
        {"from": int(low), "to": int(high) - 1, "count": int(count)}
        for low, high, count in zip(edges, [*edges[1:], edges[-1] * 2 + 2], counts, strict=True)
    ]
    while bins and not bins[-1]["count"]:
        bins.pop()
    while bins and not bins[0]["count"]:
        bins.pop(0)
    return {
        "count": len(array),
        "total": int(array.sum()),
        "mean": round(float(array.mean()), 2),
        "min": int(array.min()),
        "max": int(array.max()),
        "percentiles": {str(q): int(np.percentile(array, q, method="inverted_cdf")) for q in PERCENTILES},
        "bins": bins,
    }


def lengths(records: Sequence[Record], texts: Sequence[str], count_tokens: CountTokens | None) -> dict[str, Any]:
    """Lengths of whole records and of answers, in characters and, with a tokenizer, in tokens (without a template)."""
    answers = [answer for record in records for answer in answers_of(record)]
    found = {"unit": "characters", "whole": distribution([len(t) for t in texts])}
    if answers:
        found["answers"] = distribution([len(answer) for answer in answers])
    result = {"characters": found}
    if count_tokens:
        counted: dict[str, Any] = {"unit": "tokens", "whole": distribution(count_tokens(texts))}
        if answers:
            counted["answers"] = distribution(count_tokens(answers))
        result["tokens"] = counted
    return result


def languages(texts: Sequence[str]) -> dict[str, Any]:
    name, detect = detector()
    return {"by": name, "counts": dict(Counter(map(detect, texts)).most_common())}


def duplicates(
    records: Sequence[Record], texts: Sequence[str], hashes: Sequence[str], is_first: Sequence[int]
) -> dict[str, Any]:
    """Rows equal to an earlier one, rows nearly so, and questions that have several answers."""
    equal = [(first, row) for row, first in enumerate(is_first) if first != row]
    near = near_duplicates(texts)
    pairs = [pair for pair in near.pairs if hashes[pair[0]] != hashes[pair[1]]]
    by_question: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for record in records:
        for pair in exchanges(record):
            if pair.answer and pair.question and not isinstance(record, Preference):
                by_question[pair.question, pair.context].add(pair.answer)
    return {
        "exact": len(equal),
        "exact_examples": [[str(records[a].origin), str(records[b].origin)] for a, b in equal[:NUM_EXAMPLES]],
        "near": len(pairs),
        "near_min_similarity": near.min_similarity,
        "near_examples": [
            {"first": str(records[a].origin), "second": str(records[b].origin), "similarity": round(alike, 3)}
            for a, b, alike in sorted(pairs, key=lambda pair: -pair[2])[:NUM_EXAMPLES]
        ],
        "near_rows_compared": near.num_rows_compared,
        "near_is_partial": len(texts) > MAX_ROWS,
        "questions_with_several_answers": sum(len(answers) > 1 for answers in by_question.values()),
    }


def repeated_answers(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Answers that many records share word for word; a model learns to give them to everything."""
    counts = Counter(answer.strip() for record in records for answer in answers_of(record) if len(answer) > 20)
    least = max(3, len(records) // 1000)
    return [{"answer": excerpt(a, 80), "count": n} for a, n in counts.most_common(5) if n >= least]


def suspicious(records: Sequence[Record]) -> dict[str, Any]:
    """What each rule found: how often, why it matters, and where."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = defaultdict(list)
    num_records = 0
    for record in records:
        names = findings(record)
        num_records += bool(names)
        for name in names:
            counts[name] += 1
            if len(examples[name]) < NUM_EXAMPLES:
                examples[name].append({"where": str(record.origin), "text": excerpt(whole_text(record), 100)})
    return {
        "records": num_records,
        "rules": [
            {"rule": name, "count": count, "reason": reason(name), "examples": examples[name]}
            for name, count in counts.most_common()
        ],
    }
