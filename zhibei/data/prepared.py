"""Token ids of a whole data set, flat on disk. Knows tokens and borders, not text, templates or models."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    train: PreparedRows
    heldout: PreparedRows
    audit: dict[str, Any]
    ledger: list[dict[str, Any]]
    key: str
    template: str
    folder: Path | None = None
