"""The rows of a stage in the order of the offline loop, read from what the run file names. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from zhibei.config.errors import UserError
from zhibei.config.run import RunFile
from zhibei.data import pair_rows
from zhibei.data.pairs import prepare_answers
from zhibei.data.prepare import prepare
from zhibei.data.prepared import PreparedAnswers, PreparedSet
from zhibei.text.template import Template
from zhibei.text.tokenizer import Tokenizer

OnRows = Callable[[int, str], None] | None


@dataclass(frozen=True)
class Items:
    """Training and held-out rows, how many of them in sequence are one item, and one value per item in the columns."""

    rows: PreparedSet
    rows_per_item: int = 1
    unit: Literal["tokens", "items"] = "tokens"
    train_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    heldout_columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each training item."""
        return self.rows.train.lengths.reshape(-1, self.rows_per_item).sum(axis=1).tolist()


def supervised_items(rows: PreparedSet) -> Items:
    """Each row by itself; the loss is a mean over learned tokens."""
    return Items(rows)


def read_supervised(run: RunFile, tokenizer: Tokenizer, template: Template, on_rows: OnRows) -> Items:
    return supervised_items(prepare(run, tokenizer, template, progress=on_rows))


def read_pairs(run: RunFile, tokenizer: Tokenizer, template: Template, on_rows: OnRows) -> Items:
    """Pairs of a reward model. Raises UserError for margins that are asked for and not there."""
    prepared = prepare_answers(run, tokenizer, template, progress=on_rows)
    items = _items(prepared, pair_rows.pair_items)
    if run.reward.margin and not np.isfinite(items.train_columns["margin"]).any():
        raise UserError(
            "reward.margin: true, and no pair has a margin",
            expected="a number in the field 'margin' of the pairs that have one",
            fix="remove reward.margin, or name the field with columns: {margin: ...}",
            where="reward.margin",
        )
    return items


def read_compared(run: RunFile, tokenizer: Tokenizer, template: Template, on_rows: OnRows) -> Items:
    """Pairs, or judged answers for KTO (which takes a pair as two of them)."""
    prepared = prepare_answers(run, tokenizer, template, progress=on_rows)
    if prepared.kind == "judged" and run.dpo.loss != "kto":
        raise UserError(
            f"the records are single answers with a thumb up or down, and dpo.loss: {run.dpo.loss} learns from pairs",
            expected="pairs (chosen, rejected)",
            fix="set dpo.loss: kto, which such records are made for",
            where="dpo.loss",
            pitfall="records-of-another-stage",
        )
    return _items(prepared, pair_rows.judged_items if run.dpo.loss == "kto" else pair_rows.pair_items)


def _items(prepared: PreparedAnswers, of: Callable[..., pair_rows.Items]) -> Items:
    train, heldout = of(prepared.train), of(prepared.heldout)
    return Items(
        pair_rows.as_set(prepared, train, heldout),
        rows_per_item=train.rows_per_item,
        unit="items",
        train_columns=train.columns,
        heldout_columns=heldout.columns,
    )


READERS: dict[str, Callable[[RunFile, Tokenizer, Template, OnRows], Items]] = {
    "sft": read_supervised,
    "reward": read_pairs,
    "dpo": read_compared,
}
