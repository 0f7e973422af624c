"""The ledger keeps every entry, whatever text it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from zhibei.config.errors import UserError
from zhibei.store.ledger import read_ledger, write_ledger

TEXTS = ["", "指北", 'quote " and \\', "two\nlines\u2028three", "half a pair \ud800", "\x00"]


def test_entries_come_back_in_order_whatever_their_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    entries = [
        {"row": f"a.json#{number}", "where": "a.json", "action": "dropped", "reason": "empty answer", "detail": text}
        for number, text in enumerate(TEXTS)
    ]
    write_ledger(path, entries)
    assert read_ledger(path) == entries
    assert "指北" in path.read_text("utf-8")


def test_no_ledger_is_an_empty_one_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert read_ledger(path) == []
    path.write_text('{"source": "a"}\n{\n')
    with pytest.raises(UserError) as caught:
        read_ledger(path)
    assert caught.value.where == f"{path}, line 2"
