"""What comparing rows with one another, and looking at each with the rules of `clean`, shows. Knows no tokens or files.

Two rows say the same when their turns do, whatever their case and spacing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from zhibei.data.clean import findings
from zhibei.data.mix import text_hash
from zhibei.data.records import Record
from zhibei.text.messages import Message

PLACES_SHOWN = 5
"""First places that are kept of everything that is met."""
TURN_BORDER = "\x1e"

Remark = dict[str, Any]
"""`{"count": 3, "places": ["data.json, record 17", ...]}`."""


def said_hash(messages: Sequence[Message]) -> str:
    """The hash of what was said, blind to case and spacing."""
    parts = (
        f"{message.role}:{' '.join(f'{message.content} {message.context}'.lower().split())}" for message in messages
    )
    return text_hash(TURN_BORDER.join(parts))


def asked_of(messages: Sequence[Message]) -> Sequence[Message]:
    """The turns before the last answer, without the system prompt, which whole data sets share."""
    answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
    asked = messages[: answers[-1]] if answers else messages
    return [message for message in asked if message.role != "system"]


def last_answer_of(messages: Sequence[Message]) -> Sequence[Message]:
    """The last answer alone."""
    return [message for message in messages if message.role == "assistant"][-1:]


def row_place(row_id: str) -> str:
    """`data.json#17` as a person would say it."""
    source, _, number = row_id.rpartition("#")
    record, _, chunk = number.partition(":")
    return f"{source}, record {record}" + (f", chunk {chunk}" if chunk else "")


def count(places: Iterable[str], *, most: int = PLACES_SHOWN) -> Remark:
    """How many, and the first places."""
    places = list(places)
    return {"count": len(places), "places": places[:most]}


def joined(remarks: Iterable[dict[str, Remark]]) -> dict[str, Remark]:
    """The remarks of several chunks as one; the first places stay."""
    whole: dict[str, Remark] = {}
    for part in remarks:
        for name, remark in part.items():
            seen = whole.setdefault(name, {"count": 0, "places": []})
            seen["count"] += remark["count"]
            seen["places"] = (seen["places"] + remark["places"])[:PLACES_SHOWN]
    return whole


def suspicions(records: Iterable[Record]) -> dict[str, Remark]:
    """What the rules of `clean` find, by their names."""
    places: dict[str, list[str]] = {}
    for record in records:
        for name in findings(record):
            places.setdefault(name, []).append(str(record.origin))
    return {name: count(found) for name, found in places.items()}


def same_answer(answered: Sequence[str], *, row_ids: Sequence[str], is_heldout: np.ndarray) -> Remark:
    """The training rows that give the commonest answer ("" is none)."""
    indices: list[int] = np.flatnonzero(~is_heldout).tolist()
    train = [row for row in indices if answered[row]]
    common = Counter(answered[row] for row in train).most_common(1)
    return count(row_place(row_ids[row]) for row in train if answered[row] == common[0][0]) if common else count([])


def _repetition(row_id: str, earlier: str) -> str:
    if row_id == earlier:
        return f"{row_place(row_id)} is read again by another source"
    return f"{row_place(row_id)} says what {row_place(earlier)} says"


def comparisons(
    said: Sequence[str],
    asked: Sequence[str],
    *,
    row_ids: Sequence[str],
    sources: Sequence[int],
    is_heldout: np.ndarray,
) -> dict[str, Remark]:
    """`repeated`: rows that say what an earlier one says (a row that its weight repeats is one row);
    `heldout_in_training`: held-out rows that training rows say; `asked_in_training`: held-out rows whose question
    alone is asked in training."""
    train: list[int] = np.flatnonzero(~is_heldout).tolist()
    held: list[int] = np.flatnonzero(is_heldout).tolist()
    repeated = []
    origins: dict[str, tuple[int, str]] = {}
    for row, mine in enumerate(zip(sources, row_ids, strict=True)):
        earlier = origins.setdefault(said[row], mine)
        if earlier != mine:
            repeated.append(_repetition(row_ids[row], earlier[1]))
    first = {said[row]: row_ids[row] for row in reversed(train)}
    questions = {asked[row]: row_ids[row] for row in reversed(train) if asked[row]}
    leaked, known = [], []
    for row in held:
        if said[row] in first:
            leaked.append(f"{row_place(row_ids[row])} is said by {row_place(first[said[row]])}")
        elif asked[row] in questions:
            known.append(f"{row_place(row_ids[row])} asks what {row_place(questions[asked[row]])} asks")
    return {
        "repeated": count(repeated),
        "heldout_in_training": count(leaked),
        "asked_in_training": count(known),
    }
