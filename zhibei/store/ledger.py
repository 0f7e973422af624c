"""The ledger: one line for every row that was dropped or changed, with the reason. Knows no row types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.files import write_text_atomic


def write_ledger(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write all entries, one JSON object per line; the file is the old one or the new one at every moment."""
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    # Half a surrogate pair has no UTF-8 spelling; as `\ud800` it is proper JSON.
    write_text_atomic(path, text.encode("utf-8", errors="backslashreplace").decode("utf-8"))


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """All entries; an absent file is an empty ledger."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as problem:
            raise UserError(
                f"not a ledger entry: {problem}",
                expected="one JSON object per line",
                fix="remove the line",
                where=f"{path}, line {number}",
            ) from problem
    return entries
