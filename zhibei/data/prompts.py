"""One chunk of prompts to token ids, ready for an answer (PPO and kin). Knows no files, processes or cache.

Runs in worker processes: nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.answers import AnswerChunk, Numbered, chosen_rows, extra_bos, places_of
from zhibei.data.encode import Chunk, Wording, join_chunks, ledger_entry, left_out_for, row_id, with_system
from zhibei.data.records import Conversation, Judged, Preference, Prompt, Record
from zhibei.data.remarks import asked_of, said_hash, suspicions
from zhibei.text.messages import Message


def encode_prompts(numbered: Sequence[Numbered], wording: Wording) -> AnswerChunk:
    """Prompts as tokens, ready for an answer. Of conversations and pairs the prompt is taken.

    A prompt is never cut: without its end it asks something else."""
    ledger: list[dict[str, Any]] = []
    texts: list[str] = []
    kept: list[Numbered] = []
    for number, source, record in numbered:
        text = _prompt_text(record, wording, ledger)
        if text is not None:
            texts.append(text)
            kept.append((number, source, record))
    encoded = wording.tokenizer.encode_batch(texts)
    lengths = np.diff(encoded.borders)
    chunk = _prompt_chunk(kept, encoded.ids, lengths=lengths, wording=wording)
    fits = lengths <= wording.max_tokens
    for (_, _, record), length in zip(kept, lengths, strict=True):
        if length > wording.max_tokens:
            ledger.append(_long_prompt(record, int(length), wording))
    chunk = chosen_rows(chunk, fits)
    records = [record for (_, _, record), fit in zip(kept, fits, strict=True) if fit]
    return AnswerChunk(
        kind="prompts",
        sides={"prompt": chunk},
        columns={"prompt_tokens": chunk.lengths.astype(np.int64)},
        asked=list(chunk.asked),
        ledger=ledger,
        num_read=len(numbered),
        remarks={"extra_bos": places_of(records, extra_bos(chunk, wording.tokenizer.bos_id))},
        suspicious=suspicions(record for _, _, record in numbered),
    )


def _prompt_text(record: Record, wording: Wording, ledger: list[dict[str, Any]]) -> str | None:
    """The rendered prompt; None when the record went into the ledger."""
    messages = _asked_messages(record)
    try:
        rendered = wording.template.render(with_system(messages, wording.system), answer_next=True)
    except UserError as error:
        if wording.on_error == "stop":
            raise UserError(
                error.what, expected=error.expected, fix=error.fix, where=error.where or str(record.origin)
            ) from error
        ledger.append(ledger_entry(record.origin, action="dropped", reason="template", detail=error.what))
        return None
    special = next((found for m in messages if (found := wording.special_in(m.content + m.context))), "")
    return None if left_out_for(special, record, wording=wording, ledger=ledger) else rendered.text


def _asked_messages(record: Record) -> tuple[Message, ...]:
    if isinstance(record, Conversation):
        answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
        return record.messages[: answers[-1]]
    if isinstance(record, Prompt):
        return record.messages
    if isinstance(record, (Preference, Judged)):
        return record.prompt
    raise UserError(
        "the records are plain text, and stage: ppo answers prompts",
        expected="prompts, conversations or pairs",
        fix="set stage: sft, which they are made for",
        where=str(record.origin),
        pitfall="records-of-another-stage",
    )


def _long_prompt(record: Record, num_tokens: int, wording: Wording) -> dict[str, Any]:
    detail = f"the prompt has {num_tokens} tokens, data.max_tokens is {wording.max_tokens}"
    if wording.too_long == "stop":
        raise UserError(
            detail,
            expected=f"at most {wording.max_tokens} tokens",
            fix="raise data.max_tokens, shorten the prompt, or set data.too_long: drop",
            where=str(record.origin),
        )
    return ledger_entry(record.origin, action="dropped", reason="too_long", detail=detail)


def _prompt_chunk(numbered: Sequence[Numbered], ids: np.ndarray, *, lengths: np.ndarray, wording: Wording) -> Chunk:
    """The rows in the form of supervised ones; nothing in them is supervised."""
    row_N = np.repeat(np.arange(len(lengths)), lengths)
    asked = [said_hash(asked_of(_asked_messages(record))) for _, _, record in numbered]

    def hits(wanted: int | None) -> np.ndarray:
        wanted = -1 if wanted is None else wanted
        return np.bincount(row_N[ids == wanted], minlength=len(lengths)).astype(np.int64)

    facts = {
        "number": np.array([number for number, _, _ in numbered], dtype=np.int64),
        "source": np.array([source for _, source, _ in numbered], dtype=np.int64),
        "bos": hits(wording.tokenizer.bos_id),
        "unk": hits(wording.tokenizer.unk_id),
    }
    none = np.zeros(len(lengths), dtype=np.int64)
    every = join_chunks([]).facts
    return Chunk(
        tokens=ids.astype(np.int32),
        supervised=np.zeros(len(ids), dtype=bool),
        lengths=lengths,
        facts={name: facts.get(name, none) for name in every} | {"tokens": lengths, "tokens_before_cut": lengths},
        row_ids=[row_id(record.origin) for _, _, record in numbered],
        hashes=list(asked),
        ledger=[],
        num_read=len(numbered),
        said=list(asked),
        asked=list(asked),
        answered=[""] * len(asked),
    )
