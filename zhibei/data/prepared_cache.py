"""Prepared sets on disk under a key: whole or absent, checked when read. Knows arrays and JSON, not their making."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from zhibei.config.errors import UserError
from zhibei.data.prepared import AnswerRows, PreparedAnswers, PreparedRows, PreparedSet
from zhibei.store.files import as_json, read_json, sha256_of, sha256_of_text, write_json_atomic, write_text_atomic

SIDES = ("train", "heldout")
LEFTOVER_SECONDS = 24 * 3600
ARRAYS = ("tokens", "supervised", "borders")
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rows": ((), ()),
    "pairs": (("chosen", "rejected"), ("prompt_tokens", "margin")),
    "judged": (("answer",), ("prompt_tokens", "is_good")),
    "prompts": (("prompt",), ("prompt_tokens",)),
}
"""Sides and columns of each kind of prepared set; `rows` are those of supervised training."""


def cache_root(asked: str | None) -> Path:
    """`data.cache`, else ZHIBEI_CACHE, else ~/.cache/zhibei."""
    return Path(asked or os.environ.get("ZHIBEI_CACHE") or Path.home() / ".cache" / "zhibei").expanduser()


class FileHashes:
    """SHA-256 of files; size and modification time only decide whether a known hash may be used again."""

    def __init__(self, root: Path) -> None:
        self.index = root / "prepared" / "file-hashes.json"
        self.known: dict[str, list[Any]] = {}
        try:
            loaded = read_json(self.index)
            self.known = loaded if isinstance(loaded, dict) else {}
        except (OSError, UserError):
            self.known = {}  # no index yet, or a broken one: every file is hashed again

    def of(self, path: Path) -> str:
        place, stat = str(path.resolve()), path.stat()
        seen = self.known.get(place)
        if isinstance(seen, list) and len(seen) == 3 and seen[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(seen[2])
        digest = sha256_of(path)
        self.known[place] = [stat.st_size, stat.st_mtime_ns, digest]
        return digest

    def keep(self) -> None:
        """Without an index (a read-only cache) files are hashed again next time: slower, never wrong."""
        with suppress(OSError, UserError):
            write_json_atomic(self.index, self.known)


def key_of(facts: dict[str, Any]) -> str:
    """A name for everything that decides the rows."""
    return sha256_of_text(json.dumps(facts, sort_keys=True, ensure_ascii=False))[:32]


def write_prepared(folder: Path, prepared: PreparedSet | PreparedAnswers, *, facts: dict[str, Any]) -> None:
    """Into a temporary folder beside, then renamed: a reader sees all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    new = Path(tempfile.mkdtemp(prefix=f".new-{folder.name}-", dir=folder.parent))
    try:
        _write_arrays(new, prepared)
        write_text_atomic(new / "audit.json", as_json(prepared.audit))
        write_text_atomic(new / "remarks.json", as_json(dict(prepared.remarks)))
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in prepared.ledger)
        write_text_atomic(new / "ledger.jsonl", lines)
        files = {path.name: [path.stat().st_size, sha256_of(path)] for path in sorted(new.iterdir())}
        kind = prepared.kind if isinstance(prepared, PreparedAnswers) else "rows"
        index = {"key": prepared.key, "kind": kind, "template": prepared.template, "files": files, "made_of": facts}
        write_json_atomic(new / "index.json", index)
        if folder.exists() and not fault_of(folder):
            return  # another run with the same key was faster, and may be reading: what it wrote is the same
        if folder.exists():
            shutil.rmtree(folder)
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():  # else another one was faster just now
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_arrays(folder: Path, prepared: PreparedSet | PreparedAnswers) -> None:
    for side in SIDES:
        rows: PreparedRows | AnswerRows = getattr(prepared, side)
        if isinstance(rows, PreparedRows):
            _write_rows(folder, side, rows)
            continue
        for name, answers in rows.sides.items():
            _write_rows(folder, f"{side}.{name}", answers)
        for name, column in rows.columns.items():
            np.save(folder / f"{side}.{name}.npy", column, allow_pickle=False)


def _write_rows(folder: Path, name: str, rows: PreparedRows) -> None:
    for array in ARRAYS:
        np.save(folder / f"{name}.{array}.npy", getattr(rows, array), allow_pickle=False)
    write_text_atomic(folder / f"{name}.row_ids.json", json.dumps(rows.row_ids, ensure_ascii=False))


def _remove_leftovers(folder: Path) -> None:
    """What a run that was killed while writing left behind, once no run can still be writing it."""
    for left in folder.glob(".new-*-*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def fault_of(folder: Path) -> str:
    """What is wrong with a cached set, or "" when every file has its size and hash."""
    try:
        index = read_json(folder / "index.json")
        expected = index["files"]
        sides = PARTS[index["kind"]][0] or ("",)
        rows = [".".join(filter(None, (side, part))) for side in SIDES for part in sides]
        needed = [f"{name}.{array}.npy" for name in rows for array in ARRAYS] + ["audit.json", "ledger.jsonl"]
        missing = [name for name in needed if name not in expected]
        if missing:
            return f"index.json does not list {missing[0]}"
        for name, (size, digest) in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if sha256_of(path) != digest:
                return f"the content of {name} has changed"
    except (OSError, UserError, ValueError, KeyError, TypeError) as error:
        return f"index.json cannot be read ({type(error).__name__})"
    return ""


def read_prepared(folder: Path) -> PreparedSet:
    """A checked cached set; its arrays are memory-mapped."""
    return PreparedSet(train=_rows(folder, "train"), heldout=_rows(folder, "heldout"), **_documents(folder))


def read_prepared_answers(folder: Path) -> PreparedAnswers:
    """A checked cached set of answers or prompts; its arrays are memory-mapped."""
    kind = read_json(folder / "index.json")["kind"]
    train, heldout = (_answers(folder, side, kind) for side in SIDES)
    return PreparedAnswers(kind=kind, train=train, heldout=heldout, **_documents(folder))


def _documents(folder: Path) -> dict[str, Any]:
    index = read_json(folder / "index.json")
    return {
        "audit": read_json(folder / "audit.json"),
        "remarks": read_json(folder / "remarks.json"),
        "ledger": [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()],
        "key": index["key"],
        "template": index["template"],
        "folder": folder,
    }


def _answers(folder: Path, side: str, kind: str) -> AnswerRows:
    sides, columns = PARTS[kind]
    return AnswerRows(
        {name: _rows(folder, f"{side}.{name}") for name in sides},
        {name: np.load(folder / f"{side}.{name}.npy", mmap_mode="r", allow_pickle=False) for name in columns},
    )


def _rows(folder: Path, name: str) -> PreparedRows:
    tokens, supervised, borders = (
        np.load(folder / f"{name}.{array}.npy", mmap_mode="r", allow_pickle=False) for array in ARRAYS
    )
    return PreparedRows(tokens, supervised, borders, read_json(folder / f"{name}.row_ids.json"))


def rows_of(
    tokens: np.ndarray, *, supervised: np.ndarray, lengths: np.ndarray, row_ids: Sequence[str], chosen: np.ndarray
) -> PreparedRows:
    """The rows that `chosen` (bool [R]) names, in their order."""
    chosen_N = np.repeat(chosen, lengths)
    borders = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths[chosen], dtype=np.int64)])
    ids = [one for one, is_chosen in zip(row_ids, chosen, strict=True) if is_chosen]
    return PreparedRows(tokens[chosen_N], supervised[chosen_N], borders, ids)
