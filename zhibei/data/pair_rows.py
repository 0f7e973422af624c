"""Pairs and judged answers as the rows that a loop goes through: which rows make one item. Knows tokens, not losses.

Dimensions: I items (pairs or judged answers), N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zhibei.data.prepared import AnswerRows, PreparedAnswers, PreparedRows, PreparedSet

MOST_TRIES = 8


@dataclass(frozen=True)
class Items:
    """Rows in the order of a loop, `rows_per_item` of them after one another, with one value per item in `columns`."""

    rows: PreparedRows
    columns: dict[str, np.ndarray]
    rows_per_item: int

    def __len__(self) -> int:
        return len(self.rows) // self.rows_per_item


def pair_items(answers: AnswerRows) -> Items:
    """Rows 2i and 2i+1 are chosen and rejected of pair i."""
    rows = interleaved([answers.sides["chosen"], answers.sides["rejected"]])
    return Items(rows, {"margin": np.array(answers.columns["margin"])}, rows_per_item=2)


def judged_items(answers: AnswerRows) -> Items:
    """Row i is a judged answer; a pair gives two of them, the first good and the second bad."""
    if "answer" in answers.sides:
        return Items(answers.sides["answer"], {"is_good": np.array(answers.columns["is_good"])}, rows_per_item=1)
    rows = interleaved([answers.sides["chosen"], answers.sides["rejected"]])
    return Items(rows, {"is_good": np.arange(len(rows)) % 2 == 0}, rows_per_item=1)


def as_set(prepared: PreparedAnswers, train: Items, heldout: Items) -> PreparedSet:
    """The same set with its rows in the order of the loop."""
    return PreparedSet(
        train=train.rows,
        heldout=heldout.rows,
        audit=prepared.audit,
        ledger=prepared.ledger,
        key=prepared.key,
        template=prepared.template,
        folder=prepared.folder,
        remarks=prepared.remarks,
    )


def interleaved(sides: list[PreparedRows]) -> PreparedRows:
    """Row r of every side, then row r + 1 of every side."""
    lengths = np.stack([side.lengths for side in sides], axis=1).reshape(-1)
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.empty(int(borders[-1]), dtype=np.int32)
    supervised = np.empty(int(borders[-1]), dtype=bool)
    row_ids = [""] * len(lengths)
    for place, side in enumerate(sides):
        # Where each token of the side goes: its row moves as a whole.
        shift_R = borders[place : -1 : len(sides)] - np.asarray(side.borders[:-1])
        target_N = np.arange(len(side.tokens)) + np.repeat(shift_R, side.lengths)
        tokens[target_N] = side.tokens
        supervised[target_N] = side.supervised
        row_ids[place :: len(sides)] = side.row_ids
    return PreparedRows(tokens, supervised, borders, row_ids)


def answer_begins(rows: PreparedRows) -> np.ndarray:
    """int64 [R]: place in its row of each row's first learned token; the length of a row without one."""
    places = np.flatnonzero(rows.supervised)
    starts, ends = np.asarray(rows.borders[:-1]), np.asarray(rows.borders[1:])
    if not len(places):
        return ends - starts
    index = np.searchsorted(places, starts)
    first = np.where(index < len(places), places[np.minimum(index, len(places) - 1)], ends)
    return np.minimum(first, ends) - starts


def answer_tokens(rows: PreparedRows) -> np.ndarray:
    """int64 [R]: learned tokens of each row."""
    counts = np.concatenate([[0], np.cumsum(rows.supervised)])
    return counts[np.asarray(rows.borders[1:])] - counts[np.asarray(rows.borders[:-1])]


def mismatched(rows: PreparedRows, *, seed: int, longest: int) -> PreparedRows:
    """Each row's prompt followed by the answer to another prompt, drawn by `seed`, cut at `longest` tokens.

    What KTO estimates its baseline from (arXiv:2402.01306, section 4.2). A set whose prompts are all alike keeps them.
    """
    begins, num_rows = answer_begins(rows), len(rows)
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(num_rows)
    place_of = np.argsort(order)
    tokens, supervised = [], []
    for row in range(num_rows):
        prompt = _prompt(rows, begins, row)
        other = row
        for step in range(1, min(MOST_TRIES, num_rows - 1) + 1):
            other = int(order[(place_of[row] + step) % num_rows])
            if not np.array_equal(prompt, _prompt(rows, begins, other)):
                break
        start, end = int(rows.borders[other]) + int(begins[other]), int(rows.borders[other + 1])
        room = max(1, longest - len(prompt))
        tokens.append(np.concatenate([prompt, rows.tokens[start:end][:room]]))
        supervised.append(np.concatenate([np.zeros(len(prompt), bool), rows.supervised[start:end][:room]]))
    borders = np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64)
    return PreparedRows(
        np.concatenate(tokens).astype(np.int32) if tokens else np.zeros(0, np.int32),
        np.concatenate(supervised) if supervised else np.zeros(0, bool),
        borders,
        list(rows.row_ids),
    )


def _prompt(rows: PreparedRows, begins: np.ndarray, row: int) -> np.ndarray:
    start = int(rows.borders[row])
    return np.asarray(rows.tokens[start : start + int(begins[row])])
