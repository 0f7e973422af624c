"""The ledger keeps every entry, whatever text it holds, and counts the reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from zhibei.config.errors import UserError
from zhibei.store.ledger import MAX_EXCERPT_CHARACTERS, Ledger, read_ledger

TEXTS = ["", "指北", 'quote " and \\', "two\nlines\u2028three", "half a pair \ud800", "\x00"]


def test_entries_of_two_writers_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    for start in (0, 3):
        with Ledger(path) as ledger:
            for number, text in enumerate(TEXTS[start : start + 3], start=start):
                ledger.write("a.json", reason="empty answer", record=number, line=2, field="output", excerpt=text)
            ledger.write("b.json", reason="too long")
        assert ledger.counts == {"empty answer": 3, "too long": 1}
    entries = read_ledger(path)
    assert [entry["excerpt"] for entry in entries if entry["source"] == "a.json"] == TEXTS
    assert entries[0] == {
        "source": "a.json", "record": 0, "line": 2, "field": "output", "reason": "empty answer", "excerpt": "",
    }  # fmt: skip
    assert "指北" in path.read_text("utf-8")


def test_long_excerpts_are_cut_with_a_mark(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.write("a.json", reason="too long", excerpt="x" * 1000)
        ledger.write("a.json", reason="too long", excerpt="y" * MAX_EXCERPT_CHARACTERS)
    first, second = (entry["excerpt"] for entry in read_ledger(tmp_path / "ledger.jsonl"))
    assert (len(first), first[-1]) == (MAX_EXCERPT_CHARACTERS, "…")
    assert second == "y" * MAX_EXCERPT_CHARACTERS


def test_no_ledger_is_an_empty_one_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert read_ledger(path) == []
    path.write_text('{"source": "a"}\n{\n')
    with pytest.raises(UserError) as caught:
        read_ledger(path)
    assert caught.value.where == f"{path}, line 2"
