"""Weights and held-out rows go by content: the same rows, wherever and whenever they are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhibei.config.errors import UserError
from zhibei.config.run import DataSection, Source
from zhibei.data.mix import content_hash, copies, split_heldout, text_hash
from zhibei.data.readers import read_sources
from zhibei.data.records import Conversation, Origin, PlainText
from zhibei.text.messages import Message

HASHES = [text_hash(str(number)) for number in range(5000)]


def conversation(answer: str, *, index: int = 0, **options: object) -> Conversation:
    return Conversation((Message("user", "a"), Message("assistant", answer)), Origin("x", index), **options)  # type: ignore[arg-type]


def test_a_hash_is_of_what_is_said_alone() -> None:
    same = conversation("b", index=7, extra={"id": 3})
    assert content_hash(conversation("b")) == content_hash(same)
    assert content_hash(conversation("b")) == "d242cb56267b24d744a5a1887ed7be80", "splits of old runs rest on it"
    others = [conversation("c"), conversation("b", tools="t"), PlainText("b", Origin("x", 0))]
    context = Conversation((Message("user", "a", context="b"), Message("assistant", "")), Origin("x", 0))
    assert len({content_hash(record) for record in (same, *others, context)}) == 5


def test_weights_repeat_and_choose(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a", "completion": str(i)}) for i in range(1000)))

    def count(weight: float) -> int:
        return sum(1 for _ in read_sources(DataSection(sources=[Source(path=str(path), weight=weight)])))

    assert (count(1), count(3)) == (1000, 3000)
    assert 430 < count(0.5) < 570
    assert count(2.5) == 2000 + count(0.5), "the fraction chooses the same rows"
    assert count(0.5) == count(0.5)


def test_a_fraction_moves_no_old_row_and_keeps_equal_rows_together() -> None:
    is_heldout = split_heldout(HASHES, 0.1)
    assert 400 < is_heldout.sum() < 600
    longer = split_heldout(HASHES[::-1] + HASHES, 0.1)
    assert np.array_equal(longer[5000:], is_heldout)
    assert np.array_equal(longer[:5000][::-1], is_heldout)


@given(st.lists(st.integers(0, 30), min_size=4, max_size=60), st.integers(2, 20))
def test_a_number_holds_out_at_most_so_many_and_no_equal_row_elsewhere(rows: list[int], number: int) -> None:
    hashes = [HASHES[row] for row in rows]
    try:
        is_heldout = split_heldout(hashes, number)
    except UserError:
        assert number >= len(rows) or len(set(rows)) == 1
        return
    assert is_heldout.sum() <= number
    held = {row for row, held in zip(rows, is_heldout, strict=True) if held}
    kept = {row for row, held in zip(rows, is_heldout, strict=True) if not held}
    assert not held & kept
    if len(set(rows)) == len(rows):
        assert is_heldout.sum() == number


def test_the_weights_choice_is_independent_of_the_split() -> None:
    rows = [conversation(str(number)) for number in range(4000)]
    chosen = [content_hash(row) for row in rows if copies(row, 0.5)]
    assert 0.07 < split_heldout(chosen, 0.1).mean() < 0.13


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError, match="holds out all"):
        split_heldout(HASHES[:3], 5)
    with pytest.raises(UserError, match="holds out all"):
        split_heldout(HASHES[:3], 1.0)
