"""What all pairs, judged answers or prompts of a run say together: counted facts as plain JSON. Knows no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from zhibei.data.answers import AnswerChunk
from zhibei.data.encode import Chunk, Wording
from zhibei.data.remarks import Remark, count, row_place

PERCENTILES = (0, 50, 95, 99, 100)


def audit_answers(
    chunk: AnswerChunk,
    *,
    is_heldout: np.ndarray,
    broken: Sequence[dict[str, Any]],
    wording: Wording,
    sources: Sequence[str],
) -> dict[str, Any]:
    """Counts over every record that was read; `broken` are the ledger entries of records the readers refused."""
    ledger = [*broken, *chunk.ledger]
    reasons = {
        action: Counter(e["reason"] for e in ledger if e["action"] == action) for action in ("dropped", "changed")
    }
    first = next(iter(chunk.sides.values()))
    audit = {
        "kind": chunk.kind,
        "template": wording.template.name,
        "terminator": wording.template.terminator,
        "rows_read": chunk.num_read + len(broken),
        "rows_kept": len(chunk.asked),
        "rows_train": int((~is_heldout).sum()),
        "rows_heldout": int(is_heldout.sum()),
        "dropped": dict(sorted(reasons["dropped"].items())),
        "changed": dict(sorted(reasons["changed"].items())),
        "highest_id": max(int(side.tokens.max(initial=0)) for side in chunk.sides.values()),
        "longest": max(int(side.lengths.max(initial=0)) for side in chunk.sides.values()),
        "prompt_tokens": _lengths(chunk.columns["prompt_tokens"]),
        "sides": {name: _side(side) for name, side in chunk.sides.items()},
        "sources": [
            {"source": path, "rows": int((first.facts["source"] == number).sum())}
            for number, path in enumerate(sources)
        ],
        "notices": list(wording.tokenizer.notes),
    }
    if chunk.kind == "pairs":
        audit["rejected_longer_share"] = _share(_answer_tokens(chunk, "rejected") > _answer_tokens(chunk, "chosen"))
        audit["margins_given"] = int(np.isfinite(chunk.columns["margin"]).sum())
    if chunk.kind == "judged":
        audit["good"] = int(chunk.columns["is_good"].sum())
        audit["bad"] = int((~chunk.columns["is_good"]).sum())
    return audit


def _side(side: Chunk) -> dict[str, Any]:
    learned = side.facts["supervised"]
    return {
        "tokens": int(side.lengths.sum()),
        "answer_tokens": int(learned.sum()),
        "mean_answer_tokens": float(learned.mean()) if len(learned) else 0.0,
        "lengths": _lengths(side.lengths),
        "terminated": int((side.facts["terminators_supervised"] > 0).sum()),
        "unknown_tokens": int(side.facts["unk"].sum()),
    }


def _lengths(values: np.ndarray) -> dict[str, int]:
    return {str(p): int(np.percentile(values, p, method="nearest")) for p in PERCENTILES} if len(values) else {}


def _answer_tokens(chunk: AnswerChunk, name: str) -> np.ndarray:
    return chunk.sides[name].facts["supervised"]


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else 0.0


def compared(chunk: AnswerChunk, is_heldout: np.ndarray) -> dict[str, Remark]:
    """`repeated`: records that say what an earlier one says. `contradictions`: the same two answers preferred the
    other way round, or one answer judged both good and bad. `heldout_in_training`, `asked_in_training`: held-out
    records that training records say, or whose prompt training knows."""
    return _repeats(chunk) | _leaks(chunk, is_heldout)


def _said(chunk: AnswerChunk) -> list[tuple[str, ...]]:
    """What each record says: both answers in their order, or the answer and its label."""
    sides = [side.said for side in chunk.sides.values()]
    if chunk.kind == "judged":
        sides.append([str(is_good) for is_good in chunk.columns["is_good"]])
    return list(zip(*sides, strict=True))


def _turned(chunk: AnswerChunk, said: tuple[str, ...]) -> tuple[str, ...]:
    """What the opposite opinion would say."""
    if chunk.kind == "pairs":
        return (said[1], said[0])
    return (said[0], str(said[1] != "True"))


def _repeats(chunk: AnswerChunk) -> dict[str, Remark]:
    ids = next(iter(chunk.sides.values())).row_ids
    first: dict[tuple[str, ...], str] = {}
    repeated, contradictions = [], []
    for row, said in zip(ids, _said(chunk), strict=True):
        earlier = first.setdefault(said, row)
        if earlier != row:
            repeated.append(f"{row_place(row)} says what {row_place(earlier)} says")
            continue
        opposite = _turned(chunk, said) if chunk.kind != "prompts" else said
        turned = first.get(opposite)
        # Answers that differ in spacing alone are their own opposite.
        if turned is not None and opposite != said:
            contradictions.append(f"{row_place(row)} says the opposite of {row_place(turned)}")
    return {"repeated": count(repeated), "contradictions": count(contradictions)}


def _leaks(chunk: AnswerChunk, is_heldout: np.ndarray) -> dict[str, Remark]:
    ids = next(iter(chunk.sides.values())).row_ids
    said = _said(chunk)
    trained = {said[row]: ids[row] for row in np.flatnonzero(~is_heldout).tolist()}
    questions = {chunk.asked[row]: ids[row] for row in np.flatnonzero(~is_heldout).tolist()}
    leaked, known = [], []
    for row in np.flatnonzero(is_heldout).tolist():
        if said[row] in trained:
            leaked.append(f"{row_place(ids[row])} is said by {row_place(trained[said[row]])}")
        elif chunk.asked[row] in questions:
            known.append(f"{row_place(ids[row])} asks what {row_place(questions[chunk.asked[row]])} asks")
    return {"heldout_in_training": count(leaked), "asked_in_training": count(known)}
