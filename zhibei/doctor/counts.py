"""Counts of rows in words, findings about rows, and the rows of a run whatever its stage. Knows no check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zhibei.doctor.facts.facts import Facts
from zhibei.doctor.facts.rows import PairFacts, RowFacts, Seen
from zhibei.doctor.pitfall import Finding, Level

MOSTLY = 0.5


def rows_of(facts: Facts) -> RowFacts | PairFacts | None:
    """The rows of supervised training, or the records of the other stages; None where they are not known."""
    return facts.rows or facts.pairs


def noun_of(facts: Facts) -> str:
    """What one record of this run is called."""
    if facts.pairs is None or facts.rows is not None:
        return "rows"
    return {"pairs": "pairs", "judged": "answers", "prompts": "prompts"}[facts.pairs.kind]


def counted(part: int, whole: int, noun: str) -> str:
    """`37 of 1,200 rows (3.1 %)`."""
    return f"{part:,} of {whole:,} {noun} ({share(part, whole):.1%})" if whole else f"{part:,} {noun}"


def share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def kept(audit: Mapping[str, Any]) -> int:
    """Rows that are left of those read."""
    return int(audit.get("rows_kept", 0))


def first_place(seen: Seen, otherwise: str) -> str:
    """Where it was met first."""
    return seen.places[0] if seen.places else otherwise


def found_in_rows(
    seen: Seen, *, what: str, to_do: str, place: str = "data.sources", level: Level = "warning"
) -> Finding:
    """A finding about rows, at the first of them (or at `place` where none is known), with the others as evidence."""
    return Finding(what=what, where=first_place(seen, place), to_do=to_do, level=level, evidence=seen.places)


def level_of_share(part: int, whole: int) -> Level:
    """A fault of every second row stops the run; of fewer it is a warning."""
    return "stop" if share(part, whole) >= MOSTLY else "warning"
