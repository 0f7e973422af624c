"""The ledger: one line for every row that was dropped or changed, with the reason. Knows no row types."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from zhibei.config.errors import UserError
from zhibei.store.files import disk_error

MAX_EXCERPT_CHARACTERS = 200


class Ledger:
    """Appends entries to ledger.jsonl and counts them by reason; earlier entries are never touched."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair has no UTF-8 spelling; as `\ud800` it is proper JSON.
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 closed by close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(
        self,
        source: str,
        *,
        reason: str,
        record: int | None = None,
        line: int | None = None,
        field: str | None = None,
        excerpt: str = "",
    ) -> None:
        """One row: its file, its number in the file (from 0), its line (from 1), the field, why, and how it begins."""
        if len(excerpt) > MAX_EXCERPT_CHARACTERS:
            excerpt = excerpt[: MAX_EXCERPT_CHARACTERS - 1] + "…"
        entry = {"source": source, "record": record, "line": line, "field": field, "reason": reason, "excerpt": excerpt}
        try:
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as problem:
            raise disk_error(problem, purpose="the ledger of dropped rows", where=self._path) from problem
        self.counts[reason] += 1

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        try:
            self._file.close()
        except OSError as problem:
            raise disk_error(problem, purpose="the ledger of dropped rows", where=self._path) from problem


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
