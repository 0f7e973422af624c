"""From the run file's data section to arrays of token ids: read, render, mask, split, audit, cache. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, RunFile, Source
from zhibei.data.audit import audit_rows, require_trainable
from zhibei.data.encode import Chunk, Wording, encode_rows, join_chunks, ledger_entry
from zhibei.data.mix import split_heldout
from zhibei.data.prepared import PreparedAnswers, PreparedSet
from zhibei.data.prepared_cache import (
    FileHashes,
    cache_root,
    fault_of,
    key_of,
    read_prepared,
    rows_of,
    write_prepared,
)
from zhibei.data.readers import as_source, read_sources, records_beyond_limits
from zhibei.data.records import BrokenRecord, Record
from zhibei.data.remarks import comparisons, row_place, same_answer
from zhibei.data.sources import files_of
from zhibei.data.workers import Numbered, encode_all, num_workers
from zhibei.text.messages import Message
from zhibei.text.template import Template
from zhibei.text.tokenizer import TOKENIZERS_VERSION, Tokenizer

# Raise when the same inputs give other rows than before: cached sets of older versions are then not used.
PREPARE_VERSION = 6
PROBES = (
    (Message("user", "a"),),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c", context="d"), Message("assistant", "e")),
    (Message("system", "s"), Message("user", "a"), Message("assistant", "b")),
)

Progress = Callable[[int, str], None]
"""Told (rows done, what is going on) while rows are prepared."""


def prepare(
    run: RunFile,
    tokenizer: Tokenizer,
    template: Template,
    *,
    progress: Progress | None = None,
    use_cache: bool = True,
) -> PreparedSet:
    """All rows of `run.data` as token ids with their mask, split into training and held-out rows, and audited.

    The result is kept under `<cache>/prepared/<key>/` and memory-mapped from there the next time. UserError: broken
    records (with on_error: stop), conversations the template cannot express, rows that are all dropped or unlearned.
    """
    data, tell = run.data, progress or (lambda done, text: None)
    wording = wording_of(data, tokenizer, template)
    kept = Kept(data, wording, kind="rows", tell=tell)
    if use_cache and kept.is_sound():
        return read_prepared(kept.folder)
    prepared = replace(_prepare(data, wording, tell=tell), key=kept.key)
    require_trainable(prepared.audit, prepared.ledger)
    return read_prepared(kept.folder) if use_cache and kept.write(prepared) else prepared


class Kept:
    """The place of a prepared set in the cache."""

    def __init__(self, data: DataSection, wording: Wording, *, kind: str, tell: Progress) -> None:
        hashes = FileHashes(cache_root(data.cache))
        self.facts = _key_facts(data, wording, kind=kind, hashes=hashes)
        self.key, self.tell = key_of(self.facts), tell
        self.folder = cache_root(data.cache) / "prepared" / self.key

    def is_sound(self) -> bool:
        """Whether the set is there and undamaged."""
        if not self.folder.exists():
            return False
        fault = fault_of(self.folder)
        if fault:
            self.tell(0, f"the prepared rows in {self.folder} are damaged ({fault}) and are made again")
            return False
        self.tell(0, f"prepared rows found in {self.folder}")
        return True

    def write(self, prepared: PreparedSet | PreparedAnswers) -> bool:
        """Whether the set could be kept. Where not, the rows are sound and in memory: a full disk or a read-only
        cache must not cost the run."""
        try:
            write_prepared(self.folder, prepared, facts=self.facts)
        except (OSError, UserError) as problem:
            text = f"the prepared rows cannot be kept in {self.folder} ({_reason(problem)})"
            self.tell(prepared.audit["rows_read"], text)
            return False
        return True


def _reason(problem: OSError | UserError) -> str:
    return problem.what if isinstance(problem, UserError) else problem.strerror or str(problem)


def wording_of(data: DataSection, tokenizer: Tokenizer, template: Template) -> Wording:
    """What decides the tokens and the mask, taken from the data section."""
    return Wording(
        tokenizer=tokenizer,
        template=template,
        system=data.system,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        supervise=data.supervise,
        special_tokens_in_text=data.special_tokens_in_text,
        on_error=data.on_error,
    )


def source_files(data: DataSection) -> list[dict[str, Any]]:
    """Path, size and content hash of every file the rows come from, for the manifest; known hashes are used again."""
    hashes = FileHashes(cache_root(data.cache))
    files = [path for source in _all_sources(data) for path, _ in files_of(source)]
    return [{"path": str(path.resolve()), "bytes": path.stat().st_size, "sha256": hashes.of(path)} for path in files]


def _all_sources(data: DataSection) -> list[Source]:
    held = [data.validation] if isinstance(data.validation, str) else []
    return [as_source(source) for source in (*data.sources, *held)]


def _key_facts(data: DataSection, wording: Wording, *, kind: str, hashes: FileHashes) -> dict[str, Any]:
    """Everything that decides the rows, as JSON."""
    files = [[hashes.of(path) for path, _ in files_of(source)] for source in _all_sources(data)]
    hashes.keep()
    return {
        "version": PREPARE_VERSION,
        "kind": kind,
        "tokenizers": TOKENIZERS_VERSION,
        "tokenizer": wording.tokenizer.fingerprint,
        "template": {
            "name": wording.template.name,
            "jinja": wording.template.as_jinja(),
            "probes": [_probe(wording.template, probe) for probe in PROBES],
        },
        "sources": [as_source(source).model_dump(mode="json") for source in data.sources],
        "files": files,
        "masking": data.model_dump(
            mode="json",
            include={
                "system",
                "max_tokens",
                "too_long",
                "supervise",
                "special_tokens_in_text",
                "on_error",
                "validation",
            },
        ),
    }


def _probe(template: Template, messages: tuple[Message, ...]) -> Any:
    """What the template makes of a small conversation: a change of spelling or spans changes the key."""
    try:
        rendered = template.render(messages)
    except UserError as error:
        return error.what
    return [rendered.text, [[span.start, span.end, span.role, span.turn, span.part] for span in rendered.spans]]


@dataclass
class Reading:
    """Counts the records that pass by, and keeps the ledger of broken ones."""

    data: DataSection
    tell: Progress
    broken: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0
    records: int = 0
    """Records read, each once whatever its weight."""

    def numbered(self) -> Iterator[Numbered]:
        last: Record | BrokenRecord | None = None
        for source, record in read_sources(self.data, notice=lambda text: self.tell(self.done, text)):
            self.records += record is not last
            last = record
            if isinstance(record, BrokenRecord):
                self.broken.append(_broken_entry(record))
                continue
            yield self.done, source, _light(record)
            self.done += 1


def _light(record: Record) -> Record:
    """Without the fields that only a lossless conversion needs: they would travel to the workers for nothing."""
    kept = {name: value for name, value in record.extra.items() if name == "unanswered"}
    return replace(record, extra=kept)


def _broken_entry(record: BrokenRecord) -> dict[str, Any]:
    entry = ledger_entry(record.origin, action="dropped", reason="broken", detail=record.what)
    return entry | {"field": record.field, "expected": record.expected, "fix": record.fix, "pitfall": record.pitfall}


def _read(data: DataSection, wording: Wording, *, tell: Progress) -> tuple[Chunk, Reading]:
    reading = Reading(data, tell)
    chunks: list[Chunk] = []
    done = 0
    for chunk in encode_all(reading.numbered(), wording, workers=num_workers(data.workers), encode=encode_rows):
        chunks.append(chunk)
        done += chunk.num_read
        tell(done, "preparing rows")
    return join_chunks(chunks), reading


def _prepare(data: DataSection, wording: Wording, *, tell: Progress) -> PreparedSet:
    chunk, reading = _read(data, wording, tell=tell)
    broken, num_records = reading.broken, reading.records
    sources = [as_source(source).path for source in data.sources]
    if isinstance(data.validation, str):
        held_data = data.model_copy(update={"sources": [data.validation]})
        held, held_reading = _read(held_data, wording, tell=tell)
        chunk, is_heldout = _with_heldout_file(chunk, held, source=len(sources))
        broken, sources = [*broken, *held_reading.broken], [*sources, data.validation]
        num_records += held_reading.records
    else:
        is_heldout = split_heldout(chunk.hashes, data.validation) if chunk.hashes else np.zeros(0, dtype=bool)
    audit = audit_rows(chunk, is_heldout=is_heldout, broken=broken, wording=wording, sources=sources)
    return PreparedSet(
        train=_side(chunk, ~is_heldout),
        heldout=_side(chunk, is_heldout),
        audit=audit,
        ledger=[*broken, *chunk.ledger],
        key="",
        template=wording.template.name,
        remarks={
            "records": num_records,
            "records_in_files": num_records + records_beyond_limits(data),
            "highest_id": int(chunk.tokens.max(initial=0)),
            "suspicious": chunk.suspicious,
            "same_answer": same_answer(chunk.answered, row_ids=chunk.row_ids, is_heldout=is_heldout),
            **comparisons(
                chunk.said,
                chunk.asked,
                row_ids=chunk.row_ids,
                sources=chunk.facts["source"].tolist(),
                is_heldout=is_heldout,
            ),
        },
    )


def _with_heldout_file(train: Chunk, held: Chunk, *, source: int) -> tuple[Chunk, np.ndarray]:
    """Rows of the validation file are held out; training rows that say the same are dropped into the ledger."""
    held.facts["source"] = np.full_like(held.facts["source"], source)
    known = set(held.said)
    repeats = np.array([one in known for one in train.said], dtype=bool)
    whole = join_chunks([train, held])
    whole.ledger.extend(
        {
            "row": row,
            "where": row_place(row),
            "action": "dropped",
            "reason": "in_validation",
            "detail": "the validation file holds a row that says the same",
        }
        for row, is_repeated in zip(train.row_ids, repeats, strict=True)
        if is_repeated
    )
    kept = np.concatenate([~repeats, np.ones(len(held.hashes), dtype=bool)])
    is_heldout = np.arange(len(kept)) >= len(train.hashes)
    rows = _side(whole, kept)
    return (
        replace(
            whole,
            tokens=rows.tokens,
            supervised=rows.supervised,
            lengths=whole.lengths[kept],
            facts={name: column[kept] for name, column in whole.facts.items()},
            row_ids=rows.row_ids,
            **{name: list(compress(getattr(whole, name), kept)) for name in ("hashes", "said", "asked", "answered")},
        ),
        is_heldout[kept],
    )


def _side(chunk: Chunk, chosen: np.ndarray) -> Any:
    return rows_of(
        chunk.tokens, supervised=chunk.supervised, lengths=chunk.lengths, row_ids=chunk.row_ids, chosen=chosen
    )
