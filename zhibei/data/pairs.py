"""Pairs, judged answers and prompts of a run as arrays of token ids: read, render, split, compare, audit, cache.

What `prepare` is for supervised training. Held-out records are chosen by their prompts, so no prompt is on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, RunFile
from zhibei.data.answers import AnswerChunk, chosen_rows, encode_answers, join_answers
from zhibei.data.encode import Wording
from zhibei.data.mix import split_heldout
from zhibei.data.pair_audit import audit_answers, compared
from zhibei.data.prepare import Kept, Progress, Reading, wording_of
from zhibei.data.prepared import AnswerRows, PreparedAnswers
from zhibei.data.prepared_cache import read_prepared_answers, rows_of
from zhibei.data.prompts import encode_prompts
from zhibei.data.readers import as_source, records_beyond_limits
from zhibei.data.remarks import Remark, count, row_place
from zhibei.data.remedies import remedy_of
from zhibei.data.workers import encode_all, num_workers
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

ENCODERS = {"answers": encode_answers, "prompts": encode_prompts}
LEARNS_FROM = {"reward": "answers", "dpo": "answers", "ppo": "prompts", "grpo": "prompts", "raft": "prompts"}
"""What each stage reads."""


def prepare_answers(
    run: RunFile,
    tokenizer: Tokenizer,
    template: Template,
    *,
    progress: Progress | None = None,
    use_cache: bool = True,
) -> PreparedAnswers:
    """All records of `run.data` for stage reward, dpo or ppo, with what is learned of each answer.

    Kept and found again under a key like the rows of supervised training. UserError: broken records (with on_error:
    stop), records that this stage cannot learn from, and when no record is left.
    """
    data, tell = run.data, progress or (lambda done, text: None)
    wording = replace(wording_of(data, tokenizer, template), supervise="answers")
    kind = LEARNS_FROM[run.stage]
    kept = Kept(data, wording, kind=kind, tell=tell)
    if use_cache and kept.is_sound():
        prepared = read_prepared_answers(kept.folder)
    else:
        prepared = replace(_prepare(data, wording, kind=kind, tell=tell), key=kept.key)
        if use_cache and kept.write(prepared):
            prepared = read_prepared_answers(kept.folder)
    _require_fitting(prepared, run)
    return prepared


def _require_fitting(prepared: PreparedAnswers, run: RunFile) -> None:
    if run.stage == "reward" and prepared.kind == "judged":
        raise UserError(
            "the records are single answers with a thumb up or down, and a reward model learns from pairs",
            expected="pairs (chosen, rejected)",
            fix="set stage: dpo, which they are made for, or give pairs",
            where="data.sources",
            pitfall="records-of-another-stage",
        )


def _read(data: DataSection, wording: Wording, *, kind: str, tell: Progress) -> tuple[AnswerChunk | None, Reading]:
    reading = Reading(data, tell)
    chunks: list[AnswerChunk] = []
    done = 0
    for chunk in encode_all(reading.numbered(), wording, workers=num_workers(data.workers), encode=ENCODERS[kind]):
        chunks.append(chunk)
        done += chunk.num_read
        tell(done, "preparing rows")
    return (join_answers(chunks) if chunks else None), reading


def _prepare(data: DataSection, wording: Wording, *, kind: str, tell: Progress) -> PreparedAnswers:
    chunk, reading = _read(data, wording, kind=kind, tell=tell)
    broken, num_records = list(reading.broken), reading.records
    sources = [as_source(source).path for source in data.sources]
    held = None
    if isinstance(data.validation, str):
        held_data = data.model_copy(update={"sources": [data.validation]})
        held, held_reading = _read(held_data, wording, kind=kind, tell=tell)
        broken, num_records = [*broken, *held_reading.broken], num_records + held_reading.records
        sources = [*sources, data.validation]
    if chunk is None or not len(chunk.asked):
        raise _nothing_left(chunk, broken)
    if held is not None:
        chunk, is_heldout = _with_heldout_file(chunk, held, source=len(sources) - 1)
    else:
        is_heldout = split_heldout(chunk.asked, data.validation if not isinstance(data.validation, str) else 0)
    if is_heldout.all():
        raise _nothing_left(chunk, broken)
    remarks = {**chunk.remarks, **_told_by_readers(broken), **compared(chunk, is_heldout)}
    return PreparedAnswers(
        kind=chunk.kind,
        train=_side(chunk, ~is_heldout),
        heldout=_side(chunk, is_heldout),
        audit=audit_answers(chunk, is_heldout=is_heldout, broken=broken, wording=wording, sources=sources),
        ledger=[*broken, *chunk.ledger],
        key="",
        template=wording.template.name,
        remarks={
            "records": num_records,
            "records_in_files": num_records + records_beyond_limits(data),
            "suspicious": chunk.suspicious,
            **remarks,
        },
    )


def _told_by_readers(broken: Sequence[dict[str, Any]]) -> dict[str, Remark]:
    """What the readers refused and the run dropped: equal answers and empty ones."""

    def places(pitfall: str, field: str = "") -> Remark:
        return count(
            f"{entry['where']}, field '{entry['field']}'"
            for entry in broken
            if entry["pitfall"] == pitfall and field in ("", entry["field"])
        )

    return {
        "identical": places("dpo-data-identical-pairs"),
        "empty_chosen": places("empty-answers", "chosen"),
        "empty_rejected": places("empty-answers", "rejected"),
    }


def _nothing_left(chunk: AnswerChunk | None, broken: Sequence[dict[str, Any]]) -> UserError:
    ledger = [*broken, *(chunk.ledger if chunk else ())]
    dropped = Counter(entry["reason"] for entry in ledger if entry["action"] == "dropped")
    reasons = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in dropped.items()) or "none dropped"
    example = next((f"; e.g. {entry['where']}: {entry['detail']}" for entry in ledger), "")
    return UserError(
        f"no record is left to train on: {len(broken) + (chunk.num_read if chunk else 0)} read, {reasons}{example}",
        expected="at least one record to learn from",
        fix=remedy_of(dropped, kind=chunk.kind if chunk else ""),
        where="data.validation" if "in_validation" in dropped else "data",
        pitfall="dataset-all-rows-dropped",
    )


def _with_heldout_file(train: AnswerChunk, held: AnswerChunk, *, source: int) -> tuple[AnswerChunk, np.ndarray]:
    """Records of the validation file are held out; training records that say the same are dropped into the ledger."""
    for side in held.sides.values():
        side.facts["source"] = np.full_like(side.facts["source"], source)
    known = set(zip(*(side.said for side in held.sides.values()), strict=True))
    said = zip(*(side.said for side in train.sides.values()), strict=True)
    repeats = np.array([one in known for one in said], dtype=bool)
    whole = join_answers([train, held])
    ids = next(iter(train.sides.values())).row_ids
    entries = [
        {
            "row": row,
            "where": row_place(row),
            "action": "dropped",
            "reason": "in_validation",
            "detail": "the validation file holds a record that says the same",
        }
        for row in compress(ids, repeats)
    ]
    kept = np.concatenate([~repeats, np.ones(len(held.asked), dtype=bool)])
    is_heldout = np.arange(len(kept)) >= len(train.asked)
    whole = replace(
        whole,
        sides={name: chosen_rows(side, kept) for name, side in whole.sides.items()},
        columns={name: column[kept] for name, column in whole.columns.items()},
        asked=list(compress(whole.asked, kept)),
        ledger=[*whole.ledger, *entries],
    )
    return whole, is_heldout[kept]


def _side(chunk: AnswerChunk, chosen: np.ndarray) -> AnswerRows:
    sides = {
        name: rows_of(
            side.tokens, supervised=side.supervised, lengths=side.lengths, row_ids=side.row_ids, chosen=chosen
        )
        for name, side in chunk.sides.items()
    }
    return AnswerRows(sides, {name: column[chosen] for name, column in chunk.columns.items()})
