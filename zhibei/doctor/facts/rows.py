"""What the data say: the audit of all rows, and what comparing rows with one another showed. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zhibei.config.run import RunFile
from zhibei.data.pairs import prepare_answers
from zhibei.data.prepare import Progress
from zhibei.data.prepared import PreparedAnswers, PreparedSet
from zhibei.data.steps import num_steps_of
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

MOST_PLACES = 5
ENOUGH_PAIRS, NEARLY_ALL, FAR_LONGER = 20, 0.95, 3


@dataclass(frozen=True, slots=True)
class Seen:
    """How often something was met, and the first places: `data.json, record 17 (line 204), field 'output'`."""

    count: int = 0
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RowFacts:
    """`audit` is what `zhibei.data.audit` counted over all rows."""

    audit: Mapping[str, Any] = field(default_factory=dict)
    ledger: tuple[Mapping[str, Any], ...] = ()
    num_steps: int = 0
    highest_id: int = 0
    longest: int = 0
    duplicates: Seen = Seen()
    heldout_in_training: Seen = Seen()
    """Held-out rows whose prompt and answer are also trained on, or were until they were dropped from training."""
    asked_in_training: Seen = Seen()
    """Held-out rows whose question alone is also asked in training, with another answer."""
    same_answer: Seen = Seen()
    """Training rows that give the commonest answer."""
    suspicious: Mapping[str, Seen] = field(default_factory=dict)
    """By the names of `zhibei.data.clean`: empty answers, placeholders, markup, whole dialogues in one field, ..."""
    records_in_files: int = 0
    """Records the files hold, before `limit` and weights."""
    seconds: float = 0.0
    was_cached: bool = False


@dataclass(frozen=True, slots=True)
class PairFacts:
    """Preference pairs (stages reward and dpo), after the template and after the cut."""

    kind: str = "pairs"
    """pairs, judged (single answers with a label) or prompts."""
    audit: Mapping[str, Any] = field(default_factory=dict)
    """As `zhibei.data.pair_audit` counted over all records."""
    ledger: tuple[Mapping[str, Any], ...] = ()
    num_pairs: int = 0
    """Records kept, of whatever kind; `num_train` of them are trained on."""
    num_train: int = 0
    num_steps: int = 0
    highest_id: int = 0
    longest: int = 0
    duplicates: Seen = Seen()
    contradictions: Seen = Seen()
    """The same two answers preferred the other way round elsewhere, or one answer judged good and bad."""
    heldout_in_training: Seen = Seen()
    asked_in_training: Seen = Seen()
    negative_margin: Seen = Seen()
    suspicious: Mapping[str, Seen] = field(default_factory=dict)
    records_in_files: int = 0
    identical: Seen = Seen()
    identical_after_cut: Seen = Seen()
    whitespace_only: Seen = Seen()
    empty_chosen: Seen = Seen()
    empty_rejected: Seen = Seen()
    prompt_fills_window: Seen = Seen()
    extra_bos: Seen = Seen()
    extra_terminator: Seen = Seen()
    missing_terminator: Seen = Seen()
    looks_swapped: str = ""
    """Why chosen and rejected look exchanged; "" when they do not."""
    num_good: int = 0
    num_bad: int = 0
    """Rows of KTO data by label."""
    mean_tokens_chosen: float = 0.0
    mean_tokens_rejected: float = 0.0


def read_row_facts(run: RunFile, prepared: PreparedSet) -> RowFacts:
    """What is known of the prepared rows of supervised training; everything was counted while they were prepared."""
    remarks, rows, training = prepared.remarks, len(prepared.train), run.training
    lengths = [int(side.lengths.max(initial=0)) for side in (prepared.train, prepared.heldout)]
    return RowFacts(
        audit=prepared.audit,
        ledger=tuple(prepared.ledger),
        num_steps=num_steps_of(
            rows, global_batch=training.global_batch, epochs=training.epochs, max_steps=training.max_steps
        ),
        highest_id=remarks.get("highest_id", 0),
        longest=max(lengths),
        duplicates=seen(remarks, "repeated"),
        heldout_in_training=_leaked(remarks, prepared.ledger),
        asked_in_training=seen(remarks, "asked_in_training"),
        same_answer=seen(remarks, "same_answer"),
        suspicious={name: seen(remarks["suspicious"], name) for name in remarks.get("suspicious", ())},
        records_in_files=remarks.get("records_in_files", 0),
        was_cached=prepared.folder is not None,
    )


def read_pair_facts(
    run: RunFile, tokenizer: Tokenizer, template: Template, *, on_rows: Progress | None = None
) -> PairFacts:
    """What is known of the records of stage reward, dpo or ppo, which are prepared (into the cache) where they are not
    yet. Raises UserError as `zhibei.data.pairs.prepare_answers`."""
    return pair_facts(run, prepare_answers(run, tokenizer, template, progress=on_rows))


def pair_facts(run: RunFile, prepared: PreparedAnswers) -> PairFacts:
    """The facts of records that are already prepared."""
    remarks, audit, training = prepared.remarks, prepared.audit, run.training
    sides = audit["sides"]
    plain = ("identical", "identical_after_cut", "whitespace_only", "empty_chosen", "empty_rejected", "extra_bos")
    more = ("extra_terminator", "missing_terminator", "negative_margin", "contradictions", "asked_in_training")
    return PairFacts(
        kind=prepared.kind,
        audit=audit,
        ledger=tuple(prepared.ledger),
        num_pairs=audit["rows_kept"],
        num_train=audit["rows_train"],
        num_steps=num_steps_of(
            audit["rows_train"],
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
        ),
        highest_id=audit["highest_id"],
        longest=audit["longest"],
        duplicates=seen(remarks, "repeated"),
        heldout_in_training=_leaked(remarks, prepared.ledger),
        suspicious={name: seen(remarks["suspicious"], name) for name in remarks["suspicious"]},
        records_in_files=remarks["records_in_files"],
        prompt_fills_window=_in_ledger(prepared.ledger, "prompt_fills_window"),
        looks_swapped=_why_swapped(audit),
        num_good=audit.get("good", 0),
        num_bad=audit.get("bad", 0),
        mean_tokens_chosen=sides.get("chosen", {}).get("mean_answer_tokens", 0.0),
        mean_tokens_rejected=sides.get("rejected", {}).get("mean_answer_tokens", 0.0),
        **{name: seen(remarks, name) for name in (*plain, *more)},
    )


def seen(remarks: Mapping[str, Any], name: str) -> Seen:
    """A remark of `zhibei.data.remarks` in the form of facts."""
    remark = remarks.get(name)
    return Seen(remark["count"], tuple(remark["places"])) if remark else Seen()


def _in_ledger(ledger: Iterable[Mapping[str, Any]], reason: str) -> Seen:
    places = [str(entry["where"]) for entry in ledger if entry["reason"] == reason]
    return Seen(len(places), tuple(places[:MOST_PLACES]))


def _leaked(remarks: Mapping[str, Any], ledger: Iterable[Mapping[str, Any]]) -> Seen:
    """Held-out rows that training says, and those that were therefore dropped from training."""
    kept, dropped = seen(remarks, "heldout_in_training"), _in_ledger(ledger, "in_validation")
    return Seen(kept.count + dropped.count, (*kept.places, *dropped.places)[:MOST_PLACES])


def _why_swapped(audit: Mapping[str, Any]) -> str:
    """Evidence that the columns are exchanged, from lengths alone: answers that people prefer are seldom a third as
    long as those they reject in nearly every pair."""
    if audit["kind"] != "pairs" or audit["rows_kept"] < ENOUGH_PAIRS:
        return ""
    chosen, rejected = (audit["sides"][name]["mean_answer_tokens"] for name in ("chosen", "rejected"))
    share = audit["rejected_longer_share"]
    if share < NEARLY_ALL or rejected < FAR_LONGER * chosen:
        return ""
    return f"in {share:.0%} of the pairs the rejected answer is longer ({rejected:.0f} tokens against {chosen:.0f})"
