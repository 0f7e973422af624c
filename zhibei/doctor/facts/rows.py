"""What the data say: the audit of all rows, and what comparing rows with one another showed. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """Held-out rows whose prompt and answer (or prompt alone) are also trained on."""
    suspicious: Mapping[str, Seen] = field(default_factory=dict)
    """By the names of `zhibei.data.clean`: empty answers, placeholders, markup, whole dialogues in one field, ..."""
    records_in_files: int = 0
    """Records the files hold, before `limit` and weights."""
    seconds: float = 0.0
    was_cached: bool = False


@dataclass(frozen=True, slots=True)
class PairFacts:
    """Preference pairs (stages reward and dpo), after the template and after the cut."""

    num_pairs: int = 0
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
