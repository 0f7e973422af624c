"""Token ids of a whole data set, flat on disk. Knows tokens and borders, not text, templates or models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PreparedRows:
    """R rows as three flat arrays (memory-mapped when they come from the cache).

    `tokens` int32 [N]: ids of all rows end to end. `supervised` bool [N]: whether that token is a target.
    `borders` int64 [R+1]: row r is `borders[r]:borders[r+1]`. `row_ids`: for each row `source#record` as a
    person would look it up (a chunked text adds `:chunk`).
    """

    tokens: np.ndarray
    supervised: np.ndarray
    borders: np.ndarray
    row_ids: list[str]

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.borders)


@dataclass(frozen=True)
class PreparedSet:
    """Training and held-out rows, what the audit found in ALL rows, and what was dropped and why.

    `audit` and each `ledger` entry are plain JSON values. `key` is the cache key: it changes when the data, the
    template, the tokenizer or the masking changes. `template` is the name that was resolved (never "auto").
    `remarks`: what comparing the rows and the rules of `clean` showed (see `zhibei.data.remarks`), by name.
    """

    train: PreparedRows
    heldout: PreparedRows
    audit: dict[str, Any]
    ledger: list[dict[str, Any]]
    key: str
    template: str
    folder: Path | None = None
    remarks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerRows:
    """R records of a stage that compares, judges or only asks. Each side holds whole rows, prompt and answer, of which
    the answer and its terminator are `supervised`; row r of every side belongs to record r.

    `sides`: `chosen` and `rejected` of pairs, `answer` of judged answers, `prompt` of prompts (where nothing is
    supervised and the answer comes next). `columns`, one value per record: `margin` float64 of pairs (NaN: not
    given), `is_good` bool of judged answers, `prompt_tokens` int64: where the answer begins (the earlier of the two).
    """

    sides: Mapping[str, PreparedRows]
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.sides.values())))


@dataclass(frozen=True)
class PreparedAnswers:
    """What `PreparedSet` is for supervised training, for the stages reward, dpo and ppo. `kind`: pairs, judged or
    prompts."""

    kind: str
    train: AnswerRows
    heldout: AnswerRows
    audit: dict[str, Any]
    ledger: list[dict[str, Any]]
    key: str
    template: str
    folder: Path | None = None
    remarks: Mapping[str, Any] = field(default_factory=dict)
